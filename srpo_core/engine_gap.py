"""How far an inference engine's log-probs are from the trainer's own, beside the contrasts that are measured."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.diagnostics import masked_quantiles
from srpo_core.masking import at_least_float32, log_ratio_of, masked_mean
from srpo_core.roles import role_masks
from srpo_core.typechecking import typechecked

__all__ = ["ENGINE_METRICS", "engine_gap"]

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
