"""A trainer that you can read: `train` is an ordinary GRPO loop, and `SRPO` is what is added to one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from benchmarks.grounding.model import TinyVLM
from benchmarks.grounding.world import EOS, PAD, TAG_IDS, Problems, Split, World, read, reward
from srpo_core import (
    Credit,
    LossOutput,
    OutputLayer,
    RolloutBatch,
    Segmentation,
    SRPOConfig,
    corrupt_images,
    credit,
    fused_linear_grpo_loss,
    group_advantages,
    grpo_loss,
    plan,
    segment_roles,
    srpo_advantages,
    token_log_probs,
)
from srpo_core.batch import Plan, View


class Batch(NamedTuple):
    """The responses of one step, one per row, and what the trainer knows about them."""

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

    @property
    def rollout(self) -> RolloutBatch:
        """What the core has to know of them."""
        return RolloutBatch(self.token_ids, self.mask, self.segmentation, self.group_ids)


# Looks at a batch once and returns the loss of some of its rows, under the model as it is at that moment.
Method = Callable[[TinyVLM, Batch], Callable[[Tensor], LossOutput]]


@dataclass(frozen=True)
class TrainConfig:
    """A step samples ``prompts * group_size`` responses and makes ``updates`` optimizer steps of them."""

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
    model: TinyVLM, world: World, config: TrainConfig, generator: Generator, step: int, *, split: Split = "train"
) -> tuple[Batch, dict[str, float]]:
    """The responses of one step with their advantages, and their metrics.

    Groups whose answers are all right or all wrong have no advantage and are left out: that saves their passes and
    leaves the gradient as it was, because the normalizer still counts them.
    """
    problems = world.sample(config.prompts, split, generator).to(model.device)
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
    """SRPO as a method: the views are scored and credit is given once per batch, then the loss is GRPO's.

    Attributes:
        options: Of the views, the weights and the loss. At ``strength`` 0 this is GRPO and scores no view. Tags and
            group options are not read, because :func:`roll_out` has made roles and advantages already.
        fused: Whether the loss is taken straight from the hidden states.
        share_prefixes: Whether the views read each prompt once for all of its responses: the same up to rounding.
    """

    options: SRPOConfig = field(default_factory=SRPOConfig)
    fused: bool = False
    share_prefixes: bool = False

    def __post_init__(self) -> None:
        if self.options.scale == "ema_rms":
            raise ValueError("scale='ema_rms' has a state from batch to batch, which this method does not keep")

    def __call__(self, model: TinyVLM, batch: Batch) -> Callable[[Tensor], LossOutput]:
        credited = self.credit_of(model, batch)

        def loss_of(rows: Tensor) -> LossOutput:
            advantages, mask = credited.advantages[rows], batch.mask[rows]
            old_log_probs, normalizer = batch.old_log_probs[rows], batch.normalizer
            if self.fused:
                hidden, output = last_hidden(model, batch, rows), OutputLayer(model.head.weight, bias=model.head.bias)
                loss, metrics = fused_linear_grpo_loss(
                    hidden, output, batch.token_ids[rows], advantages, mask, self.options,
                    old_log_probs=old_log_probs, normalizer=normalizer,
                )  # fmt: skip
            else:
                log_probs = new_log_probs(model, batch, rows)
                loss, metrics = grpo_loss(
                    log_probs, advantages, mask, self.options, old_log_probs=old_log_probs, normalizer=normalizer
                )
            return LossOutput(loss, metrics | credited.metrics)

        return loss_of

    def credit_of(self, model: TinyVLM, batch: Batch) -> Credit:
        """The token advantages that training on this batch uses, with their weights."""
        if self.options.changes_nothing:  # GRPO needs no other view
            roles, broken, _ = batch.segmentation
            return srpo_advantages(
                batch.old_log_probs, batch.advantages, roles, batch.mask, self.options, broken=broken
            )
        planned, share = plan_views(batch, self.options), self.share_prefixes
        return credit(
            batch.rollout,
            planned,
            {view.name: score(model, batch, view, self.options, share_prefixes=share) for view in planned.views},
            self.options,
            old_log_probs=batch.old_log_probs,
            advantages=batch.advantages,
            step=batch.step,
        )

    def weights(self, model: TinyVLM, batch: Batch) -> Float[Tensor, "batch time"]:
        """The weight of each token."""
        return self.credit_of(model, batch).weights


def plan_views(batch: Batch, options: SRPOConfig) -> Plan:
    """The views of a batch that have to be scored."""
    # Filler makes every perception different; another one has to state other numbers.
    counts = read(batch.token_ids, batch.problems.colors).counts
    return plan(
        batch.rollout,
        options,
        has_images=True,
        pad_token_id=PAD,
        perception_keys=counts[:, 0] * 100 + counts[:, 1],
    )


@torch.no_grad()
def score(
    model: TinyVLM, batch: Batch, view: View, options: SRPOConfig, *, share_prefixes: bool = False
) -> Float[Tensor, "batch new_time"]:
    """The log-prob, in nats, of each token of a view."""
    problems, token_ids, attention_mask = batch.problems, batch.token_ids, None
    if view.image == "corrupted":
        problems = replace(problems, images=corrupted_images(model, batch, options))
    if view.responses is not None:
        token_ids = view.responses.token_ids
        if options.counterfactual == "mask":  # else causality alone hides the padding
            attention_mask = view.responses.attention_mask
    if share_prefixes:
        _, of_prompt, counts = batch.group_ids.unique_consecutive(return_inverse=True, return_counts=True)
        prompts = problems.rows(counts.cumsum(0) - counts)  # the first response to each
        logits = model.continued(prompts.images, prompts.questions, token_ids, of_prompt, attention_mask)
        return token_log_probs(logits, token_ids)
    return log_probs_of(model, problems, token_ids, attention_mask)


def corrupted_images(model: TinyVLM, batch: Batch, options: SRPOConfig) -> Float[Tensor, "batch 3 height width"]:
    """The images with less to see in them, the same for all responses to a prompt."""
    if options.corruption == "other_image":  # also where a single group is live
        return batch.other_images
    return corrupt_images(
        batch.problems.images,
        prompt_ids=batch.group_ids,
        kind=options.corruption,
        amount=options.corruption_amount,
        patch_size=model.patch,
        seed=options.seed,
        step=batch.step,
    )


def new_log_probs(model: TinyVLM, batch: Batch, rows: Tensor) -> Float[Tensor, "rows time"]:
    """The log-prob, in nats, of each token of some responses under the model as it is now."""
    return log_probs_of(model, batch.problems.rows(rows), batch.token_ids[rows])


def last_hidden(model: TinyVLM, batch: Batch, rows: Tensor) -> Float[Tensor, "rows time width"]:
    """The hidden states from which the output layer makes those log-probs."""
    problems = batch.problems.rows(rows)
    embeddings = model.embed_words(batch.token_ids[rows], problems.questions.shape[1])
    return model.hidden(problems.images, problems.questions, embeddings)


def log_probs_of(
    model: TinyVLM,
    problems: Problems,
    token_ids: Int[Tensor, "batch time"],
    attention_mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time"]:
    """The log-prob, in nats, of each response token."""
    return token_log_probs(model(problems.images, problems.questions, token_ids, attention_mask), token_ids)


METHODS: dict[str, SRPO] = {"grpo": SRPO(SRPOConfig(strength=0.0)), "srpo": SRPO()}
