"""Log-probabilities of the same token in two contexts -> how much it depends on what the second context lacks."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.checked import choose
from srpo_core.masking import at_least_float32, log_probs_where_real, log_ratio_of, saturated
from srpo_core.options import ContrastKind, CreditOptions
from srpo_core.roles import check_roles, role_masks
from srpo_core.typechecking import typechecked

__all__ = ["clip_divergence", "contrast", "perception_consistency", "visual_dependency"]

_CLIP = CreditOptions.range_of("score_clip")


@typechecked(values=(check_roles, log_probs_where_real("log_probs", "corrupted_log_probs")))
def visual_dependency(
    log_probs: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    corrupted_log_probs: Float[Tensor, "batch time"],
    kind: ContrastKind = "log_ratio",
    clip: float = 5.0,
) -> Float[Tensor, "batch time"]:
    r"""How much, in nats, each perception token depends on the image; 0 at every other token.

    .. math:: s_t = \operatorname{clip}(\delta_t, -c, c), \qquad
        \delta_t = \log \pi(o_t \mid q, I, o_{<t}) - \log \pi(o_t \mid q, \tilde I, o_{<t})

    ``positive`` is :math:`\max(\delta_t, 0)`, ``abs`` :math:`|\delta_t|` and ``k3``
    :math:`e^{-\delta_t} + \delta_t - 1`, each clipped in the same way. Where both contexts bar the token
    (:math:`-\infty`), :math:`\delta_t` is 0; where one context does, it is :math:`\pm 20`. For a divergence of the full
    distributions use :func:`~srpo_core.token_divergence` and pass it on as the score.

    Both sides must come from one code path (engine, dtype, temperature, micro-batching) in eval mode: an inference
    engine's log-probs differ from the trainer's by more than many contrasts do.

    Args:
        log_probs: Each token under the original image, nats.
        roles: The role of each token, :class:`~srpo_core.Role`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        corrupted_log_probs: The same tokens under the corrupted image, nats.
        kind: Which contrast.
        clip: :math:`c`, the bound of a score in nats, above 0.

    Returns:
        Detached scores in [-clip, clip], in [0, clip] for all kinds but ``log_ratio``.

    Raises:
        ValueError: If `kind` is unknown or `clip` out of range; outside ``torch.compile`` also if a role is outside
            the enum or a log-prob of a real token is NaN or plus infinity, for which the tensors are read on the host.

    Example:
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.REASONING]])
        >>> visual_dependency(torch.tensor([[-0.1, -1.0]]), roles, torch.tensor([[True, True]]),
        ...                   corrupted_log_probs=torch.tensor([[-2.1, -1.0]]))
        tensor([[2.0000, 0.0000]])

    References:
        The idea: SRPO, arXiv:2605.07274, abstract. The formula, clip and default are this project's choices.
    """
    return contrast(log_probs, corrupted_log_probs, role_masks(roles, mask).perception, kind=kind, clip=clip)


@typechecked(values=(check_roles, log_probs_where_real("log_probs", "counterfactual_log_probs")))
def perception_consistency(
    log_probs: Float[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    counterfactual_log_probs: Float[Tensor, "batch time"],
    kind: ContrastKind = "log_ratio",
    clip: float = 5.0,
) -> Float[Tensor, "batch time"]:
    r"""How much, in nats, each reasoning token depends on the perception before it; 0 at every other token.

    .. math:: s_t = \operatorname{clip}\bigl(\log \pi(o_t \mid q, I, o_{<t})
        - \log \pi(o_t \mid q, I, \tilde o_{<t}),\ -c,\ c\bigr)

    Args:
        log_probs: Each token after the response's own perception, nats.
        roles: The role of each token, :class:`~srpo_core.Role`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        counterfactual_log_probs: The same tokens after another perception, nats, carried back to the original positions
            by :meth:`~srpo_core.counterfactuals.CounterfactualResponses.carry_back`.
        kind: Which contrast; see :func:`visual_dependency`.
        clip: :math:`c`, the bound of a score in nats, above 0.

    Returns:
        Detached scores in [-clip, clip], in [0, clip] for all kinds but ``log_ratio``.

    Raises:
        ValueError: As :func:`visual_dependency`.

    Example:
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.REASONING]])
        >>> perception_consistency(torch.tensor([[-0.1, -1.0]]), roles, torch.tensor([[True, True]]),
        ...                        counterfactual_log_probs=torch.tensor([[-2.1, -9.0]]))
        tensor([[0., 5.]])

    References:
        The idea: SRPO, arXiv:2605.07274, abstract. The formula, clip and default are this project's choices.
    """
    return contrast(log_probs, counterfactual_log_probs, role_masks(roles, mask).reasoning, kind=kind, clip=clip)


def contrast(log_probs: Tensor, other_log_probs: Tensor, where: Tensor, *, kind: str, clip: float) -> Tensor:
    """The clipped contrast where `where`, 0 elsewhere."""
    _CLIP.check("clip", clip)
    score = choose("kind", kind, {"log_ratio": _log_ratio, "positive": _positive, "abs": torch.abs, "k3": _k3})
    return score(log_ratio_of(log_probs.detach(), other_log_probs.detach(), where)).clamp(-clip, clip)


def clip_divergence(divergence: Tensor, where: Tensor, *, clip: float) -> Tensor:
    """A divergence of full distributions as a score: clipped where `where`, 0 elsewhere; an infinite one is 20 nats."""
    divergence = divergence.detach().to(at_least_float32(divergence.dtype))
    return torch.where(where, saturated(divergence), 0.0).clamp(-clip, clip)


def _log_ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio


def _positive(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(min=0.0)


def _k3(log_ratio: Tensor) -> Tensor:
    # expm1 keeps the precision that exp - 1 loses near 0, and e^80 is a finite float32.
    log_ratio = log_ratio.clamp(-80.0, 80.0)
    return torch.expm1(-log_ratio) + log_ratio
