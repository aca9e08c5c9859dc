"""What the weights did, as a few named numbers that are cheap enough for every step."""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.contrasts import contrast
from srpo_core.masking import at_least_float32, masked_max, masked_mean, masked_min
from srpo_core.options import CreditOptions
from srpo_core.roles import Role, role_masks
from srpo_core.tags import BrokenReason
from srpo_core.typechecking import typechecked

__all__ = [
    "INTERFERENCE_MATTERS",
    "QUANTILES",
    "ROLE_NAMES",
    "Answer",
    "credit_diagnostics",
    "credit_metrics",
    "interference",
]

#: The quantiles that are logged, in percent, by the last part of their name.
QUANTILES = {"p05": 5, "p50": 50, "p95": 95}

#: The roles that are weighted, by their name in a metric.
ROLE_NAMES = {Role.PERCEPTION: "perception", Role.REASONING: "reasoning"}

#: An answer is one or the other where it is known.
Answer = Literal["right", "wrong"]

# A tuple: older versions of torch.compile cannot iterate over the enum.
_REASONS = tuple(BrokenReason)
_SCORE_CLIP = CreditOptions.range_of("score_clip")
_ABSENT = float("nan")  # what nothing was measured of: neither 0 nor 1

#: Below this :func:`interference` there is nothing to be gained by weights: stay with GRPO. Above, there may be.
INTERFERENCE_MATTERS = 0.1


