"""A trainer of your own with SRPO in it: `train` is an ordinary GRPO loop, `SRPO` is what is added to one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from benchmarks.grounding.model import TinyVLM
from benchmarks.grounding.world import EOS, PAD, TAG_IDS, Problems, World, read, reward
from srpo_core import (
    CounterfactualResponses,
    LossOutput,
    RoleAdvantages,
    Segmentation,
    corrupt_images,
    counterfactual_responses,
    fused_linear_srpo_loss,
    group_advantages,
    segment_roles,
    srpo_advantages,
    srpo_loss,
    token_log_probs,
)
from srpo_core.corruption import CorruptionKind
from srpo_core.counterfactuals import CounterfactualKind


class Batch(NamedTuple):
    """One step's responses, a row each, and what the trainer knows about them."""

    problems: Problems
    other_images: Float[Tensor, "batch 3 height width"]  # of the next prompt
    token_ids: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    segmentation: Segmentation  # what each token does
    group_ids: Int[Tensor, " batch"]  # equal for responses to one prompt
    advantages: Float[Tensor, " batch"]
    old_log_probs: Float[Tensor, "batch time"]  # nats, of the policy that is about to be updated
    normalizer: Float[Tensor, ""]  # tokens of an update
    step: int


# Looks at a batch once and returns the loss of some of its rows, under the model as it is at that moment.
Method = Callable[[TinyVLM, Batch], Callable[[Tensor], LossOutput]]


@dataclass(frozen=True)
class TrainConfig:
    """A step samples ``prompts * group_size`` responses and makes ``updates`` optimiser steps of them."""

    steps: int = 120
    learning_rate: float = 2e-4
    prompts: int = 16
    group_size: int = 8
    updates: int = 2


