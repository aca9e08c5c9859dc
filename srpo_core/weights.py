"""Scores of both roles -> positive token weights over one baseline that a trajectory's tokens share."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.checked import choose
from srpo_core.masking import at_least_float32, check_no_nan, masked_mean, saturated
from srpo_core.options import MAX_EXPONENT, CreditOptions
from srpo_core.roles import RoleMasks, check_roles, role_masks
from srpo_core.typechecking import typechecked

__all__ = ["RoleScales", "ScaleState", "role_scales", "shared_baseline_weights"]


class RoleScales(NamedTuple):
    """The typical size, in nats, of each role's scores: the :math:`\\tau_P` and :math:`\\tau_R` of the weights."""

    visual: Float[Tensor, ""]
    consistency: Float[Tensor, ""]


class ScaleState(NamedTuple):
    """Running sums behind `role_scales`: plain tensors to put into a checkpoint (``state._asdict()``)."""

    visual_square: Float[Tensor, ""]
    visual_total: Float[Tensor, ""]
    consistency_square: Float[Tensor, ""]
    consistency_total: Float[Tensor, ""]


def _no_nan_among_scores(arguments: Mapping[str, Any]) -> None:
    check_no_nan("scores", arguments["scores"], role_masks(arguments["roles"], arguments["mask"]).scored())


