"""Stand-ins for a trainer's model, tokenizer and rollouts, so that the code on the how-to pages runs as it is printed.

Replace them by your own. The pages import this file from the root of a checkout.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from srpo_core import (
    Credit,
    RolloutBatch,
    SRPOConfig,
    corrupt_pixel_values,
    credit,
    group_advantages,
    plan,
    token_log_probs,
)

EOS, PAD = 1, 0


class Characters:
    """A tokenizer with one token for each character."""

    eos_token_id, pad_token_id = EOS, PAD

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class ToyPolicy(nn.Module):
    """A recurrent network that sees an image first, and then one character after another."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(3 * 28 * 28, 32)
        self.embedding = nn.Embedding(128, 32)
        self.body = nn.GRU(32, 32, batch_first=True)
        self.lm_head = nn.Linear(32, 128)

    def hidden(self, pixel_values: Tensor, token_ids: Tensor) -> Tensor:
        """The last hidden states, [batch, time, hidden_dim]: the one at ``[b, t]`` predicts ``token_ids[b, t]``."""
        before = [self.image(pixel_values.flatten(1))[:, None], self.embedding(token_ids[:, :-1])]
        return self.body(torch.cat(before, dim=1))[0]

    def forward(self, pixel_values: Tensor, token_ids: Tensor) -> Tensor:
        """The logits, [batch, time, vocab]."""
        return self.lm_head(self.hidden(pixel_values, token_ids))


class Rollouts(NamedTuple):
    """Eight responses to two prompts, four to each; the last response of each group is right."""

    pixel_values: Tensor  # [batch, 3, 28, 28], normalized with a mean and a standard deviation of 0.5
    prompts: list[str]  # with the special tokens of the chat template
    token_ids: Tensor  # [batch, time], right-padded
    mask: Tensor  # [batch, time], True at sampled tokens
    group_ids: Tensor  # [batch], equal where the prompt is the same
    rewards: Tensor  # [batch]


def rollouts() -> Rollouts:
    """The same made-up rollouts at every call."""
    seen = [["two cats", "a dog", "", "two cats"], ["a red bus", "one bus", "a bus", "three buses"]]
    texts = [
        f"<perception>{what}</perception><think>so it is {count}</think><answer>{count}</answer>{chr(EOS)}"
        if what
        else f"<answer>{count}</answer>{chr(EOS)}"
        for group in seen
        for what, count in zip(group, (1, 3, 2, 2), strict=True)
    ]
    time = max(map(len, texts))
    token_ids = torch.tensor([[*map(ord, text), *[PAD] * (time - len(text))] for text in texts])
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    group_ids = torch.arange(2).repeat_interleave(4)
    prompts = ["How many? Write <perception>...</perception><think>...</think><answer>...</answer>."] * 8
    return Rollouts(
        images[group_ids], prompts, token_ids, token_ids != PAD, group_ids, torch.tensor([0.0, 0.0, 0.0, 1.0] * 2)
    )


class WeightedBatch(NamedTuple):
    """What a trainer has at hand after ``credit``, under the names of the page on your own trainer."""

    model: ToyPolicy
    score: Callable[[Tensor, Tensor], Tensor]  # pixels and token ids -> log-probabilities, in nats
    pixel_values: Tensor
    token_ids: Tensor
    mask: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    batch: RolloutBatch
    credited: Credit


def weighted_batch() -> WeightedBatch:
    """The made-up rollouts after the steps of the page on your own trainer, with a policy that was not trained."""
    torch.manual_seed(0)
    model, tokenizer, options = ToyPolicy(), Characters(), SRPOConfig()
    pixel_values, _, token_ids, mask, group_ids, rewards = rollouts()
    batch = RolloutBatch.of(token_ids, mask, tokenizer, options, group_ids=group_ids)
    planned = plan(batch, options, has_images=True, pad_token_id=PAD)
    corrupted = corrupt_pixel_values(pixel_values, prompt_ids=group_ids, image_mean=0.5, image_std=0.5)
    images = {"original": pixel_values, "corrupted": corrupted}

    def score(pixel_values: Tensor, token_ids: Tensor) -> Tensor:
        return token_log_probs(model(pixel_values, token_ids), token_ids)

    with torch.no_grad():
        old_log_probs = score(pixel_values, token_ids)
        scored = {view.name: score(images[view.image], (view.responses or batch).token_ids) for view in planned.views}
    advantages = group_advantages(rewards, group_ids)
    credited = credit(batch, planned, scored, options, old_log_probs=old_log_probs, advantages=advantages, step=0)
    return WeightedBatch(model, score, pixel_values, token_ids, mask, old_log_probs, advantages, batch, credited)
