"""How far an inference engine's log-probs are from the trainer's own, and weights that correct for it."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.checked import Range, choose
from srpo_core.diagnostics import masked_quantiles
from srpo_core.masking import at_least_float32, log_ratio_of, masked_mean
from srpo_core.options import OutOfBounds, RatioLevel
from srpo_core.roles import role_masks
from srpo_core.surrogates import ratio_of
from srpo_core.typechecking import typechecked

__all__ = ["ENGINE_METRICS", "engine_gap", "engine_weights"]

#: What :func:`engine_gap` measures.
ENGINE_METRICS = ("engine/gap/mean", "engine/gap/p95", "engine/score/mean")

_ABSENT = float("nan")


@typechecked
def engine_gap(
    log_probs: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    scores: Float[Tensor, "batch time"],
    engine_log_probs: Float[Tensor, "batch time"],
) -> dict[str, Float[Tensor, ""]]:
    r"""Metrics of the gap between an inference engine's log-probs and the trainer's own, and of the scores beside it.

    .. math:: g_t = \lvert \log \pi_\text{trainer}(y_t) - \log \pi_\text{engine}(y_t) \rvert

    ``engine/gap/mean`` and ``engine/gap/p95`` are the mean and the 95th percentile of :math:`g_t` over response tokens,
    nats. ``engine/score/mean`` is the mean absolute score of perception and reasoning tokens, nats. Where the gap is
    the larger of the two, a contrast between a log-prob of the engine and one of the trainer would show the engines and
    not the image. There is no host sync; :func:`~srpo_core.batch.logged` leaves out what is NaN.

    Args:
        log_probs: Each sampled token by the trainer's own forward pass, nats.
        roles: What each token does, :class:`~srpo_core.Role`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        scores: Score of each token under its role, nats, as in :class:`~srpo_core.Credit`.
        engine_log_probs: The same tokens as the engine that sampled them reported them, nats, at the same temperature.
            NaN where the engine reported none: such a token has no part in the gap.

    Returns:
        Detached 0-d tensors, at least 0; NaN where there is no token to measure.

    Example:
        >>> from srpo_core.engine_gap import engine_gap
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.REASONING, Role.OTHER]])
        >>> metrics = engine_gap(torch.tensor([[-1.0, -2.0, -3.0]]), roles, roles >= 0,
        ...                      scores=torch.tensor([[0.2, -0.4, 0.0]]),
        ...                      engine_log_probs=torch.tensor([[-1.25, -1.5, -3.0]]))
        >>> metrics["engine/gap/mean"], metrics["engine/gap/p95"], metrics["engine/score/mean"]
        (tensor(0.2500), tensor(0.4750), tensor(0.3000))
    """
    dtype = at_least_float32(torch.promote_types(log_probs.dtype, engine_log_probs.dtype))
    own, engine = log_probs.detach().to(dtype), engine_log_probs.detach().to(dtype)
    known = mask & ~engine.isnan()
    gap = log_ratio_of(own, engine, known).abs()
    scored = role_masks(roles, mask).scored()
    return {
        "engine/gap/mean": masked_mean(gap, known, empty=_ABSENT),
        "engine/gap/p95": masked_quantiles(gap, {"gap": known})["gap/p95"],
        "engine/score/mean": masked_mean(scores.detach().abs(), scored, empty=_ABSENT),
    }


@typechecked
def engine_weights(
    old_log_probs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    engine_log_probs: Float[Tensor, "batch time"],
    level: RatioLevel = "token",
    out_of_bounds: OutOfBounds = "truncate",
    low: float = 0.0,
    high: float = 2.0,
) -> Float[Tensor, "batch time"]:
    r"""Importance weights that correct for sampling with an inference engine instead of the trainer's own policy.

    .. math:: c_t = \frac{\pi_\text{old}(y_t)}{\pi_\text{engine}(y_t)} \text{ (token)}, \qquad
        c_t = \prod_j \frac{\pi_\text{old}(y_j)}{\pi_\text{engine}(y_j)} \text{ (sequence)}

    Both policies stay fixed over the epochs of a rollout batch, so this is computed once. Multiply the token advantages
    by the result: a weighted advantage is a weighted loss, in every loss and every trainer that takes token advantages.
    ``gspo``, which refuses advantages that differ inside a response, takes the weights of a sequence only.

    Args:
        old_log_probs: Each sampled token by the trainer's own forward pass before the first update, nats.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        engine_log_probs: The same tokens as the engine that sampled them reported them, nats, at the same temperature.
            NaN where the engine reported none: such a token counts as one on which both agree.
        level: One weight per token, which is biased but varies little, or the product over the response, which is
            unbiased but varies more the longer the response is. A product saturates at :math:`e^{\pm 20}`.
        out_of_bounds: What becomes of a weight below `low` or above `high`: it is set to the bound, or to 0, so that
            the token, or the response, is not trained.
        low: The smallest weight, at least 0.
        high: The largest weight, above 0 and at least `low`.

    Returns:
        Detached weights, at least 0; 0 at padding.

    Raises:
        ValueError: If `level` or `out_of_bounds` is unknown, or a bound is out of range.

    Example:
        >>> from srpo_core.engine_gap import engine_weights
        >>> old, mask = torch.tensor([[-1.0, -1.0, -3.0]]), torch.tensor([[True, True, True]])
        >>> engine = torch.tensor([[-1.0, -2.0, -2.0]])
        >>> engine_weights(old, mask, engine_log_probs=engine)
        tensor([[1.0000, 2.0000, 0.3679]])
        >>> engine_weights(old, mask, engine_log_probs=engine, level="sequence")
        tensor([[1., 1., 1.]])

    References:
        Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; `out_of_bounds`
        ``mask``: IcePop, arXiv:2510.18855.
    """
    Range(at_least=0.0).check("low", low)
    Range(above=0.0).check("high", high)
    if low > high:
        raise ValueError(f"low must be at most high {high}, got {low}")
    of_sequence = choose("level", level, {"token": False, "sequence": True})
    is_masked = choose("out_of_bounds", out_of_bounds, {"truncate": False, "mask": True})
    known = mask & ~engine_log_probs.isnan()
    log_ratio = log_ratio_of(old_log_probs.detach(), engine_log_probs.detach(), known)
    if of_sequence:
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    weights = ratio_of(log_ratio)
    # A NaN is neither below nor above a bound: it stays, and shows in the loss.
    held = torch.where((weights < low) | (weights > high), 0.0, weights) if is_masked else weights.clamp(low, high)
    return torch.where(mask, held, 0.0)
