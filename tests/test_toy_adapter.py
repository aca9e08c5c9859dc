"""An adapter for a trainer that nobody has: as long as one has to be, and at strength 0 plain GRPO bit for bit."""

import inspect

import pytest
import torch
from torch import Tensor, nn

from srpo_core import (
    RolloutBatch,
    SRPOConfig,
    corrupt_images,
    credit,
    group_advantages,
    grpo_loss,
    plan,
    token_log_probs,
)
from srpo_core.batch import MAIN_METRICS, ending_ids, logged
from srpo_core.pixel_values import count_images
from srpo_core.watch import RunWatch

TAGS = {"perception_tags": ("<p>", "</p>"), "reasoning_tags": ("<t>", "</t>"), "answer_tags": None}
PROMPTS = ["Look, and answer as <p>...</p><t>...</t>."]
EOS, PAD = 1, 0


class Characters:
    """A token for each character."""

    eos_token_id = EOS

    def decode(self, ids):
        return "".join(map(chr, ids))


class ToyPolicy(nn.Module):
    """A recurrent network that sees an image first, then one character after another."""

    def __init__(self):
        super().__init__()
        self.image = nn.Linear(3 * 4 * 4, 16)
        self.embedding = nn.Embedding(128, 16)
        self.body = nn.GRU(16, 16, batch_first=True)
        self.lm_head = nn.Linear(16, 128)

    def forward(self, images: Tensor, token_ids: Tensor) -> Tensor:
        """Logits of each token, given the image and the tokens before it."""
        before = torch.cat([self.image(images.flatten(1))[:, None], self.embedding(token_ids[:, :-1])], dim=1)
        return self.lm_head(self.body(before)[0])


class ToyTrainer:
    """The trainer that is adapted: its rollouts come in as tensors, and it makes two steps on each batch."""

    def __init__(self, policy: nn.Module, options: SRPOConfig) -> None:
        self.policy, self.options, self.steps = policy, options, 0
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=0.02)

    def log_probs(self, images: Tensor, token_ids: Tensor) -> Tensor:
        return token_log_probs(self.policy(images, token_ids), token_ids)

    def token_advantages(
        self, images: Tensor, token_ids: Tensor, mask: Tensor, group_ids: Tensor, old_log_probs: Tensor, rewards: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """GRPO's, as it was before there was an adapter."""
        return group_advantages(rewards, group_ids)[:, None].expand_as(old_log_probs), {}

    def train(
        self, images: Tensor, token_ids: Tensor, mask: Tensor, group_ids: Tensor, rewards: Tensor
    ) -> dict[str, float]:
        with torch.no_grad():
            old_log_probs = self.log_probs(images, token_ids)
        advantages, metrics = self.token_advantages(images, token_ids, mask, group_ids, old_log_probs, rewards)
        for _ in range(2):
            loss, _ = grpo_loss(
                self.log_probs(images, token_ids), advantages, mask, self.options, old_log_probs=old_log_probs
            )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.steps += 1
        return metrics


class SRPOToyTrainer(ToyTrainer):
    """The adapter: where the responses come from, how one view is scored, where the advantages go."""

    def __init__(self, policy: nn.Module, options: SRPOConfig) -> None:
        super().__init__(policy, options)
        self.watch = RunWatch(options, Characters())

    def token_advantages(
        self, images: Tensor, token_ids: Tensor, mask: Tensor, group_ids: Tensor, old_log_probs: Tensor, rewards: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        options, ending = self.options, ending_ids(Characters())
        batch = RolloutBatch.of(token_ids, mask, Characters(), options, group_ids=group_ids, ending=ending)
        changed = corrupt_images(
            images,
            prompt_ids=group_ids,
            kind=options.corruption,
            amount=options.corruption_amount,
            patch_size=1,
            unchanged="keep",
            seed=options.seed,
            step=self.steps,
        )
        seen = {"original": images, "corrupted": changed}
        counts = count_images(images, changed, images_per_row=[1] * len(images))
        self.watch.look(batch, prompts=PROMPTS, image_counts=counts)
        planned = plan(batch, options, has_images=True, pad_token_id=PAD)
        with torch.no_grad():
            scored = {
                view.name: self.log_probs(seen[view.image], (view.responses or batch).token_ids)
                for view in planned.views
            }
        credited = credit(
            batch,
            planned,
            scored,
            options,
            old_log_probs=old_log_probs,
            advantages=group_advantages(rewards, group_ids),
            step=self.steps,
            image_counts=counts,
            correct=rewards > 0,
        )
        return credited.advantages, logged(credited.metrics)


# Two images and what may be said of them; the last answer of each is right.
ANSWERS = {
    0: ["<p>dark</p><t>so 2</t>", "<p>red</p><t>so 1</t>", "<t>1</t>", "<p>dark</p><t>so 1</t>"],
    1: ["<p>dark</p><t>so 1</t>", "<p>red</p><t>so 1</t>", "<p>red<t>", "<p>red</p><t>so 2</t>"],
}


def rollouts():
    """Images, responses, mask, groups and rewards, made up."""
    g = torch.Generator().manual_seed(0)
    texts = [text + chr(EOS) for answers in ANSWERS.values() for text in answers]
    width = max(map(len, texts)) + 1
    token_ids = torch.tensor([[*map(ord, text), *[PAD] * (width - len(text))] for text in texts])
    group_ids = torch.tensor([group for group, answers in ANSWERS.items() for _ in answers])
    rewards = torch.tensor([float(text is answers[-1]) for answers in ANSWERS.values() for text in answers])
    return torch.rand(2, 3, 4, 4, generator=g)[group_ids], token_ids, token_ids != PAD, group_ids, rewards


def trained(trainer, steps=4, **options):
    torch.manual_seed(0)
    policy = ToyPolicy()
    made = trainer(policy, SRPOConfig(**TAGS, **options))
    metrics = [made.train(*rollouts()) for _ in range(steps)]
    return made, metrics


def parameters_of(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.policy.parameters()])


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"mix": 0.0}, {"strength": 0.0, "reliance_spans": 2}])
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def test_without_strength_the_adapter_trains_like_the_trainer_bit_for_bit(off, surrogate):
    plain, _ = trained(ToyTrainer, surrogate=surrogate)
    adapted, _ = trained(SRPOToyTrainer, surrogate=surrogate, **off)
    assert torch.equal(parameters_of(adapted), parameters_of(plain))


