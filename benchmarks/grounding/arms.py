"""The arms of the study: every way of giving tokens credit that is compared, as a method of the trainer."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Generator, Tensor

from benchmarks.grounding.model import TinyVLM
from benchmarks.grounding.published import (
    entropy_mask,
    papo_penalty,
    pgpo_weights,
    rlsd_weights,
    vppo_weights,
)
from benchmarks.grounding.train import (
    SRPO,
    Batch,
    Method,
    corrupted_images,
    log_probs_of,
    new_log_probs,
    plan_views,
    score,
)
from benchmarks.grounding.world import A_OPEN, PAD, ZERO, evidence
from srpo_core import (
    CreditOptions,
    LossOutput,
    Role,
    SRPOConfig,
    counterfactual_responses,
    grpo_loss,
    perception_consistency,
    role_advantages,
    shared_baseline_weights,
    token_divergence,
    token_log_probs,
    visual_dependency,
)
from srpo_core.batch import View
from srpo_core.diagnostics import interference
from srpo_core.log_probs import token_entropy
from srpo_core.options import CorruptionKind, CounterfactualKind
from srpo_core.reliance import apply_reliance, gradient_reliance, perception_spans, span_reliance
from srpo_core.roles import role_masks


@dataclass(frozen=True)
class Weighted:
    """GRPO with the token weights that a subclass makes of a batch: positive, or 0 to leave a token out."""

    def weights(self, model: TinyVLM, batch: Batch) -> Tensor:
        raise NotImplementedError

    def __call__(self, model: TinyVLM, batch: Batch) -> Callable[[Tensor], LossOutput]:
        advantages = role_advantages(self.weights(model, batch), batch.advantages, batch.mask)

        def loss_of(rows: Tensor) -> LossOutput:
            return grpo_loss(
                new_log_probs(model, batch, rows),
                advantages[rows],
                batch.mask[rows],
                old_log_probs=batch.old_log_probs[rows],
                normalizer=batch.normalizer,
            )

        return loss_of


@dataclass(frozen=True)
class Scored(Weighted):
    """The family that SRPO belongs to: a contrast of images, one of perceptions, perhaps reliance, a shared baseline.

    Attributes:
        image: What is done to the image; None: perception scores are 0.
        perception: What is done to the perception; None: reasoning scores are 0.
        score: Contrast of the sampled token, or the KL of the two full distributions.
        answer: Whether the answer block is scored; else its tokens have weight 1.
        spans: Into how many spans a perception is cut, whose tokens then share their mean image score; 0: none.
        screened: Whether what follows the reasoning's copies of the perception is scored after other copies too: once
            the reasoning has repeated the counts, replacing the perception alone changes nothing.
        reliance: Whether the image score of a perception token is multiplied by the token's reliance (``product``) or
            only shared out in proportion to it (``share``); by gradient or, ``span_``, by leaving spans out.
        options: Of the weights.
    """

    image: CorruptionKind | None = "patch_mask"
    perception: CounterfactualKind | None = "swap"
    score: Literal["log_ratio", "full_kl"] = "log_ratio"
    answer: bool = True
    spans: int = 0
    screened: bool = False
    reliance: Literal["none", "product", "share", "span_product", "span_share"] = "none"
    options: CreditOptions = field(default_factory=CreditOptions)

    def weights(self, model: TinyVLM, batch: Batch) -> Tensor:
        roles, mask = batch.segmentation.roles, batch.mask
        if not self.answer:
            roles = torch.where((batch.token_ids == A_OPEN).cumsum(1) > 0, int(Role.OTHER), roles)
        visual = consistency = torch.zeros_like(batch.old_log_probs)
        if self.image is not None:
            if self.score == "full_kl":
                images = corrupted_images(model, batch, SRPOConfig(corruption=self.image))
                visual = token_divergence(old_logits(model, batch), other_logits=old_logits(model, batch, images))
            else:
                corrupted = with_corrupted_image(model, batch, self.image)
                visual = visual_dependency(batch.old_log_probs, roles, mask, corrupted_log_probs=corrupted)
        if self.perception is not None:
            replaced = with_other_perception(model, batch, self.perception)
            if self.screened:
                replaced = torch.where(*with_other_copies(model, batch), replaced)
            consistency = perception_consistency(batch.old_log_probs, roles, mask, counterfactual_log_probs=replaced)
        if self.spans:
            visual = mean_of_spans(visual, perception_spans(roles, mask, spans=self.spans))
        # A divergence is there for every token, and counts for those of the perception.
        scores = torch.where(roles == int(Role.PERCEPTION), visual, consistency)
        if self.reliance != "none":
            reliance_of = span_reliance_of if self.reliance.startswith("span") else gradient_reliance_of
            mode = "share" if self.reliance.endswith("share") else "product"
            scores = apply_reliance(scores, roles, mask, reliance=reliance_of(model, batch), mode=mode)
        return shared_baseline_weights(scores, roles, mask, self.options, advantages=batch.advantages)


@dataclass(frozen=True)
class RelianceAlone(Weighted):
    """No contrast of contexts at all: perception tokens are weighted in proportion to their reliance, all others by 1.

    Attributes:
        bound: Greatest weight, and 1 over the least, before they are brought to mean one.
        spans: Whether reliance is found by leaving spans out instead of by a gradient.
    """

    bound: float = 8.0
    spans: bool = False

    def weights(self, model: TinyVLM, batch: Batch) -> Tensor:
        reliance_of = span_reliance_of if self.spans else gradient_reliance_of
        return in_proportion(reliance_of(model, batch), batch, self.bound)


@dataclass(frozen=True)
class RightAgainstWrong(Weighted):
    """No other context at all: the weight of a perception token is by how much the mean advantage of its group differs
    between the responses that say the same there and those that say something else. To depend on the image is not yet
    to be right about it; this asks for the latter."""

    bound: float = 8.0

    def weights(self, model: TinyVLM, batch: Batch) -> Tensor:
        ids, mask = batch.token_ids, batch.mask
        mates = (batch.group_ids[:, None] == batch.group_ids)[:, :, None] & mask[:, None] & mask  # row, mate, time
        same = ids[:, None] == ids
        said, else_said = (
            (side * batch.advantages[:, None]).sum(1) / side.sum(1).clamp(min=1)
            for side in (mates & same, mates & ~same)
        )
        gap = torch.where((mates & ~same).any(1), (said - else_said).abs(), 0.0)
        perceived = role_masks(batch.segmentation.roles, mask).perception
        mean = (gap * perceived).sum(1, keepdim=True) / perceived.sum(1, keepdim=True).clamp(min=1)
        return in_proportion(torch.where(mean > 0, gap / mean, 1.0), batch, self.bound)


def in_proportion(values: Tensor, batch: Batch, bound: float) -> Tensor:
    """Weights of the perception in proportion to values around 1, with mean one; every other token has weight 1."""
    perceived = role_masks(batch.segmentation.roles, batch.mask).perception
    weights = torch.where(perceived, values.clamp(1 / bound, bound), 1.0)
    mean = (weights * perceived).sum(1, keepdim=True) / perceived.sum(1, keepdim=True).clamp(min=1)
    return torch.where(perceived & (mean > 0), weights / mean, 1.0) * batch.mask


@dataclass(frozen=True)
class Oracle(Weighted):
    """Knows which tokens carry the answer, as no method can: how much is there to be gained?"""

    high: float = 8.0
    low: float = 0.05
    perception_only: bool = False

    def weights(self, model: TinyVLM, batch: Batch) -> Tensor:
        masks = role_masks(batch.segmentation.roles, batch.mask)
        scored = masks.perception if self.perception_only else masks.scored()
        carrying = evidence(batch.token_ids, batch.problems)
        weights = torch.where(carrying, self.high, self.low)
        mean = (weights * scored).sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)
        return torch.where(scored, weights / mean, 1.0) * batch.mask


@dataclass(frozen=True)
class Placebo(Weighted):
    """The weights of another arm, shuffled among the perception and reasoning tokens of each response."""

    of: Weighted

    def weights(self, model: TinyVLM, batch: Batch) -> Tensor:
        weights = self.of.weights(model, batch)
        scored = role_masks(batch.segmentation.roles, batch.mask).scored()
        shuffled = weights.clone()
        generator = Generator().manual_seed(batch.step)
        for row, places in enumerate(scored):
            where = places.nonzero()[:, 0]
            shuffled[row, where] = weights[row, where[torch.randperm(len(where), generator=generator)]]
        return shuffled


@dataclass(frozen=True)
class EntropyTokens(Weighted):
    """80/20: only the fifth of the tokens with the highest entropy learns."""

    def weights(self, model: TinyVLM, batch: Batch) -> Tensor:
        entropy = token_entropy(old_logits(model, batch))
        return entropy_mask(entropy, batch.mask).to(entropy.dtype)


@dataclass(frozen=True)
class VPPO(Weighted):
    def weights(self, model: TinyVLM, batch: Batch) -> Tensor:
        return vppo_weights(
            batch.old_log_probs, batch.advantages, batch.mask, corrupted_log_probs=with_corrupted_image(model, batch)
        )


@dataclass(frozen=True)
class PGPO(Weighted):
    def weights(self, model: TinyVLM, batch: Batch) -> Tensor:
        return pgpo_weights(batch.old_log_probs, batch.mask, corrupted_log_probs=with_corrupted_image(model, batch))


@dataclass(frozen=True)
class RLSD(Weighted):
    """RLSD's teacher is the policy that was told the answer. Here it is the one that sees the image, and the student is
    the one that sees it corrupted."""

    def weights(self, model: TinyVLM, batch: Batch) -> Tensor:
        corrupted = with_corrupted_image(model, batch)
        return rlsd_weights(corrupted, batch.advantages, batch.mask, teacher_log_probs=batch.old_log_probs)


@dataclass(frozen=True)
class PAPO:
    """GRPO, and in the loss a reward for telling the image from a corrupted one."""

    def __call__(self, model: TinyVLM, batch: Batch) -> Callable[[Tensor], LossOutput]:
        seen = replace(batch.problems, images=corrupted_images(model, batch, SRPOConfig()))
        advantages = batch.advantages[:, None].expand_as(batch.old_log_probs)

        def loss_of(rows: Tensor) -> LossOutput:
            token_ids, mask = batch.token_ids[rows], batch.mask[rows]
            logits, corrupted_logits = (
                model(problems.images, problems.questions, token_ids)
                for problems in (batch.problems.rows(rows), seen.rows(rows))
            )
            log_probs = token_log_probs(logits, token_ids)
            loss, metrics = grpo_loss(
                log_probs,
                advantages[rows],
                mask,
                old_log_probs=batch.old_log_probs[rows],
                normalizer=batch.normalizer,
            )
            penalty = papo_penalty(
                log_probs,
                mask,
                corrupted_log_probs=token_log_probs(corrupted_logits, token_ids),
                entropy=token_entropy(logits),
                corrupted_entropy=token_entropy(corrupted_logits),
                normalizer=batch.normalizer,
            )
            return LossOutput(loss + penalty, metrics)

        return loss_of


@torch.no_grad()
def old_logits(model: TinyVLM, batch: Batch, images: Tensor | None = None) -> Tensor:
    problems = batch.problems
    return model(problems.images if images is None else images, problems.questions, batch.token_ids)


def with_corrupted_image(model: TinyVLM, batch: Batch, kind: CorruptionKind = "patch_mask") -> Tensor:
    """The log-prob, in nats, of each response token, had the image been corrupted."""
    return score(model, batch, View("corrupted", "corrupted", None), SRPOConfig(corruption=kind))


def with_other_perception(model: TinyVLM, batch: Batch, kind: CounterfactualKind = "swap") -> Tensor:
    """The log-prob, in nats, of each response token, had the model perceived something else."""
    options = SRPOConfig(counterfactual=kind)
    other = plan_views(batch, options).counterfactual
    scored = score(model, batch, View("counterfactual", "original", other), options)
    return other.carry_back(scored, original_log_probs=batch.old_log_probs)


def gradient_reliance_of(model: TinyVLM, batch: Batch) -> Tensor:
    """The reliance of each perception token, by one forward and one backward pass down to the embeddings."""
    problems = batch.problems
    with torch.enable_grad():
        embeddings = model.embed_words(batch.token_ids, problems.questions.shape[1]).detach().requires_grad_()
        logits = model.head(model.hidden(problems.images, problems.questions, embeddings))
        log_probs = token_log_probs(logits, batch.token_ids)
    return gradient_reliance(log_probs, embeddings, batch.segmentation.roles, batch.mask)


@torch.no_grad()
def span_reliance_of(model: TinyVLM, batch: Batch, spans: int = 8) -> Tensor:
    """The reliance of each perception token, by hiding one span of the perception after the other."""
    roles, mask = batch.segmentation.roles, batch.mask
    numbers = perception_spans(roles, mask, spans=spans)
    without = []
    for span in range(spans):
        hidden = torch.where(numbers == span, int(Role.PERCEPTION), torch.where(numbers >= 0, int(Role.OTHER), roles))
        other = counterfactual_responses(
            batch.token_ids, hidden, mask, kind="mask", boundary=batch.segmentation.boundary, pad_token_id=PAD
        )
        scored = log_probs_of(model, batch.problems, other.token_ids, other.attention_mask)
        without.append(other.carry_back(scored, original_log_probs=batch.old_log_probs))
    return span_reliance(batch.old_log_probs, roles, mask, without_log_probs=torch.stack(without), spans=numbers)


def mean_of_spans(scores: Tensor, spans: Tensor) -> Tensor:
    """The mean score of the span (-1: none) that each token belongs to."""
    number, inside = spans.clamp(min=0), (spans >= 0).to(scores.dtype)
    width = int(spans.max()) + 1 if spans.numel() else 0
    sums, counts = (
        torch.zeros(len(scores), max(width, 1)).scatter_add(1, number, part) for part in (scores * inside, inside)
    )
    return torch.where(spans >= 0, (sums / counts.clamp(min=1)).gather(1, number), scores)


@torch.no_grad()
def with_other_copies(model: TinyVLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Which numbers follow the reasoning's copies of the two counts, and their log-prob, in nats, had all numbers of
    the perception and both copies been those of the response that lends its perception."""
    ids, roles = batch.token_ids, batch.segmentation.roles
    numbers = batch.mask & (ids >= ZERO) & (ids < ZERO + 10)
    reasoned = numbers & (roles == int(Role.REASONING))
    replaced = numbers & ((roles == int(Role.PERCEPTION)) | (reasoned & (reasoned.cumsum(1) <= 2)))
    donors = plan_views(batch, SRPOConfig()).counterfactual.donors
    # The n-th number of one response takes the place of the n-th of the other.
    order = torch.where(replaced, replaced.cumsum(1) - 1, ids.shape[1])
    listed = ids.new_zeros(len(ids), ids.shape[1] + 1).scatter(1, order, ids)[donors.clamp(min=0)]
    alike = (donors >= 0) & (replaced.sum(1) == replaced.sum(1)[donors.clamp(min=0)])
    swapped = torch.where(replaced & alike[:, None], listed.gather(1, order), ids)
    logits = model(batch.problems.images, batch.problems.questions, swapped)
    return reasoned & ~replaced & alike[:, None], token_log_probs(logits, ids)


