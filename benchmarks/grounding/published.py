"""Published ways of giving tokens credit, on the core's primitives: PAPO, VPPO, PGPO, RLSD and 80/20 entropy tokens.

All but PAPO's penalty are weights: multiply them into the advantages with :func:`~srpo_core.role_advantages`, then call
:func:`~srpo_core.grpo_loss`. They carry no gradient and need log-probs of real tokens that are not NaN, which is not
checked, because nothing here reads a tensor on the host.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from srpo_core import aggregate
from srpo_core.contrasts import contrast
from srpo_core.masking import at_least_float32, masked_max, masked_mean, masked_min
from srpo_core.surrogates import MAX_LOG_RATIO
from srpo_core.typechecking import typechecked

__all__ = ["entropy_mask", "k3", "papo_penalty", "pgpo_weights", "rlsd_weights", "vppo_weights"]

# Means closer than this are equal up to rounding; min-max would blow the rounding up to the whole range.
_LEAST_SPREAD = 1e-6


@typechecked
def k3(
    log_probs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    corrupted_log_probs: Float[Tensor, "batch time"],
    clip: float = 10.0,
) -> Float[Tensor, "batch time"]:
    r"""How much each token depends on the image, in [0, clip] nats, with a gradient to both views; 0 at padding.

    .. math:: \min(e^{-\delta_t} + \delta_t - 1,\ c), \qquad
        \delta_t = \log \pi(o_t \mid q, I, o_{<t}) - \log \pi(o_t \mid q, \tilde I, o_{<t})

    It estimates, from the sampled token, the KL divergence of the corrupted view from the clean one. Its value is that
    of ``kind="k3"`` of :func:`~srpo_core.visual_dependency`, at every role. A clipped token has no gradient.

    Args:
        log_probs: Each token under the original image, nats.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        corrupted_log_probs: The same tokens under the corrupted image, nats.
        clip: :math:`c`, nats, above 0.

    Raises:
        ValueError: If `clip` is out of range.

    Example:
        >>> k3(torch.tensor([[-0.1, -1.0]]), torch.tensor([[True, False]]),
        ...    corrupted_log_probs=torch.tensor([[-2.1, -9.0]]))
        tensor([[1.1353, 0.0000]])

    References:
        Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    if not clip > 0.0:
        raise ValueError(f"clip must be above 0 nats, got {clip}")
    dtype = at_least_float32(torch.promote_types(log_probs.dtype, corrupted_log_probs.dtype))
    log_probs, corrupted_log_probs = log_probs.to(dtype), corrupted_log_probs.to(dtype)
    # A token that neither view allows depends on neither; (-inf) - (-inf) would be NaN.
    comparable = mask & ~((log_probs == -torch.inf) & (corrupted_log_probs == -torch.inf))
    # Not kl_penalty, whose reference has no gradient.
    log_ratio = torch.where(comparable, corrupted_log_probs - log_probs, 0.0).clamp(-80.0, 80.0)
    return (torch.expm1(log_ratio) - log_ratio).clamp(max=clip)


