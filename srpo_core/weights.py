"""Scores of both roles to positive token weights over one baseline shared by the trajectory."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core._masked import at_least_float32, check_no_nan, check_roles, masked_mean
from srpo_core.roles import Role
from srpo_core.typechecking import choose, typechecked

__all__ = [
    "Baseline",
    "Renormalization",
    "RoleScales",
    "ScaleState",
    "Sign",
    "WeightMap",
    "mix_schedule",
    "role_scales",
    "shared_baseline_weights",
]

Baseline = Literal["token", "role_balanced", "per_role", "median", "none"]
WeightMap = Literal["exp_tanh", "exp_clip", "one_plus_tanh", "sigmoid", "softplus", "softmax"]
Renormalization = Literal["trajectory", "per_role", "none"]
Sign = Literal["symmetric", "advantage"]

# Beyond e^±40 a float32 weight, its square and its mean over a long response no longer all fit.
_MAX_EXPONENT = 40.0


@typechecked
def shared_baseline_weights(
    visual_dependency: Float[Tensor, "batch time"],
    perception_consistency: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    strength: float = 1.0,
    baseline: Baseline = "token",
    weight_map: WeightMap = "exp_tanh",
    renormalization: Renormalization = "trajectory",
    visual_scale: float | Float[Tensor, ""] = 1.0,
    consistency_scale: float | Float[Tensor, ""] = 1.0,
    bound: float = math.log(2.0),
    sign: Sign = "symmetric",
    advantages: Float[Tensor, " batch"] | None = None,
    mix: float = 1.0,
) -> Float[Tensor, "batch time"]:
    r"""Positive weight of each token: 1 on average over a trajectory's perception and reasoning tokens.

    With :math:`S` the perception and reasoning tokens of one trajectory and :math:`\tau` the scale of a token's role:

    .. math::
        u_t = s_t / \tau, \qquad b = \operatorname{mean}_{S} u, \qquad
        v_t = \exp\bigl(\alpha \kappa \tanh((u_t - b) / \kappa)\bigr), \qquad
        w_t = v_t / \operatorname{mean}_{S} v

    so :math:`v \in [e^{-\alpha\kappa}, e^{\alpha\kappa}]` and :math:`w \in [e^{-2\alpha\kappa}, e^{2\alpha\kappa}]`:
    [1/2, 2] and [1/4, 4] by default. Other tokens weigh exactly 1 and padding 0. A trajectory with fewer than two
    tokens in :math:`S` keeps weight 1. The bound acts before the exponential, for a bare exponential renormalised to
    mean one cancels any baseline.

    Args:
        visual_dependency: Score of each token, nats; read where the role is perception.
        perception_consistency: Score of each token, nats; read where the role is reasoning.
        roles: What each token does, :class:`~srpo_core.Role`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        strength: :math:`\alpha \ge 0`, with :math:`\alpha\kappa \le 40`. At 0 every weight is exactly 1: GRPO.
        baseline: What is subtracted: the mean over all tokens of :math:`S` (``token``), the mean of the two role
            means (``role_balanced``), each role's own mean (``per_role``), the ``median``, or nothing (``none``).
        weight_map: From the centred score :math:`x` to :math:`v`: ``exp_tanh`` (above), ``exp_clip``
            :math:`\exp(\alpha \operatorname{clip}(x, \pm\kappa))`, ``one_plus_tanh``
            :math:`1 + (1 - e^{-\kappa}) \tanh(\alpha x)`, ``sigmoid`` :math:`2\sigma(\alpha x)`, ``softplus``
            :math:`\log(1 + e^{\alpha x}) / \log 2`, ``softmax`` :math:`|S| \operatorname{softmax}_S(\alpha x)`. The
            last three have no useful lower bound.
        renormalization: To mean 1 over the ``trajectory``, over each role of it (``per_role``), or ``none``.
        visual_scale: :math:`\tau_P`, nats, above 0; :func:`role_scales` measures one.
        consistency_scale: :math:`\tau_R`, nats, above 0.
        bound: :math:`\kappa`, nats, above 0; read by the first three maps.
        sign: ``advantage`` multiplies the centred score by the advantage's sign, so that a wrong answer's supported
            tokens are pushed down less.
        advantages: One per trajectory; needed and read only by ``sign="advantage"``.
        mix: :math:`\lambda` in [0, 1]: :math:`1 + \lambda (w - 1)` is returned.

    Returns:
        Detached weights in float32, or float64 if the scores are.

    Raises:
        ValueError: If an option is unknown or out of range, a role is outside the enum, or a score that is read is
            NaN (eager mode; the tensors are read on the host).

    Example:
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING, Role.OTHER]])
        >>> shared_baseline_weights(torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.zeros(1, 4), roles,
        ...                         torch.ones(1, 4, dtype=torch.bool))
        tensor([[1.8585, 0.5707, 0.5707, 1.0000]])

    References:
        The idea of one shared baseline and positive weights: SRPO, arXiv:2605.07274, abstract. Map, bound,
        renormalisation and every default are this project's choices.
    """
    check_roles(roles, mask)
    check_no_nan("visual_dependency", visual_dependency, mask & (roles == int(Role.PERCEPTION)))
    check_no_nan("perception_consistency", perception_consistency, mask & (roles == int(Role.REASONING)))
    return weights_of_scores(
        visual_dependency,
        perception_consistency,
        roles,
        mask,
        strength=strength,
        baseline=baseline,
        weight_map=weight_map,
        renormalization=renormalization,
        visual_scale=visual_scale,
        consistency_scale=consistency_scale,
        bound=bound,
        sign=sign,
        advantages=advantages,
        mix=mix,
    )


def weights_of_scores(
    visual_dependency: Tensor,
    perception_consistency: Tensor,
    roles: Tensor,
    mask: Tensor,
    *,
    strength: float,
    baseline: str,
    weight_map: str,
    renormalization: str,
    visual_scale: float | Tensor,
    consistency_scale: float | Tensor,
    bound: float,
    sign: str,
    advantages: Tensor | None,
    mix: float,
) -> Tensor:
    """`shared_baseline_weights` without the checks of values, so without a host sync."""
    _check_ranges(strength, bound, visual_scale, consistency_scale, mix)
    center = choose("baseline", baseline, _BASELINES)
    to_positive = choose("weight_map", weight_map, _WEIGHT_MAPS)
    renormalize = choose("renormalization", renormalization, _RENORMALIZATIONS)
    signed = choose("sign", sign, {"symmetric": False, "advantage": True})

    perception, reasoning = mask & (roles == int(Role.PERCEPTION)), mask & (roles == int(Role.REASONING))
    scored = perception | reasoning
    dtype = at_least_float32(torch.promote_types(visual_dependency.dtype, perception_consistency.dtype))
    scores = torch.where(perception, visual_dependency.detach().to(dtype) / visual_scale, 0.0)
    scores = torch.where(reasoning, perception_consistency.detach().to(dtype) / consistency_scale, scores)

    centred = scores - center(scores, perception, reasoning)
    if signed:
        if advantages is None:
            raise ValueError("advantages is None; sign='advantage' needs one advantage per trajectory")
        centred = centred * advantages.detach().to(dtype).sign()[:, None]
    # A lone token has nothing to be compared with and keeps weight 1, whatever the baseline.
    comparable = scored & (scored.sum(1, keepdim=True) >= 2)
    values = torch.where(comparable, to_positive(centred, strength, bound, scored), 1.0)
    weights = torch.where(comparable, renormalize(values, perception, reasoning), 1.0)
    # 1 + mix * (w - 1), not (1 - mix) + mix * w: it leaves a weight of 1 exactly 1.
    weights = weights if mix == 1.0 else 1.0 + mix * (weights - 1.0)
    return torch.where(mask, weights, 0.0)


class RoleScales(NamedTuple):
    """Typical size, in nats, of each role's scores: the :math:`\\tau_P` and :math:`\\tau_R` of the weights."""

    visual: Float[Tensor, ""]
    consistency: Float[Tensor, ""]