SHARP = CreditOptions(bound=math.log(8.0))  # weights may differ by more than the default's factor of 16

# The names stand in published results, where reliance is still called use.
ARMS: dict[str, Method] = {
    "grpo": SRPO(SRPOConfig(strength=0.0)),
    "strength 0": Scored(options=CreditOptions(strength=0.0)),
    "srpo": Scored(),
    "srpo, perception only": Scored(perception=None, options=CreditOptions(baseline="per_role")),
    "srpo, reasoning only": Scored(image=None, options=CreditOptions(baseline="per_role")),
    "srpo, other image": Scored(image="other_image"),
    "srpo, full KL": Scored(image="other_image", score="full_kl"),
    "srpo, full KL, sharp": Scored(image="other_image", score="full_kl", options=SHARP),
    "srpo, shuffled patches": Scored(image="patch_shuffle"),
    "srpo, answer apart": Scored(answer=False),
    "srpo, screened": Scored(image="other_image", screened=True),
    "srpo, span scores": Scored(image="other_image", score="full_kl", spans=8),
    "srpo, per-role baseline": Scored(options=CreditOptions(baseline="per_role")),
    "srpo, sign": Scored(options=CreditOptions(sign="advantage")),
    "srpo x use": Scored(image="other_image", score="full_kl", reliance="product", options=SHARP),
    "srpo shared by use": Scored(image="other_image", score="full_kl", reliance="share", options=SHARP),
    "srpo x span use": Scored(image="other_image", score="full_kl", reliance="span_product", options=SHARP),
    "srpo, use_spans": Scored(reliance="span_product"),
    "srpo, use_spans, sharp": Scored(reliance="span_product", options=SHARP),
    "use": RelianceAlone(),
    "span use": RelianceAlone(spans=True),
    "right against wrong": RightAgainstWrong(),
    "placebo of use": Placebo(RelianceAlone()),
    "placebo of span use": Placebo(RelianceAlone(spans=True)),
    "placebo of srpo": Placebo(Scored()),
    "placebo of srpo x use": Placebo(Scored(image="other_image", score="full_kl", reliance="product", options=SHARP)),
    "oracle": Oracle(),
    "oracle, perception": Oracle(perception_only=True),
    "papo": PAPO(),
    "vppo": VPPO(),
    "pgpo": PGPO(),
    "rlsd": RLSD(),
    "80/20": EntropyTokens(),
}