def train(
    model: TinyVLM,
    world: World,
    method: Method,
    config: TrainConfig,
    *,
    seed: int,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> None:
    """Train a model in place on the reward of its answers alone; ``on_step`` hears the metrics of each step."""
    generator = Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(1, config.steps + 1):
        batch, metrics = roll_out(model, world, config, generator, step)
        if len(batch.token_ids) > 0:
            loss_of = method(model, batch)
            for rows in torch.randperm(len(batch.token_ids), generator=generator).chunk(config.updates):
                loss, loss_metrics = loss_of(rows)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                metrics |= {name: value.item() for name, value in loss_metrics.items()}
        on_step(step, metrics)


@torch.no_grad()
def roll_out(
    model: TinyVLM, world: World, config: TrainConfig, generator: Generator, step: int
) -> tuple[Batch, dict[str, float]]:
    """Return one step's responses with their advantages, and their metrics.

    Groups whose answers are all right or all wrong have no advantage and are left out: that saves their passes and
    leaves the gradient as it was, since the normalizer still counts them.
    """
    problems = world.sample(config.prompts, "train", generator).to(model.device)
    rollouts = model.generate(
        problems.images,
        problems.questions,
        max_tokens=world.response_length + 2,
        group_size=config.group_size,
        generator=generator,
    )
    other_images = problems.images.roll(-1, 0).repeat_interleave(config.group_size, 0)
    problems = problems.repeat(config.group_size)
    group_ids = torch.arange(config.prompts, device=model.device).repeat_interleave(config.group_size)
    rewards = reward(rollouts.token_ids, problems)
    advantages = group_advantages(rewards, group_ids)
    live = advantages.nonzero()[:, 0]
    problems, token_ids = problems.rows(live), rollouts.token_ids[live]
    batch = Batch(
        problems,
        other_images[live],
        token_ids,
        rollouts.mask[live],
        segment_roles(token_ids, rollouts.mask[live], tag_ids=TAG_IDS, eos_token_id=EOS),
        group_ids[live],
        advantages[live],
        log_probs_of(model, problems, token_ids),
        rollouts.mask.sum() / config.updates,
        step,
    )
    return batch, {"reward": rewards.mean().item(), "live": len(live) / len(rewards)}


@dataclass(frozen=True)
class SRPO:
    """SRPO as a method; ``strength`` 0 is GRPO, and then takes no extra look.

    Attributes:
        strength: How far the weights may move from 1.
        corruption: What becomes of the image (:func:`~srpo_core.corrupt_images`).
        corruption_strength: How much of it; None: the kind's default.
        counterfactual: What becomes of the perception (:func:`~srpo_core.counterfactual_responses`).
        options: Further options of the weights (:func:`~srpo_core.srpo_advantages`).
        fused: Take the loss straight from the hidden states (:func:`~srpo_core.fused_linear_srpo_loss`).
    """

    strength: float = 1.0
    corruption: CorruptionKind = "patch_mask"
    corruption_strength: float | None = None
    counterfactual: CounterfactualKind = "swap"
    options: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = False

    def __call__(self, model: TinyVLM, batch: Batch) -> Callable[[Tensor], LossOutput]:
        corrupted, replaced = self.look_again(model, batch)

        def loss_of(rows: Tensor) -> LossOutput:
            if self.fused:
                problems, token_ids = batch.problems.rows(rows), batch.token_ids[rows]
                embeddings = model.embed_words(token_ids, problems.questions.shape[1])
                hidden = model.hidden(problems.images, problems.questions, embeddings)
                loss = partial(fused_linear_srpo_loss, hidden, model.head.weight, token_ids, bias=model.head.bias)
            else:
                loss = partial(srpo_loss, new_log_probs(model, batch, rows))
            return loss(
                batch.old_log_probs[rows],
                None if corrupted is None else corrupted[rows],
                None if replaced is None else replaced[rows],
                batch.segmentation.roles[rows],
                batch.advantages[rows],
                batch.mask[rows],
                strength=self.strength,
                normalizer=batch.normalizer,
                **self.options,
            )

        return loss_of

    def look_again(self, model: TinyVLM, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Return the log-probs under the corrupted image, and those after the other perception; GRPO needs neither."""
        if self.strength == 0.0:
            return None, None
        corrupted = with_corrupted_image(model, batch, self.corruption, self.corruption_strength)
        return corrupted, with_other_perception(model, batch, self.counterfactual)

    def weights(self, model: TinyVLM, batch: Batch) -> Float[Tensor, "batch time"]:
        return self.credit(batch, *self.look_again(model, batch)).weights

    def credit(self, batch: Batch, corrupted: Tensor | None, replaced: Tensor | None) -> RoleAdvantages:
        """Return the weights that training on this batch would use, from what :meth:`look_again` saw."""
        return srpo_advantages(
            batch.old_log_probs,
            corrupted,
            replaced,
            batch.segmentation.roles,
            batch.advantages,
            batch.mask,
            strength=self.strength,
            **self.options,
        )


@torch.no_grad()
def with_corrupted_image(
    model: TinyVLM, batch: Batch, kind: CorruptionKind = "patch_mask", strength: float | None = None
) -> Float[Tensor, "batch time"]:
    """Return the log-prob of each response token, in nats, had the image been corrupted."""
    images = corrupted_images(model, batch, kind, strength)
    return log_probs_of(model, replace(batch.problems, images=images), batch.token_ids)


def corrupted_images(
    model: TinyVLM, batch: Batch, kind: CorruptionKind = "patch_mask", strength: float | None = None
) -> Float[Tensor, "batch 3 height width"]:
    if kind == "other_image":  # also where a single group is live
        return batch.other_images
    return corrupt_images(
        batch.problems.images,
        prompt_ids=batch.group_ids,
        kind=kind,
        strength=strength,
        patch_size=model.patch,
        step=batch.step,
    )


@torch.no_grad()
def with_other_perception(
    model: TinyVLM, batch: Batch, kind: CounterfactualKind = "swap"
) -> Float[Tensor, "batch time"]:
    """Return the log-prob of each response token, in nats, had the model perceived something else."""
    other = other_perception(batch, kind)
    visible = other.attention_mask if kind == "mask" else None  # else causality alone hides the padding
    logits = model(batch.problems.images, batch.problems.questions, other.token_ids, visible)
    return other.carry_back(token_log_probs(logits, other.token_ids), batch.old_log_probs)


def other_perception(batch: Batch, kind: CounterfactualKind) -> CounterfactualResponses:
    # Filler makes every perception different; another one has to state other numbers.
    counts = read(batch.token_ids, batch.problems.colours).counts
    return counterfactual_responses(
        batch.token_ids,
        batch.segmentation.roles,
        batch.mask,
        kind=kind,
        group_ids=batch.group_ids,
        perception_keys=counts[:, 0] * 100 + counts[:, 1],
        boundary=batch.segmentation.boundary,
        pad_token_id=PAD,
    )


def new_log_probs(model: TinyVLM, batch: Batch, rows: Tensor) -> Float[Tensor, "rows time"]:
    """Return the log-prob of each token of some responses under the model as it is now, in nats."""
    return log_probs_of(model, batch.problems.rows(rows), batch.token_ids[rows])


def log_probs_of(model: TinyVLM, problems: Problems, token_ids: Tensor) -> Float[Tensor, "batch time"]:
    """Return the log-prob of each response token, in nats."""
    return token_log_probs(model(problems.images, problems.questions, token_ids), token_ids)


METHODS: dict[str, SRPO] = {"grpo": SRPO(strength=0.0), "srpo": SRPO()}