@typechecked
def papo_penalty(
    log_probs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    corrupted_log_probs: Float[Tensor, "batch time"],
    entropy: Float[Tensor, "batch time"],
    corrupted_entropy: Float[Tensor, "batch time"],
    kl_coef: float = 0.01,
    entropy_coef: float = 0.03,
    clip: float = 10.0,
    normalizer: float | Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    r"""PAPO's penalty, to be added to a GRPO loss: it rewards depending on the image and punishes both entropies.

    .. math:: \operatorname{mean}_t \bigl(-\gamma\, \text{k3}_t + \eta (H_t + \tilde H_t)\bigr)

    The entropies are there because raising them is the cheap way to drive the two views apart.

    Gradients reach all four tensors, as the objective asks: compute them all under the policy being trained. The
    released code does not: its corrupted log-probs come from the old policy without a gradient and so, therefore, does
    the corrupted entropy, whose term then trains nothing (PAPO#20). To reproduce that, pass the corrupted log-probs of
    the rollout, detached, and ``corrupted_entropy.detach()``. It also estimates the entropies from the sampled tokens:
    for that, pass the negated log-probs.

    Args:
        log_probs: Each token under the original image, nats.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        corrupted_log_probs: The same tokens under the corrupted image, nats.
        entropy: Of the next-token distribution under the original image
            (:func:`~srpo_core.log_probs.token_entropy`), nats.
        corrupted_entropy: The same under the corrupted image.
        kl_coef: :math:`\gamma`, at least 0; published values are 0.01 and 0.02.
        entropy_coef: :math:`\eta` of both views, at least 0.
        clip: Bound of k3, nats, above 0.
        normalizer: What the sum over tokens is divided by; None: the real tokens. Pass what the loss is given, so
            that micro-batches add up. Without a real token the penalty is 0.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> papo_penalty(torch.tensor([[-0.1]]), torch.tensor([[True]]), corrupted_log_probs=torch.tensor([[-2.1]]),
        ...              entropy=torch.tensor([[0.5]]), corrupted_entropy=torch.tensor([[1.0]]))
        tensor(0.0336)

    References:
        PAPO, arXiv:2507.06448, implicit perception loss and double entropy loss.
    """
    for argument, value in (("kl_coef", kl_coef), ("entropy_coef", entropy_coef)):
        if not value >= 0.0:
            raise ValueError(f"{argument} must be at least 0, got {value}")
    dependency = k3(log_probs, mask, corrupted_log_probs=corrupted_log_probs, clip=clip)
    entropies = entropy.to(dependency.dtype) + corrupted_entropy.to(dependency.dtype)
    return aggregate(entropy_coef * entropies - kl_coef * dependency, mask, normalizer=normalizer)


@typechecked
def vppo_weights(
    log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch time"],
    *,
    corrupted_log_probs: Float[Tensor, "batch time"],
    keep: float = 0.4,
    floor: float = 0.9,
    ceiling: float | None = 1.0,
    clip: float = 10.0,
) -> Float[Tensor, "batch time"]:
    r"""VPPO's weights: the tokens of a response that depend most on the image, times a scale of the response; else 0.

    .. math:: w_{i,t} = \alpha_i\, [t \in \operatorname{top}_{\lceil k |o_i| \rceil} \text{k3}_i], \qquad
        \alpha_i = \beta_0 + (\beta_1 - \beta_0)
        \frac{\bar s_i - \min_j \bar s_j}{\max_j \bar s_j - \min_j \bar s_j}, \qquad
        \bar s_i = \operatorname{mean}_t \text{k3}_{i,t}

    Of equal scores the earlier token is kept. Pass the whole rollout batch and slice the result: minimum and maximum
    are over the rows given, and in the released code a response's scale changes with its micro-batch and rank. If all
    means are equal, every scale is 1. Responses without a token have no part in it.

    The normalizer of the loss decides whether the tokens left out count. ``grpo_loss(..., mask)`` divides by all
    tokens, as the released code does, and so shrinks the step to about `keep` of GRPO's;
    ``normalizer=(weights > 0).sum()`` divides by those that learn.

    Args:
        log_probs: Each token under the original image, nats, by the trainer's own code path.
        advantages: One per response. Not read, because these weights depend on the image alone.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        corrupted_log_probs: The same tokens under the corrupted image, nats.
        keep: :math:`k`, share of a response's tokens that learn, in (0, 1]; at least one of them does.
        floor: :math:`\beta_0`, scale of the response that depends least on the image, in (0, 1].
        ceiling: :math:`\beta_1`, scale of the response that depends most on it, at least `floor`. None: so large that
            the scales have mean 1 over the responses, as in the released code (which takes it per micro-batch).
        clip: Bound of k3, nats, above 0.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> clean, corrupted = torch.full((2, 3), -0.1), torch.tensor([[-0.1, -2.1, -0.1], [-0.1, -0.1, -0.1]])
        >>> vppo_weights(clean, torch.zeros(2), torch.ones(2, 3).bool(), corrupted_log_probs=corrupted)
        tensor([[1.0000, 1.0000, 0.0000],
                [0.9000, 0.9000, 0.0000]])

    References:
        VPPO, arXiv:2510.09285; code huaixuheqing/VPPO-RL.
    """
    _check_share(keep)
    if not 0.0 < floor <= 1.0:
        raise ValueError(f"floor must be in (0, 1], got {floor}")
    if ceiling is not None and not ceiling >= floor:
        raise ValueError(f"ceiling must be at least floor ({floor}) or None, got {ceiling}")
    scores = contrast(log_probs, corrupted_log_probs, mask, kind="k3", clip=clip)
    order = torch.where(mask, scores, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(mask.shape[1], device=mask.device) < _share(mask.sum(1), keep)[:, None]
    kept = torch.zeros_like(mask).scatter(1, order, first) & mask

    means, real = masked_mean(scores, mask, dim=1), mask.any(1)
    least, most = masked_min(means, real, empty=0.0), masked_max(means, real, empty=0.0)
    differ = most - least > _LEAST_SPREAD
    place = torch.where(differ, (means - least) / torch.where(differ, most - least, 1.0), 0.0)
    # A ceiling of floor + (1 - floor) / mean(place) is what makes the mean scale 1.
    reach = (1.0 - floor) / masked_mean(place, real & differ, empty=1.0) if ceiling is None else ceiling - floor
    scale = torch.where(differ, floor + reach * place, 1.0)
    return torch.where(kept, scale[:, None], 0.0)


@typechecked
def pgpo_weights(
    log_probs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    corrupted_log_probs: Float[Tensor, "batch time"],
    threshold: float = 0.4,
    boost: float = 2.0,
) -> Float[Tensor, "batch time"]:
    r"""PGPO's weights: below a threshold of dependency damped, above it boosted, 1 on average over a response.

    With :math:`I_t` the min-max of :math:`\log(1 + \text{k3}_t)` over the tokens of one response:

    .. math:: v_t = \begin{cases} I_t / \tau & I_t < \tau \\
        1 + \beta (I_t - \tau) / (1 - \tau) & \text{else} \end{cases}, \qquad w_t = v_t / \operatorname{mean}_t v

    The token that depends least on the image has weight exactly 0, however much that is. Where all tokens depend on it
    alike, and in a response of one token, weights are 1; at padding they are 0. The paper takes the divergence of the
    full distributions; this takes its estimate from the sampled token, as the other methods here do.

    Args:
        log_probs: Each token under the original image, nats, by the trainer's own code path.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        corrupted_log_probs: The same tokens under the corrupted image, nats.
        threshold: :math:`\tau`, in (0, 1).
        boost: :math:`\beta`, at least 0.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> clean, corrupted = torch.full((1, 3), -0.1), torch.tensor([[-0.1, -2.1, -0.1]])
        >>> pgpo_weights(clean, torch.ones(1, 3).bool(), corrupted_log_probs=corrupted)
        tensor([[0., 3., 0.]])

    References:
        PGPO, arXiv:2604.01840, eq. 6-7.
    """
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold must be in (0, 1), got {threshold}")
    if not boost >= 0.0:
        raise ValueError(f"boost must be at least 0, got {boost}")
    scores = contrast(log_probs, corrupted_log_probs, mask, kind="k3", clip=torch.inf).log1p()
    if scores.shape[1] == 0:
        return scores
    least = torch.where(mask, scores, torch.inf).amin(1, keepdim=True)
    most = torch.where(mask, scores, -torch.inf).amax(1, keepdim=True)
    differ = most > least
    place = torch.where(differ & mask, (scores - least) / torch.where(differ, most - least, 1.0), 0.0)
    above = 1.0 + boost * (place - threshold) / (1.0 - threshold)
    values = torch.where(place < threshold, place / threshold, above)
    values = torch.where(differ, values, 1.0)
    return torch.where(mask, values / masked_mean(values, mask, dim=1, empty=1.0)[:, None], 0.0)


@typechecked
def rlsd_weights(
    log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch time"],
    *,
    teacher_log_probs: Float[Tensor, "batch time"],
    mix: float = 0.5,
    clip: float = 0.2,
) -> Float[Tensor, "batch time"]:
    r"""RLSD's weights: credit goes to what the teacher likes too, blame to what it does not; 0 at padding.

    .. math:: w_t = (1 - \lambda) + \lambda \operatorname{clip}\bigl(e^{\operatorname{sign}(A) \delta_t},
        1 - \epsilon, 1 + \epsilon\bigr), \qquad \delta_t = \log \pi_\text{teacher}(o_t) - \log \pi(o_t)

    The nearest published relative of SRPO's weights, without their baseline: the mean over a response is not 1. RLSD's
    teacher is the same policy, told the answer. With the original image as the teacher of the corrupted one,
    :math:`\delta` is the contrast of :func:`~srpo_core.visual_dependency`. A response with advantage 0 has weights 1.

    Args:
        log_probs: Each token under the student's context, nats.
        advantages: One per response; only the sign is read.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        teacher_log_probs: The same tokens under the teacher's, nats.
        mix: :math:`\lambda`, in [0, 1]; 0 is GRPO. The released runs bring it from 0.5 to 0 over 60 steps.
        clip: :math:`\epsilon`, in [0, 1].

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> rlsd_weights(torch.tensor([[-1.0, -1.0]]), torch.tensor([-2.0]), torch.tensor([[True, True]]),
        ...              teacher_log_probs=torch.tensor([[-0.5, -1.1]]))
        tensor([[0.9000, 1.0526]])

    References:
        RLSD, arXiv:2604.03128; the mix with 1 is in its code, iie-ycx/RLSD.
    """
    for argument, value in (("mix", mix), ("clip", clip)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{argument} must be in [0, 1], got {value}")
    delta = contrast(teacher_log_probs, log_probs, mask, kind="log_ratio", clip=MAX_LOG_RATIO)
    ratio = (advantages.detach().sign()[:, None] * delta).exp().clamp(1.0 - clip, 1.0 + clip)
    return torch.where(mask, (1.0 - mix) + mix * ratio, 0.0).to(delta.dtype)


@typechecked
def entropy_mask(
    entropy: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    keep: float = 0.2,
) -> Bool[Tensor, "batch time"]:
    r"""The 80/20 rule's mask: True at the tokens of the batch whose entropy is among the highest.

    .. math:: [H_t \ge \tau], \qquad \tau \text{ the } \lceil k n \rceil \text{-th highest entropy of the batch's }
        n \text{ tokens}

    Tokens that tie with the threshold are all kept, so equal entropies keep every token. A response may keep none,
    and a batch without tokens keeps none. Pass the whole rollout batch: the threshold is over the rows given. As with
    :func:`vppo_weights`, the loss's normalizer decides whether it is divided by all tokens or by those kept.

    Args:
        entropy: Of each next-token distribution (:func:`~srpo_core.log_probs.token_entropy`), nats.
        mask: True at response tokens; elsewhere the entropy may be anything, even NaN.
        keep: :math:`k`, share of the batch's tokens, in (0, 1].

    Raises:
        ValueError: If `keep` is out of range.

    Example:
        >>> mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> entropy_mask(torch.tensor([[0.1, 2.0, 0.3], [0.2, 0.0, 9.0]]), mask)
        tensor([[False,  True, False],
                [False, False, False]])

    References:
        "Beyond the 80/20 rule", arXiv:2506.01939.
    """
    _check_share(keep)
    if entropy.numel() == 0:
        return torch.zeros_like(mask)
    entropy = torch.where(mask, entropy.detach(), -torch.inf)
    last = _share(mask.sum(), keep) - 1
    # gather, because an index that is a 0-d tensor would be read on the host.
    threshold = entropy.flatten().sort(descending=True).values.gather(0, last[None])
    return mask & (entropy >= threshold)


def _share(tokens: Tensor, keep: float) -> Tensor:
    """Tokens to keep, rounded up and at least 1; the product's own rounding must not add one (0.07 * 100 > 7)."""
    return (tokens.double() * keep - 1e-9).ceil().clamp(min=1.0).long()


def _check_share(keep: float) -> None:
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