@typechecked(values=(check_roles, _no_nan_among_scores))
def shared_baseline_weights(
    scores: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    options: CreditOptions = CreditOptions(),
    *,
    scales: RoleScales | None = None,
    advantages: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch time"]:
    r"""Positive weight of each token: 1 on average over a trajectory's perception and reasoning tokens.

    With :math:`S` the perception and reasoning tokens of one trajectory and :math:`\tau` the scale of a token's role:

    .. math::
        u_t = s_t / \tau, \qquad b = \operatorname{mean}_{S} u, \qquad
        v_t = \exp\bigl(\alpha \kappa \tanh((u_t - b) / \kappa)\bigr), \qquad
        w_t = v_t / \operatorname{mean}_{S} v

    so :math:`v \in [e^{-\alpha\kappa}, e^{\alpha\kappa}]` and :math:`w \in [e^{-2\alpha\kappa}, e^{2\alpha\kappa}]`:
    [1/2, 2] and [1/4, 4] by default. Other tokens have weight exactly 1 and padding 0. A trajectory with fewer than two
    tokens in :math:`S` keeps weight 1. The bound acts before the exponential, because a bare exponential that is
    renormalized to mean one cancels any baseline.

    Of the options this reads `strength` :math:`\alpha`, `bound` :math:`\kappa`, `visual_scale` :math:`\tau_P` and
    `consistency_scale` :math:`\tau_R` (unless `scales` is given), `mix` :math:`\lambda`, which returns
    :math:`1 + \lambda (w - 1)`, and these:

    - `baseline`: the mean over all tokens of :math:`S` (``token``), the mean of the two role means
      (``role_balanced``), each role's own mean (``per_role``), the ``median``, or nothing (``none``). Or a function of
      the scores [batch, time] and of the :class:`~srpo_core.roles.RoleMasks` that returns what to subtract,
      [batch, 1] or [batch, time].
    - `weight_map`: from the centered score :math:`x` to :math:`v`: ``exp_tanh`` (above), ``exp_clip``
      :math:`\exp(\alpha \operatorname{clip}(x, \pm\kappa))`, ``one_plus_tanh``
      :math:`1 + (1 - e^{-\kappa}) \tanh(\alpha x)`, ``sigmoid`` :math:`2\sigma(\alpha x)`, ``softplus``
      :math:`\log(1 + e^{\alpha x}) / \log 2`, ``softmax`` :math:`|S| \operatorname{softmax}_S(\alpha x)`. The
      last three have no useful lower bound. Or a function of the centered scores, the mask of :math:`S` and
      :math:`\alpha` that returns positive values, exactly 1 where :math:`\alpha` is 0.
    - `renormalization`: to mean 1 over the ``trajectory``, over each role of it (``per_role``), or ``none``.
    - `sign`: ``advantage`` multiplies the centered score by the sign of the advantage, so that a wrong answer's
      supported tokens are pushed down less.

    Args:
        scores: Score of each token under its role, nats: ``visual_dependency(...) + perception_consistency(...)``,
            each of which is 0 where the other one is not. An infinite one counts as 20 nats.
        roles: The role of each token, :class:`~srpo_core.Role`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        options: See above. At `strength` 0 every weight is exactly 1: GRPO.
        scales: Measured scales, from :func:`role_scales`. None: those of the options.
        advantages: One per trajectory; needed and read only by `sign` ``advantage``.

    Returns:
        Detached weights in float32, or float64 if the scores are.

    Raises:
        ValueError: If `advantages` is missing; outside ``torch.compile`` also if a role is outside the enum or the
            score of a perception or reasoning token is NaN, for which the tensors are read on the host.

    Example:
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING, Role.OTHER]])
        >>> shared_baseline_weights(torch.tensor([[2.0, 0.0, 0.0, 0.0]]), roles, torch.ones(1, 4, dtype=torch.bool))
        tensor([[1.8585, 0.5707, 0.5707, 1.0000]])

    References:
        The idea of one shared baseline and positive weights: SRPO, arXiv:2605.07274, abstract. Map, bound,
        renormalization and every default are this project's choices.
    """
    masks = role_masks(roles, mask)
    perception, reasoning = masks
    visual_scale, consistency_scale = (options.visual_scale, options.consistency_scale) if scales is None else scales
    scores = saturated(scores.detach().to(at_least_float32(scores.dtype)))
    scores = torch.where(perception, scores / visual_scale, torch.where(reasoning, scores / consistency_scale, 0.0))

    centered = scores - _chosen("baseline", options.baseline, _BASELINES)(scores, masks)
    if options.sign == "advantage":
        if advantages is None:
            raise ValueError("advantages is None; sign='advantage' needs one advantage per trajectory")
        centered = centered * advantages.detach().to(centered.dtype).sign()[:, None]
    # A lone token has nothing to be compared with and keeps weight 1, whatever the baseline.
    scored = masks.scored()
    comparable = scored & (scored.sum(1, keepdim=True) >= 2)
    to_positive = _chosen("weight_map", options.weight_map, _WEIGHT_MAPS)
    parameters = {name: getattr(options, name) for name in _parameters_of(options.weight_map)}
    values = torch.where(comparable, to_positive(centered, scored, options.strength, **parameters), 1.0)
    weights = torch.where(
        comparable, choose("renormalization", options.renormalization, _RENORMALIZATIONS)(values, masks), 1.0
    )
    # Not (1 - mix) + mix * w: a weight of 1 must stay exactly 1, and at a full mix every weight as it is. `mix` enters
    # by a product with a tensor, which torch.compile can leave open: a branch on it would make a graph for each value.
    mix = options.mix * torch.ones_like(weights)
    weights = torch.where(mix == 1.0, weights, 1.0 + mix * (weights - 1.0))
    return torch.where(mask, weights, 0.0)


def _parameters_of(weight_map: str | Callable[..., Tensor]) -> tuple[str, ...]:
    """The options that a map reads; a function of the user reads none."""
    return _PARAMETERS[weight_map] if isinstance(weight_map, str) else ()


def _chosen(argument: str, choice: str | Callable[..., Tensor], functions: Mapping[str, Callable[..., Tensor]]) -> Any:
    return choose(argument, choice, functions) if isinstance(choice, str) else choice


@typechecked
def role_scales(
    scores: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    state: ScaleState | None = None,
    decay: float = 0.0,
    floor: float = 0.05,
) -> tuple[RoleScales, ScaleState]:
    r"""Root mean square of each role's scores, over this batch or as a moving average, and the state for the next call.

    With `decay` 0 it is that of the batch (``batch_rms``). Otherwise (``ema_rms``) the mean square is
    :math:`m \leftarrow d\,m + (1 - d)\,\overline{s^2}`, corrected for its start at 0. A role that is absent from a
    batch does not change its average. Pass whole rollout batches, because with micro-batches the weights would depend
    on how the batch was cut. Each process measures its own batch; average `state` over ranks where they must agree.

    Args:
        scores: Score of each token under its role, nats. An infinite one counts as 20 nats, and one beyond 1e15 as
            1e15, because the mean of larger squares would overflow.
        roles: The role of each token, :class:`~srpo_core.Role`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        state: What the last call returned, or None at the start.
        decay: :math:`d` in [0, 1).
        floor: The smallest scale, nats, above 0. Without it, a batch of pure noise would be scaled up to unit size. A
            role that was never seen has scale 1.

    Raises:
        ValueError: If `decay` or `floor` is out of range.

    Example:
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.REASONING]])
        >>> scores = torch.tensor([[3.0, 0.5]])
        >>> role_scales(scores, roles, torch.tensor([[True, True]]))[0]
        RoleScales(visual=tensor(3.), consistency=tensor(0.5000))
    """
    _DECAY.check("decay", decay)
    if not floor > 0.0:
        raise ValueError(f"floor must be above 0 nats, got {floor}")
    if state is None:
        zero = scores.new_zeros((), dtype=at_least_float32(scores.dtype))
        state = ScaleState(zero, zero, zero, zero)

    def update(where: Tensor, square: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = where.any()
        bounded = saturated(scores.detach().to(square.dtype)).clamp(-_LARGEST_SCORE, _LARGEST_SCORE)
        batch_square = masked_mean(bounded.square(), where)
        square = torch.where(seen, decay * square + (1.0 - decay) * batch_square, square)
        total = torch.where(seen, decay * total + (1.0 - decay), total)
        scale = torch.where(total > 0, (square / total.clamp(min=1.0 - decay)).sqrt().clamp(min=floor), 1.0)
        return scale, square, total

    perception, reasoning = role_masks(roles, mask)
    visual, *visual_state = update(perception, state.visual_square, state.visual_total)
    consistency, *consistency_state = update(reasoning, state.consistency_square, state.consistency_total)
    return RoleScales(visual, consistency), ScaleState(*visual_state, *consistency_state)


_DECAY = CreditOptions.range_of("scale_decay")
_LARGEST_SCORE = 1e15


# Baselines: scores [batch, time] and the masks of the roles -> what to subtract, [batch, 1] or [batch, time].


def _token_mean(scores: Tensor, masks: RoleMasks) -> Tensor:
    return masked_mean(scores, masks.scored(), dim=1)[:, None]


def _per_role_mean(scores: Tensor, masks: RoleMasks) -> Tensor:
    of_perception, of_reasoning = (masked_mean(scores, where, dim=1)[:, None] for where in masks)
    return torch.where(masks.perception, of_perception, of_reasoning)


def _role_balanced_mean(scores: Tensor, masks: RoleMasks) -> Tensor:
    means = torch.stack([masked_mean(scores, where, dim=1) for where in masks])
    return masked_mean(means, torch.stack([where.any(1) for where in masks]), dim=0)[:, None]


def _median(scores: Tensor, masks: RoleMasks) -> Tensor:
    if scores.shape[1] == 0:
        return scores.new_zeros(len(scores), 1)
    ordered = torch.where(masks.scored(), scores, torch.inf).sort(dim=1).values
    last = masks.scored().sum(1, keepdim=True) - 1
    middle = [ordered.gather(1, index.clamp(min=0)) for index in (last // 2, (last + 1) // 2)]
    return torch.where(last >= 0, (middle[0] + middle[1]) / 2, 0.0)


def _no_baseline(scores: Tensor, masks: RoleMasks) -> Tensor:
    return torch.zeros_like(scores)


_BASELINES = {
    "token": _token_mean,
    "role_balanced": _role_balanced_mean,
    "per_role": _per_role_mean,
    "median": _median,
    "none": _no_baseline,
}


# Maps: centered score, mask of S, strength -> positive value, 1 at a centered score or a strength of 0. A keyword-only
# parameter is an option of that name.


def _exp_tanh(centered: Tensor, scored: Tensor, strength: float, *, bound: float) -> Tensor:
    return torch.exp(strength * bound * torch.tanh(centered / bound))


def _exp_clip(centered: Tensor, scored: Tensor, strength: float, *, bound: float) -> Tensor:
    return torch.exp(strength * centered.clamp(-bound, bound))


def _one_plus_tanh(centered: Tensor, scored: Tensor, strength: float, *, bound: float) -> Tensor:
    return 1.0 - math.expm1(-bound) * torch.tanh(strength * centered)


def _sigmoid(centered: Tensor, scored: Tensor, strength: float) -> Tensor:
    return 2.0 * torch.sigmoid(_exponent(strength * centered))


def _softplus(centered: Tensor, scored: Tensor, strength: float) -> Tensor:
    # At 0 softplus and log 2 agree only up to rounding; strength 0 must give exactly 1.
    value = F.softplus(_exponent(strength * centered), threshold=MAX_EXPONENT)
    return value / F.softplus(torch.zeros_like(value))


def _softmax(centered: Tensor, scored: Tensor, strength: float) -> Tensor:
    value = torch.exp(_exponent(strength * centered))
    return value / masked_mean(value, scored, dim=1, empty=1.0)[:, None]


def _exponent(value: Tensor) -> Tensor:
    """Kept where a float32 exponential is neither 0 nor infinite, so that weights stay positive and finite."""
    return value.clamp(-MAX_EXPONENT, MAX_EXPONENT)


_WEIGHT_MAPS = {
    "exp_tanh": _exp_tanh,
    "exp_clip": _exp_clip,
    "one_plus_tanh": _one_plus_tanh,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "softmax": _softmax,
}
# Read once, here: a compiled graph cannot inspect a signature.
_PARAMETERS = {
    name: tuple(
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    )
    for name, function in _WEIGHT_MAPS.items()
}


def _to_mean_one(values: Tensor, masks: RoleMasks) -> Tensor:
    return values / masked_mean(values, masks.scored(), dim=1, empty=1.0)[:, None]


def _to_mean_one_per_role(values: Tensor, masks: RoleMasks) -> Tensor:
    of_perception, of_reasoning = (masked_mean(values, where, dim=1, empty=1.0)[:, None] for where in masks)
    return values / torch.where(masks.perception, of_perception, of_reasoning)


def _as_they_are(values: Tensor, masks: RoleMasks) -> Tensor:
    return values


_RENORMALIZATIONS = {"trajectory": _to_mean_one, "per_role": _to_mean_one_per_role, "none": _as_they_are}
