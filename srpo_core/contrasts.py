"""Two log-probabilities of the same token to how much it owes to what the second context lacks."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core._masked import at_least_float32, check_no_nan, check_roles
from srpo_core.roles import Role
from srpo_core.typechecking import choose, typechecked

__all__ = ["ContrastKind", "perception_consistency", "visual_dependency"]

ContrastKind = Literal["log_ratio", "positive", "abs", "k3"]


@typechecked
def visual_dependency(
    log_probs: Float[Tensor, "batch time"],
    corrupted_log_probs: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    kind: ContrastKind = "log_ratio",
    clip: float = 5.0,
) -> Float[Tensor, "batch time"]:
    r"""How much, in nats, each perception token owes to the image; 0 at every other token.

    .. math:: s_t = \operatorname{clip}(\delta_t, -c, c), \qquad
        \delta_t = \log \pi(o_t \mid q, I, o_{<t}) - \log \pi(o_t \mid q, \tilde I, o_{<t})

    ``positive`` is :math:`\max(\delta_t, 0)`, ``abs`` :math:`|\delta_t|` and ``k3``
    :math:`e^{-\delta_t} + \delta_t - 1`, each clipped alike. Where both contexts exclude the token
    (:math:`-\infty` twice) the score is 0. For a divergence of the full distributions use
    :func:`~srpo_core.token_divergence` and pass it on as the score.

    Both sides must come from one code path (engine, dtype, temperature, micro-batching) in eval mode: an inference
    engine's log-probs differ from the trainer's by more than many contrasts do.

    Args:
        log_probs: Each token under the original image, nats.
        corrupted_log_probs: The same tokens under the corrupted image, nats.
        roles: What each token does, :class:`~srpo_core.Role`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        kind: Which contrast.
        clip: :math:`c`, nats, above 0.

    Returns:
        Detached scores in [-clip, clip], in [0, clip] for all kinds but ``log_ratio``.

    Raises:
        ValueError: If an option is unknown or out of range, a role is outside the enum, or a log-prob of a real
            token is NaN (eager mode; the tensors are read on the host).

    Example:
        >>> visual_dependency(torch.tensor([[-0.1, -1.0]]), torch.tensor([[-2.1, -1.0]]),
        ...                   torch.tensor([[Role.PERCEPTION, Role.REASONING]]), torch.tensor([[True, True]]))
        tensor([[2.0000, 0.0000]])

    References:
        The idea: SRPO, arXiv:2605.07274, abstract. The formula, clip and default are this project's choices.
    """
    _check("corrupted_log_probs", log_probs, corrupted_log_probs, roles, mask)
    return contrast(log_probs, corrupted_log_probs, mask & (roles == int(Role.PERCEPTION)), kind=kind, clip=clip)


@typechecked
def perception_consistency(
    log_probs: Float[Tensor, "batch time"],
    counterfactual_log_probs: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    kind: ContrastKind = "log_ratio",
    clip: float = 5.0,
) -> Float[Tensor, "batch time"]:
    r"""How much, in nats, each reasoning token owes to the perception it was given; 0 at every other token.

    .. math:: s_t = \operatorname{clip}\bigl(\log \pi(o_t \mid q, I, p, r_{<t})
        - \log \pi(o_t \mid q, I, \tilde p, r_{<t}),\ -c,\ c\bigr)

    Args:
        log_probs: Each token after its own perception :math:`p`, nats.
        counterfactual_log_probs: The same tokens after the counterfactual :math:`\tilde p`, nats, carried back to
            the original positions by :meth:`~srpo_core.CounterfactualResponses.carry_back`.
        roles: What each token does, :class:`~srpo_core.Role`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        kind: Which contrast; see :func:`visual_dependency`.
        clip: :math:`c`, nats, above 0.

    Returns:
        Detached scores in [-clip, clip], in [0, clip] for all kinds but ``log_ratio``.

    Raises:
        ValueError: As :func:`visual_dependency`.

    Example:
        >>> perception_consistency(torch.tensor([[-0.1, -1.0]]), torch.tensor([[-2.1, -9.0]]),
        ...                        torch.tensor([[Role.PERCEPTION, Role.REASONING]]), torch.tensor([[True, True]]))
        tensor([[0., 5.]])

    References:
        The idea: SRPO, arXiv:2605.07274, abstract. The formula, clip and default are this project's choices.
    """
    _check("counterfactual_log_probs", log_probs, counterfactual_log_probs, roles, mask)
    return contrast(log_probs, counterfactual_log_probs, mask & (roles == int(Role.REASONING)), kind=kind, clip=clip)


def contrast(log_probs: Tensor, other_log_probs: Tensor, where: Tensor, *, kind: str, clip: float) -> Tensor:
    """The clipped contrast where `where`, 0 elsewhere; no check of values, so no host sync."""
    if not clip > 0.0:
        raise ValueError(f"clip must be above 0 nats, got {clip}")
    score = choose("kind", kind, {"log_ratio": _log_ratio, "positive": _positive, "abs": torch.abs, "k3": _k3})
    dtype = at_least_float32(torch.promote_types(log_probs.dtype, other_log_probs.dtype))
    log_probs, other_log_probs = log_probs.detach().to(dtype), other_log_probs.detach().to(dtype)
    # (-inf) - (-inf) is NaN; a token that neither context allows owes nothing to either.
    comparable = where & ~((log_probs == -torch.inf) & (other_log_probs == -torch.inf))
    log_ratio = torch.where(comparable, log_probs - other_log_probs, 0.0)
    return score(log_ratio).clamp(-clip, clip)


def clip_divergence(divergence: Tensor, where: Tensor, *, clip: float) -> Tensor:
    """A divergence of full distributions as a score: clipped where `where`, 0 elsewhere."""
    divergence = divergence.detach().to(at_least_float32(divergence.dtype))
    return torch.where(where, divergence, 0.0).clamp(-clip, clip)


def _log_ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio


def _positive(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(min=0.0)


def _k3(log_ratio: Tensor) -> Tensor:
    # expm1 keeps the precision that exp - 1 loses near 0; infinities would meet as inf - inf.
    log_ratio = log_ratio.clamp(-80.0, 80.0)
    return torch.expm1(-log_ratio) + log_ratio


def _check(argument: str, log_probs: Tensor, other_log_probs: Tensor, roles: Tensor, mask: Tensor) -> None:
    check_roles(roles, mask)
    check_no_nan("log_probs", log_probs, mask)
    check_no_nan(argument, other_log_probs, mask)