def virtual_step(model: TinyVLM, batch: Batch, tokens: Tensor, *, learning_rate: float = 1e-2) -> Tensor:
    """How far each next-token distribution moves, in nats, by a gradient step on some of the tokens alone."""
    moved = copy.deepcopy(model)
    advantages = batch.advantages[:, None].expand_as(batch.old_log_probs)
    rows = torch.arange(len(batch.token_ids), device=model.device)
    loss, _ = grpo_loss(
        new_log_probs(moved, batch, rows),
        advantages,
        tokens & batch.mask,
        old_log_probs=batch.old_log_probs,
        normalizer=batch.normalizer,
    )
    gradients = torch.autograd.grad(loss, list(moved.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(moved.parameters(), gradients, strict=True):
            parameter -= learning_rate * gradient
    return token_divergence(old_logits(model, batch), other_logits=old_logits(moved, batch))


def interference_of(model: TinyVLM, batch: Batch, weights: Tensor) -> float:
    """How far a step on the tokens with a weight below 1 moves the perception, against one on those above 1."""
    down, up = (virtual_step(model, batch, tokens) for tokens in (weights < 1, weights > 1))
    roles, mask = batch.segmentation.roles, batch.mask
    return interference(weights, roles, mask, down_divergence=down, up_divergence=up).item()