class ScaleState(NamedTuple):
    """Running sums behind `role_scales`: plain tensors to put into a checkpoint (``state._asdict()``)."""

    visual_square: Float[Tensor, ""]
    visual_total: Float[Tensor, ""]
    consistency_square: Float[Tensor, ""]
    consistency_total: Float[Tensor, ""]


@typechecked
def role_scales(
    visual_dependency: Float[Tensor, "batch time"],
    perception_consistency: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    state: ScaleState | None = None,
    decay: float = 0.0,
    floor: float = 0.05,
) -> tuple[RoleScales, ScaleState]:
    r"""Root mean square of each role's scores, over this batch or as a moving average, and the state to go on from.

    With `decay` 0 it is the batch's own (``batch_rms``); else (``ema_rms``) the mean square is
    :math:`m \leftarrow d\,m + (1 - d)\,\overline{s^2}`, corrected for its start at 0; a role that is absent from a
    batch leaves its average alone. Pass whole rollout batches: a micro-batch would make weights depend on how the
    batch was cut. Each process measures its own batch; average `state` over ranks where they must agree.

    Args:
        visual_dependency: Scores, nats; read where the role is perception.
        perception_consistency: Scores, nats; read where the role is reasoning.
        roles: What each token does, :class:`~srpo_core.Role`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        state: What the last call returned, or None at the start.
        decay: :math:`d` in [0, 1).
        floor: Least scale, nats, above 0: without one, a batch of pure noise would be blown up to unit size. A role
            never seen has scale 1.

    Raises:
        ValueError: If `decay` or `floor` is out of range.

    Example:
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.REASONING]])
        >>> scores = torch.tensor([[3.0, 0.5]])
        >>> role_scales(scores, scores, roles, torch.tensor([[True, True]]))[0]
        RoleScales(visual=tensor(3.), consistency=tensor(0.5000))
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    if not floor > 0.0:
        raise ValueError(f"floor must be above 0 nats, got {floor}")
    if state is None:
        zero = visual_dependency.new_zeros((), dtype=at_least_float32(visual_dependency.dtype))
        state = ScaleState(zero, zero, zero, zero)

    def update(scores: Tensor, role: Role, square: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        where = mask & (roles == int(role))
        seen = where.any()
        batch_square = masked_mean(scores.detach().to(square.dtype).square(), where)
        square = torch.where(seen, decay * square + (1.0 - decay) * batch_square, square)
        total = torch.where(seen, decay * total + (1.0 - decay), total)
        scale = torch.where(total > 0, (square / total.clamp(min=1.0 - decay)).sqrt().clamp(min=floor), 1.0)
        return scale, square, total

    visual, *visual_state = update(visual_dependency, Role.PERCEPTION, state.visual_square, state.visual_total)
    consistency, *consistency_state = update(
        perception_consistency, Role.REASONING, state.consistency_square, state.consistency_total
    )
    return RoleScales(visual, consistency), ScaleState(*visual_state, *consistency_state)


def mix_schedule(step: int, *, warmup_steps: int, mix: float = 1.0) -> float:
    """Linear ramp of `mix` from 0 at step 0 to its full value at `warmup_steps`, constant from there.

    Example:
        >>> [mix_schedule(step, warmup_steps=4) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
    return mix * min(1.0, step / warmup_steps) if warmup_steps else mix


def _check_ranges(
    strength: float, bound: float, visual_scale: float | Tensor, consistency_scale: float | Tensor, mix: float
) -> None:
    if not bound > 0.0:
        raise ValueError(f"bound must be above 0 nats, got {bound}")
    if not 0.0 <= strength <= _MAX_EXPONENT / bound:
        raise ValueError(f"strength must be in [0, {_MAX_EXPONENT:g} / bound], got {strength} with bound {bound}")
    for argument, scale in (("visual_scale", visual_scale), ("consistency_scale", consistency_scale)):
        if not isinstance(scale, Tensor) and not scale > 0.0:
            raise ValueError(f"{argument} must be above 0 nats, got {scale}")
    if not 0.0 <= mix <= 1.0:
        raise ValueError(f"mix must be in [0, 1], got {mix}")


# Baselines: scores [batch, time] and the two roles -> what to subtract, [batch, 1] or [batch, time].


def _token_mean(scores: Tensor, perception: Tensor, reasoning: Tensor) -> Tensor:
    return masked_mean(scores, perception | reasoning, dim=1)[:, None]


def _per_role_mean(scores: Tensor, perception: Tensor, reasoning: Tensor) -> Tensor:
    of_perception = masked_mean(scores, perception, dim=1)[:, None]
    return torch.where(perception, of_perception, masked_mean(scores, reasoning, dim=1)[:, None])


def _role_balanced_mean(scores: Tensor, perception: Tensor, reasoning: Tensor) -> Tensor:
    means = torch.stack([masked_mean(scores, perception, dim=1), masked_mean(scores, reasoning, dim=1)])
    return masked_mean(means, torch.stack([perception.any(1), reasoning.any(1)]), dim=0)[:, None]


def _median(scores: Tensor, perception: Tensor, reasoning: Tensor) -> Tensor:
    if scores.shape[1] == 0:
        return scores.new_zeros(len(scores), 1)
    scored = perception | reasoning
    ordered = torch.where(scored, scores, torch.inf).sort(dim=1).values
    last = scored.sum(1, keepdim=True) - 1
    middle = [ordered.gather(1, index.clamp(min=0)) for index in (last // 2, (last + 1) // 2)]
    return torch.where(last >= 0, (middle[0] + middle[1]) / 2, 0.0)


def _no_baseline(scores: Tensor, perception: Tensor, reasoning: Tensor) -> Tensor:
    return torch.zeros_like(scores)


_BASELINES = {
    "token": _token_mean,
    "role_balanced": _role_balanced_mean,
    "per_role": _per_role_mean,
    "median": _median,
    "none": _no_baseline,
}


# Maps: centred score, strength, bound, S -> positive value, 1 at a centred score or a strength of 0.


def _exp_tanh(centred: Tensor, strength: float, bound: float, scored: Tensor) -> Tensor:
    return torch.exp(strength * bound * torch.tanh(centred / bound))


def _exp_clip(centred: Tensor, strength: float, bound: float, scored: Tensor) -> Tensor:
    return torch.exp(strength * centred.clamp(-bound, bound))


def _one_plus_tanh(centred: Tensor, strength: float, bound: float, scored: Tensor) -> Tensor:
    return 1.0 - math.expm1(-bound) * torch.tanh(strength * centred)


def _sigmoid(centred: Tensor, strength: float, bound: float, scored: Tensor) -> Tensor:
    return 2.0 * torch.sigmoid(_exponent(strength * centred))


def _softplus(centred: Tensor, strength: float, bound: float, scored: Tensor) -> Tensor:
    # At 0 softplus and log 2 agree only up to rounding; strength 0 must give exactly 1.
    value = F.softplus(_exponent(strength * centred), threshold=_MAX_EXPONENT)
    return value / F.softplus(torch.zeros_like(value))


def _softmax(centred: Tensor, strength: float, bound: float, scored: Tensor) -> Tensor:
    value = torch.exp(_exponent(strength * centred))
    return value / masked_mean(value, scored, dim=1, empty=1.0)[:, None]


def _exponent(value: Tensor) -> Tensor:
    """Kept where a float32 exponential is neither 0 nor infinite, so that weights stay positive and finite."""
    return value.clamp(-_MAX_EXPONENT, _MAX_EXPONENT)


_WEIGHT_MAPS = {
    "exp_tanh": _exp_tanh,
    "exp_clip": _exp_clip,
    "one_plus_tanh": _one_plus_tanh,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "softmax": _softmax,
}


def _to_mean_one(values: Tensor, perception: Tensor, reasoning: Tensor) -> Tensor:
    return values / masked_mean(values, perception | reasoning, dim=1, empty=1.0)[:, None]


def _to_mean_one_per_role(values: Tensor, perception: Tensor, reasoning: Tensor) -> Tensor:
    of_perception = masked_mean(values, perception, dim=1, empty=1.0)[:, None]
    return values / torch.where(perception, of_perception, masked_mean(values, reasoning, dim=1, empty=1.0)[:, None])


def _as_they_are(values: Tensor, perception: Tensor, reasoning: Tensor) -> Tensor:
    return values


_RENORMALIZATIONS = {"trajectory": _to_mean_one, "per_role": _to_mean_one_per_role, "none": _as_they_are}