def test_the_adapter_trains_and_weighs():
    images, token_ids, mask, _, rewards = rollouts()
    before, _ = trained(SRPOToyTrainer, steps=0)
    adapted, metrics = trained(SRPOToyTrainer, steps=12)
    plain, _ = trained(ToyTrainer, steps=12)
    assert not torch.equal(parameters_of(adapted), parameters_of(plain))
    ahead = []  # right answers of wrong ones, nats per token
    for trainer in (before, adapted):
        with torch.no_grad():
            log_probs = torch.where(mask, trainer.log_probs(images, token_ids), 0.0).sum(1) / mask.sum(1)
        ahead.append(log_probs[rewards > 0].mean() - log_probs[rewards == 0].mean())
    assert ahead[1] > ahead[0] + 1.0
    first, last = metrics[0], metrics[-1]
    assert first["srpo/structured/fraction"] == 6 / 8
    assert first["srpo/corruption/unchanged"] == 0.0
    assert first["srpo/right/fraction"] == 2 / 8
    assert first["srpo/swap/coverage"] == 1.0
    assert last["srpo/tokens/effective_fraction"] < 0.99  # the weights are not equal
    assert [*first] == [*last] == [f"srpo/{name}" for name in MAIN_METRICS]


@pytest.mark.parametrize(
    "options",
    [
        {"reliance_spans": 2},
        {"counterfactual": "drop", "counterfactual_image": "corrupted"},
        {"corruption": "other_image"},
        {"mix_warmup_steps": 3, "scale": "batch_rms"},
    ],
    ids=str,
)
def test_the_adapter_needs_no_line_for_an_option(options):
    """Whatever is chosen, the two calls of the driver and the loop over the views stay as they are."""
    plain, _ = trained(ToyTrainer, steps=2)
    adapted, _ = trained(SRPOToyTrainer, steps=2, **options)
    assert parameters_of(adapted).isfinite().all()
    assert not torch.equal(parameters_of(adapted), parameters_of(plain))


def test_an_adapter_is_short():
    assert len(inspect.getsource(SRPOToyTrainer).splitlines()) <= 50