@typechecked
def credit_metrics(
    weights: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    scores: Float[Tensor, "batch time"],
    broken: Int[Tensor, " batch"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Detached 0-d metrics of one batch, under the names that every adapter logs. No host sync.

    ``weight/{perception,reasoning}/{mean,min,max,mass}``: mass is the share of all weight on real tokens that the
    role holds. ``score/{perception,reasoning}/mean``: nats. ``structured/fraction``: responses in which some token
    has a role that is weighted. With `broken`: ``broken/fraction``, and ``broken/<reason>`` for each reason. A metric
    of which the batch has nothing is NaN, such as the weights of a role without tokens;
    :func:`~srpo_core.batch.logged` leaves it out.

    Args:
        weights: From :func:`~srpo_core.shared_baseline_weights`.
        roles: What each token does.
        mask: True at response tokens.
        scores: Score of each token under its role, nats.
        broken: Why each response is malformed, :class:`~srpo_core.BrokenReason`.

    Example:
        >>> ones, roles = torch.ones(1, 2), torch.tensor([[Role.PERCEPTION, Role.REASONING]])
        >>> credit_metrics(ones, roles, ones.bool(), scores=ones)["weight/perception/mass"]
        tensor(0.5000)
    """
    weights = weights.detach().to(at_least_float32(weights.dtype))
    metrics: dict[str, Tensor] = {}
    total = torch.where(mask, weights, 0.0).sum().clamp(min=torch.finfo(weights.dtype).tiny)
    masks = role_masks(roles, mask)
    for name, where in zip(ROLE_NAMES.values(), masks, strict=True):
        metrics[f"weight/{name}/mean"] = masked_mean(weights, where, empty=_ABSENT)
        metrics[f"weight/{name}/min"] = masked_min(weights, where, empty=_ABSENT)
        metrics[f"weight/{name}/max"] = masked_max(weights, where, empty=_ABSENT)
        metrics[f"weight/{name}/mass"] = torch.where(
            mask.any(), torch.where(where, weights, 0.0).sum() / total, _ABSENT
        )
        metrics[f"score/{name}/mean"] = masked_mean(scores.detach(), where, empty=_ABSENT)
    real = mask.any(1)

    def share(of: Tensor) -> Tensor:
        return masked_mean(of.to(weights.dtype), real, empty=_ABSENT)

    metrics["structured/fraction"] = share(masks.scored().any(1))
    if broken is not None:
        metrics["broken/fraction"] = share(broken != int(BrokenReason.NONE))
        for reason in _REASONS:
            if reason is not BrokenReason.NONE:
                metrics[f"broken/{reason.name.lower()}"] = share(broken == int(reason))
    return metrics


@typechecked
def credit_diagnostics(
    weights: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    scores: Float[Tensor, "batch time"],
    broken: Int[Tensor, " batch"] | None = None,
    advantages: Float[Tensor, " batch"] | None = None,
    correct: Bool[Tensor, " batch"] | Int[Tensor, " batch"] | None = None,
    donors: Int[Tensor, " batch"] | None = None,
    log_probs: Float[Tensor, "batch time"] | None = None,
    repeated_log_probs: Float[Tensor, "batch time"] | None = None,
    score_clip: float | None = None,
) -> dict[str, Float[Tensor, ""]]:
    r"""All there is to log about a rollout batch: :func:`credit_metrics` and more. Detached 0-d tensors, no host sync.

    Each optional argument adds its own names; ``<role>`` is ``perception`` or ``reasoning``:

    ========================================== ==================================================================
    ``tokens/<role>/fraction``                 share of the real tokens; compare ``weight/<role>/mass``
    ``tokens/effective_fraction``              :math:`(\sum w)^2 / (n \sum w^2)` over the weighted tokens, in (0, 1]
    ``weight/<role>/{p05,p50,p95}``            quantiles
    ``score/<role>/{std,p05,p50,p95}``         nats
    ``score/<role>/clipped``                   share of scores at the clip (with `score_clip`)
    ``weight/<role>/{right,wrong}/...``        mean and quantiles for right and wrong answers (with `correct`)
    ``right/fraction``                         share of right answers (with `correct`)
    ``advantage/cosine``                       between weighted and unweighted token advantages (with `advantages`)
    ``noise/<role>/rms``                       nats, a score of two equal passes (with `repeated_log_probs`)
    ``noise/<role>/above``                     share of scores that exceed twice that
    ``swap/coverage``                          share of responses with both roles that found a donor (with `donors`)
    ========================================== ==================================================================

    A metric of which the batch has nothing is NaN; :func:`~srpo_core.batch.logged` leaves it out.

    Args:
        weights: From :func:`~srpo_core.shared_baseline_weights`.
        roles: What each token does.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        scores: Score of each token under its role, nats.
        broken: Why each response is malformed, :class:`~srpo_core.BrokenReason`.
        advantages: One per response.
        correct: Whether each answer is right: booleans, or 1, 0 and -1 for "not known".
        donors: From :func:`~srpo_core.counterfactual_responses`; -1: nobody's perception replaced this one.
        log_probs: Each token under its own context, nats; needed and read only with `repeated_log_probs`.
        repeated_log_probs: The same pass once more: what a contrast shows where nothing was changed.
        score_clip: The clip of the scores, nats, above 0.

    Raises:
        ValueError: If `score_clip` is not above 0, or `repeated_log_probs` comes without `log_probs`.

    Example:
        >>> weights = torch.tensor([[1.6, 0.8, 0.6, 1.0]])
        >>> scores = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING, Role.OTHER]])
        >>> metrics = credit_diagnostics(weights, roles, roles >= 0, scores=scores, advantages=torch.tensor([-1.0]))
        >>> metrics["weight/perception/p50"], metrics["tokens/effective_fraction"], metrics["advantage/cosine"]
        (tensor(1.2000), tensor(0.8427), tensor(0.9366))
    """
    if score_clip is not None:
        _SCORE_CLIP.check("score_clip", score_clip)
    if repeated_log_probs is not None and log_probs is None:
        raise ValueError("log_probs is None; repeated_log_probs needs the first pass to be compared with")
    metrics = credit_metrics(weights, roles, mask, scores=scores, broken=broken)

    dtype = torch.promote_types(at_least_float32(scores.dtype), weights.dtype)
    masks = role_masks(roles, mask)
    scored, where = masks.scored(), dict(zip(ROLE_NAMES.values(), masks, strict=True))
    weights = torch.where(mask, weights.detach().to(dtype), 0.0)
    scores = torch.where(scored, scores.detach().to(dtype), 0.0)

    scored_weights = torch.where(scored, weights, 0.0)
    square = scored_weights.square().sum() * scored.sum()
    metrics["tokens/effective_fraction"] = torch.where(square > 0, scored_weights.sum().square() / square, _ABSENT)

    subsets = {f"weight/{name}": tokens for name, tokens in where.items()}
    if correct is not None:
        right, wrong = correct == 1, correct == 0
        metrics["right/fraction"] = masked_mean(right.to(dtype), (right | wrong) & mask.any(1), empty=_ABSENT)
        for answer, rows in zip(get_args(Answer), (right, wrong), strict=True):
            for name, tokens in where.items():
                subsets[f"weight/{name}/{answer}"] = tokens & rows[:, None]
                metrics[f"weight/{name}/{answer}/mean"] = masked_mean(weights, tokens & rows[:, None], empty=_ABSENT)
    metrics |= masked_quantiles(weights, subsets)
    metrics |= masked_quantiles(scores, {f"score/{name}": tokens for name, tokens in where.items()})

    noise = None
    if log_probs is not None and repeated_log_probs is not None:
        # Clipped like a score: one token that both passes exclude, -inf twice, must not hide all others.
        noise = contrast(log_probs, repeated_log_probs, scored, kind="log_ratio", clip=score_clip or torch.inf)
    for name, tokens in where.items():
        metrics[f"tokens/{name}/fraction"] = masked_mean(tokens.to(dtype), mask, empty=_ABSENT)
        mean = masked_mean(scores, tokens)
        metrics[f"score/{name}/std"] = masked_mean((scores - mean).square(), tokens, empty=_ABSENT).sqrt()
        if score_clip is not None:
            clipped = (scores.abs() >= score_clip).to(dtype)
            metrics[f"score/{name}/clipped"] = masked_mean(clipped, tokens, empty=_ABSENT)
        if noise is not None:
            rms = masked_mean(noise.to(dtype).square(), tokens, empty=_ABSENT).sqrt()
            metrics[f"noise/{name}/rms"] = rms
            metrics[f"noise/{name}/above"] = masked_mean((scores.abs() > 2 * rms).to(dtype), tokens, empty=_ABSENT)
    if advantages is not None:
        squared = advantages.detach().to(dtype).square()
        plain, weighted, both = ((squared * part).sum() for part in _powers(weights, mask))
        norm = (plain * weighted).sqrt()
        metrics["advantage/cosine"] = torch.where(norm > 0, both / norm, _ABSENT)
    if donors is not None:
        swappable = where["perception"].any(1) & where["reasoning"].any(1)
        metrics["swap/coverage"] = masked_mean((donors >= 0).to(dtype), swappable, empty=_ABSENT)
    return metrics


@typechecked
def interference(
    weights: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    down_divergence: Float[Tensor, "batch time"],
    up_divergence: Float[Tensor, "batch time"],
) -> Float[Tensor, ""]:
    r"""How far learning from tokens of little weight moves the perception of much weight, relative to its own step.

    .. math:: I = \operatorname{mean}_E d^\downarrow / \operatorname{mean}_E d^\uparrow, \qquad
        E = \{t \in P : w_t > 1\}

    Weights take credit from tokens below 1. Where these share no circuit with the perception, their gradient does not
    move it, and nothing is gained by removing that gradient. In this project's pilots :math:`I` was at most 0.012 for
    filler words, where even oracle weights did not help, and 1.2 for readings that the question did not ask for, where
    they did. Below :data:`INTERFERENCE_MATTERS`, stay with GRPO. Those figures were taken with weights that know which
    tokens matter. A method's own weights leave some of these below 1 too, whose steps then count as interference:
    SRPO's gave 0.1 to 0.8 where an oracle's gave less than 0.001, so a large figure promises nothing.

    Take the two divergences once, on one rollout batch: copy the model, make one plain gradient step (no optimizer
    state, the same learning rate for both) on the unweighted GRPO loss of the tokens with a weight below 1 alone, and
    pass :func:`~srpo_core.token_divergence` between the logits before and after; then the same for those above 1.

    Args:
        weights: From :func:`~srpo_core.shared_baseline_weights`.
        roles: What each token does.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        down_divergence: Of each next-token distribution, nats, after the step on the tokens with a weight below 1.
        up_divergence: After the step on those above 1.

    Returns:
        A detached 0-d ratio that is at least 0. It is 0 where no perception token weighs more than 1, and infinite
        where only the step on the other tokens moved the perception.

    Example:
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING]])
        >>> interference(torch.tensor([[1.8, 0.6, 0.6]]), roles, roles >= 0,
        ...              down_divergence=torch.tensor([[0.01, 0.5, 0.5]]),
        ...              up_divergence=torch.tensor([[0.04, 0.1, 0.1]]))
        tensor(0.2500)

    References:
        None: a diagnostic of this project.
    """
    weighty = role_masks(roles, mask).perception & (weights.detach() > 1.0)
    down, up = (masked_mean(divergence.detach(), weighty) for divergence in (down_divergence, up_divergence))
    return torch.where(weighty.any() & (down > 0), down / up, 0.0)


def _powers(weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each response the tokens, the sum of squared weights and the sum of weights: all that a cosine needs."""
    return mask.sum(1).to(weights.dtype), weights.square().sum(1), weights.sum(1)


def masked_quantiles(values: Tensor, subsets: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantiles of `values` over each subset of its elements, linearly interpolated; one sort serves all subsets."""
    if values.numel() == 0:
        return {f"{name}/{quantile}": values.new_full((), _ABSENT) for name in subsets for quantile in QUANTILES}
    ordered, order = values.flatten().sort()
    # How many of a subset lie at or below each value: where this first reaches k is the subset's k-th least value.
    counts = torch.stack([subset.flatten()[order] for subset in subsets.values()]).cumsum(1)
    size = counts[:, -1:]
    metrics = {}
    for quantile, percent in QUANTILES.items():
        # In whole numbers: a float32 rank is wrong beyond 2^24 tokens, and devices may lack float64.
        rank = percent * (size - 1).clamp(min=0)
        below, fraction = rank // 100, (rank % 100).to(values.dtype) / 100
        low, high = (
            ordered[torch.searchsorted(counts, number).clamp(max=values.numel() - 1)]
            for number in (below + 1, torch.minimum(below + 2, size))
        )
        result = torch.where(size > 0, low + fraction * (high - low), _ABSENT)
        metrics |= {f"{name}/{quantile}": value for name, value in zip(subsets, result.squeeze(1), strict=True)}
    return metrics
