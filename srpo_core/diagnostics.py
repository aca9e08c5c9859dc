"""What the weights did, as a few named numbers that are cheap enough for every step."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core._masked import masked_max, masked_mean, masked_min
from srpo_core.roles import BrokenReason, Role
from srpo_core.typechecking import typechecked

__all__ = ["credit_metrics"]


@typechecked
def credit_metrics(
    weights: Float[Tensor, "batch time"],
    visual_dependency: Float[Tensor, "batch time"],
    perception_consistency: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    broken: Int[Tensor, " batch"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Detached 0-d metrics of one batch, under the names that every adapter logs. No host sync.

    ``weight/{perception,reasoning}/{mean,min,max,mass}``: mass is the share of all weight on real tokens that the
    role holds. ``score/{perception,reasoning}/mean``: nats. ``structured/fraction``: responses in which some token
    has a role that is weighted. With `broken`: ``broken/fraction``, and ``broken/<reason>`` for each reason. Without
    tokens of a role its weights are reported as 1, its mass and score as 0.

    Args:
        weights: From :func:`~srpo_core.shared_baseline_weights`.
        visual_dependency: Scores, nats.
        perception_consistency: Scores, nats.
        roles: What each token does.
        mask: True at response tokens.
        broken: Why each response is malformed, :class:`~srpo_core.BrokenReason`.

    Example:
        >>> ones, roles = torch.ones(1, 2), torch.tensor([[Role.PERCEPTION, Role.REASONING]])
        >>> credit_metrics(ones, ones, ones, roles, ones.bool())["weight/perception/mass"]
        tensor(0.5000)
    """
    weights = weights.detach()
    metrics: dict[str, Tensor] = {}
    total = torch.where(mask, weights, 0.0).sum().clamp(min=torch.finfo(weights.dtype).tiny)
    scored = torch.zeros_like(mask)
    for role, scores in ((Role.PERCEPTION, visual_dependency), (Role.REASONING, perception_consistency)):
        where = mask & (roles == int(role))
        scored = scored | where
        name = role.name.lower()
        metrics[f"weight/{name}/mean"] = masked_mean(weights, where, empty=1.0)
        metrics[f"weight/{name}/min"] = masked_min(weights, where, empty=1.0)
        metrics[f"weight/{name}/max"] = masked_max(weights, where, empty=1.0)
        metrics[f"weight/{name}/mass"] = torch.where(where, weights, 0.0).sum() / total
        metrics[f"score/{name}/mean"] = masked_mean(scores.detach(), where)
    real = mask.any(1)
    metrics["structured/fraction"] = masked_mean(scored.any(1).to(weights.dtype), real)
    if broken is not None:
        metrics["broken/fraction"] = masked_mean((broken != int(BrokenReason.NONE)).to(weights.dtype), real)
        for reason in BrokenReason:
            if reason is not BrokenReason.NONE:
                metrics[f"broken/{reason.name.lower()}"] = masked_mean((broken == int(reason)).to(weights.dtype), real)
    return metrics
