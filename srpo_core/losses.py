"""Token advantages to a loss: clipped surrogate and its kin, KL penalties, aggregation."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from srpo_core._masked import at_least_float32, masked_max, masked_mean, masked_min
from srpo_core.typechecking import choose, typechecked

__all__ = [
    "KLEstimator",
    "LossOutput",
    "Reduction",
    "Surrogate",
    "aggregate",
    "cispo_surrogate",
    "clipped_surrogate",
    "grpo_loss",
    "gspo_surrogate",
    "gspo_token_surrogate",
    "kl_penalty",
    "sapo_surrogate",
]

Surrogate = Literal["clip", "cispo", "sapo", "gspo_token", "gspo"]
KLEstimator = Literal["k3", "k1", "k2"]
Reduction = Literal["token_mean", "sequence_mean", "constant", "sum"]

# Far outside every clip range, and e^20 is still an exact float32: a ratio saturates instead of becoming inf or NaN.
MAX_LOG_RATIO = 20.0


class LossOutput(NamedTuple):
    """A loss to call `backward` on, and what happened on the way."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Float[Tensor, ""]]


@typechecked
def clipped_surrogate(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Float[Tensor, "batch time"]:
    r"""Clipped policy-gradient loss of each token, not yet averaged.

    .. math:: \ell_t = -\min(r_t A_t,\ \operatorname{clip}(r_t, 1-\epsilon_l, 1+\epsilon_h) A_t),
        \qquad r_t = \pi(y_t) / \pi_\text{old}(y_t)

    With `dual_clip` :math:`c`, :math:`\ell_t \le -c A_t` where :math:`A_t < 0`.

    Args:
        log_probs: Log-probability, nats, of each sampled token under the policy being trained. The only input with
            a gradient.
        old_log_probs: The same tokens under the policy that sampled them.
        advantages: Credit of each token; positive means "make it likelier".
        mask: True at response tokens. Elsewhere the inputs may hold anything, even NaN; loss and gradient there are 0.
        clip_low: :math:`\epsilon_l`, in [0, 1).
        clip_high: :math:`\epsilon_h`, at least 0.
        dual_clip: :math:`c`, above 1, or None.

    Raises:
        ValueError: If a clip is out of range.

    Example:
        >>> clipped_surrogate(torch.tensor([[-1.0, -0.5]]), torch.tensor([[-1.0, -1.0]]),
        ...                   torch.tensor([[2.0, 2.0]]), torch.tensor([[True, True]]))
        tensor([[-2.0000, -2.4000]])

    References:
        Schulman et al. 2017, arXiv:1707.06347, eq. 7; separate widths: DAPO, arXiv:2503.14476, eq. 10; dual clip:
        Ye et al. 2020, arXiv:1912.09729.
    """
    _check_clips(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    log_ratio, advantages = _masked_inputs(log_probs, old_log_probs, advantages, mask)
    ratio = _ratio(log_ratio)
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return losses


@typechecked
def cispo_surrogate(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    max_ratio: float = 5.0,
) -> Float[Tensor, "batch time"]:
    r"""CISPO loss of each token: REINFORCE whose importance weight is truncated, so that no token loses its gradient.

    .. math:: \ell_t = -\operatorname{sg}[\min(r_t, r_\max)]\, A_t \log \pi(y_t)

    Args:
        log_probs: As in :func:`clipped_surrogate`; the only input with a gradient.
        old_log_probs: The same tokens under the policy that sampled them, nats.
        advantages: Credit of each token.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        max_ratio: :math:`r_\max`, above 0.

    Raises:
        ValueError: If `max_ratio` is out of range.

    Example:
        >>> cispo_surrogate(torch.tensor([[-1.0]]), torch.tensor([[-1.0]]), torch.tensor([[2.0]]),
        ...                 torch.tensor([[True]]))
        tensor([[2.]])

    References:
        MiniMax-M1, arXiv:2506.13585, section 3.1; only the upper bound, as in its experiments.
    """
    if not max_ratio > 0.0:
        raise ValueError(f"max_ratio must be above 0, got {max_ratio}")
    log_ratio, advantages = _masked_inputs(log_probs, old_log_probs, advantages, mask)
    log_probs = torch.where(mask, log_probs.to(log_ratio.dtype), 0.0)
    return -_ratio(log_ratio).clamp(max=max_ratio).detach() * advantages * log_probs


@typechecked
def sapo_surrogate(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Float[Tensor, "batch time"]:
    r"""SAPO loss of each token: a soft gate in place of the clip.

    .. math:: \ell_t = -\frac{4}{\tau} \sigma(\tau (r_t - 1))\, A_t, \qquad
        \tau = \tau_+ \text{ where } A_t > 0,\ \tau_- \text{ elsewhere}

    Args:
        log_probs: As in :func:`clipped_surrogate`; the only input with a gradient.
        old_log_probs: The same tokens under the policy that sampled them, nats.
        advantages: Credit of each token.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        temperature_positive: :math:`\tau_+`, above 0.
        temperature_negative: :math:`\tau_-`, above 0; larger forgets off-policy mistakes sooner.

    Raises:
        ValueError: If a temperature is out of range.

    Example:
        >>> sapo_surrogate(torch.tensor([[-1.0]]), torch.tensor([[-1.0]]), torch.tensor([[2.0]]),
        ...                torch.tensor([[True]]))
        tensor([[-4.]])

    References:
        SAPO, arXiv:2511.20347.
    """
    for argument, value in (
        ("temperature_positive", temperature_positive),
        ("temperature_negative", temperature_negative),
    ):
        if not value > 0.0:
            raise ValueError(f"{argument} must be above 0, got {value}")
    log_ratio, advantages = _masked_inputs(log_probs, old_log_probs, advantages, mask)
    # Not torch.where of two Python numbers: that rounds them to the default dtype.
    temperature = torch.full_like(advantages, temperature_negative).masked_fill(advantages > 0, temperature_positive)
    gate = torch.sigmoid(temperature * (_ratio(log_ratio) - 1.0)) * 4.0 / temperature
    return -gate * advantages


@typechecked
def gspo_token_surrogate(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, "batch time"]:
    r"""GSPO-token loss of each token: the sequence's ratio, with a gradient and an advantage per token.

    .. math:: \ell_t = -\min(s_t A_t,\ \operatorname{clip}(s_t, 1-\epsilon_l, 1+\epsilon_h) A_t), \qquad
        s_t = \operatorname{sg}\Bigl[\exp \frac{1}{|y|} \sum_k \log r_k\Bigr]
        \frac{\pi(y_t)}{\operatorname{sg}[\pi(y_t)]}

    Args:
        log_probs: As in :func:`clipped_surrogate`; the only input with a gradient.
        old_log_probs: The same tokens under the policy that sampled them, nats.
        advantages: Credit of each token.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        clip_low: :math:`\epsilon_l`, in [0, 1). GSPO's own widths are far below PPO's: 3e-4 and 4e-4.
        clip_high: :math:`\epsilon_h`, at least 0.

    Raises:
        ValueError: If a clip width is out of range.

    Example:
        >>> gspo_token_surrogate(torch.tensor([[-1.0, -0.8]]), torch.tensor([[-1.0, -1.0]]),
        ...                      torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]]))
        tensor([[-1.1052, -2.2103]])

    References:
        GSPO, arXiv:2507.18071, eq. 13-14.
    """
    _check_clips(clip_low, clip_high)
    log_ratio, advantages = _masked_inputs(log_probs, old_log_probs, advantages, mask)
    sequence_log_ratio = masked_mean(log_ratio, mask, dim=1)[:, None].detach()
    ratio = _ratio(sequence_log_ratio + log_ratio - log_ratio.detach())
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)


@typechecked
def gspo_surrogate(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, "batch time"]:
    r"""GSPO loss of each token: one ratio and one advantage for the whole sequence.

    .. math:: \ell_t = -\min(s A,\ \operatorname{clip}(s, 1-\epsilon_l, 1+\epsilon_h) A), \qquad
        s = \exp \frac{1}{|y|} \sum_k \log r_k

    Token weights do nothing here: :math:`s` moves every token alike, so only their mean, 1, would count. Token
    advantages that differ inside a response are refused on the CPU; elsewhere that check would stall the step.

    Args:
        log_probs: As in :func:`clipped_surrogate`; the only input with a gradient.
        old_log_probs: The same tokens under the policy that sampled them, nats.
        advantages: Credit of each token, equal within a response.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        clip_low: :math:`\epsilon_l`, in [0, 1).
        clip_high: :math:`\epsilon_h`, at least 0.

    Raises:
        ValueError: If a clip width is out of range, or the advantages of a response differ (CPU, eager mode).

    Example:
        >>> gspo_surrogate(torch.tensor([[-1.0, -0.8]]), torch.tensor([[-1.0, -1.0]]),
        ...                torch.tensor([[2.0, 2.0]]), torch.tensor([[True, True]]))
        tensor([[-2.2103, -2.2103]])

    References:
        GSPO, arXiv:2507.18071, eq. 5-7.
    """
    _check_clips(clip_low, clip_high)
    log_ratio, advantages = _masked_inputs(log_probs, old_log_probs, advantages, mask)
    if not torch.compiler.is_compiling() and advantages.device.type == "cpu":
        mean = masked_mean(advantages, mask, dim=1)[:, None]
        if ((advantages - mean).abs() > 1e-5 * mean.abs())[mask].any():
            raise ValueError(f"advantages differ inside a response; {GSPO_REFUSAL}")
    ratio = _ratio(masked_mean(log_ratio, mask, dim=1)[:, None])
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)


GSPO_REFUSAL = (
    "GSPO's sequence-level ratio moves every token of a response alike, so token weights of mean one have no effect: "
    "use surrogate='gspo_token', or strength=0"
)


@typechecked
def kl_penalty(
    log_probs: Float[Tensor, "batch time"],
    ref_log_probs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    estimator: KLEstimator = "k3",
) -> Float[Tensor, "batch time"]:
    r"""Estimate, from the sampled token, of :math:`\mathrm{KL}(\pi \| \pi_\text{ref})` at each token, nats.

    With :math:`\delta = \log \pi_\text{ref}(y_t) - \log \pi(y_t)`: ``k1`` is :math:`-\delta`, ``k2`` is
    :math:`\delta^2 / 2` and ``k3`` is :math:`e^\delta - \delta - 1`. Gradients flow through the estimate as it
    stands. The gradient of ``k1`` has mean 0 on-policy, so it penalises nothing as a loss; log it, train with k2 or k3.

    Args:
        log_probs: Under the policy being trained. The only input with a gradient.
        ref_log_probs: Under the reference.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        estimator: Which estimate.

    Raises:
        ValueError: If `estimator` is unknown.

    Example:
        >>> kl_penalty(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.tensor([[True]]))
        tensor([[0.3679]])

    References:
        Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    estimate = choose("estimator", estimator, {"k1": torch.neg, "k2": _k2, "k3": _k3})
    dtype = at_least_float32(torch.promote_types(log_probs.dtype, ref_log_probs.dtype))
    return estimate(torch.where(mask, ref_log_probs.detach().to(dtype) - log_probs.to(dtype), 0.0))


@typechecked
def aggregate(
    token_losses: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    reduction: Reduction = "token_mean",
    normalizer: float | Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    r"""One loss from the losses of all tokens.

    ========================  ==================================  ====================================
    reduction                 sum of                              divided by `normalizer`, or else by
    ========================  ==================================  ====================================
    ``token_mean`` (DAPO)     token losses                        real tokens
    ``sequence_mean`` (GRPO)  mean token loss of each response    responses with a real token
    ``constant`` (Dr. GRPO)   token losses                        (`normalizer` is required)
    ``sum``                   token losses                        1 (`normalizer` is refused)
    ========================  ==================================  ====================================

    A batch that is one of several (gradient accumulation, data parallel ranks) needs the count over all of them as
    `normalizer`: a mean of means is not the mean. Without any real token the loss is 0, still part of the graph.

    Args:
        token_losses: Loss of each token.
        mask: True at response tokens; elsewhere losses may hold anything, even NaN.
        reduction: How to add up.
        normalizer: What the sum is divided by, above 0 (for a tensor, yours to ensure).

    Raises:
        ValueError: If an option is unknown or out of range, or `normalizer` is missing or out of place.

    Example:
        >>> losses, mask = torch.tensor([[1.0, 3.0], [8.0, 0.0]]), torch.tensor([[True, True], [True, False]])
        >>> aggregate(losses, mask), aggregate(losses, mask, reduction="sequence_mean")
        (tensor(4.), tensor(5.))
    """
    choose("reduction", reduction, dict.fromkeys(("token_mean", "sequence_mean", "constant", "sum")))
    if reduction == "constant" and normalizer is None:
        raise ValueError("normalizer is None; reduction='constant' needs one, such as batch size * max response length")
    if reduction == "sum" and normalizer is not None:
        raise ValueError("normalizer must be None with reduction='sum'; pass reduction='constant' to divide the sum")
    if normalizer is not None and not isinstance(normalizer, Tensor) and not normalizer > 0.0:
        raise ValueError(f"normalizer must be above 0, got {normalizer}")
    if reduction == "sequence_mean":
        total, count = masked_mean(token_losses, mask, dim=1).sum(), mask.any(1).sum()
    else:
        total, count = torch.where(mask, token_losses, 0.0).sum(), mask.sum()
    if reduction == "sum":
        return total
    return total / (count.clamp(min=1) if normalizer is None else normalizer)


@typechecked
def grpo_loss(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    ref_log_probs: Float[Tensor, "batch time"] | None = None,
    surrogate: Surrogate = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    max_ratio: float = 5.0,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    reduction: Reduction = "token_mean",
    normalizer: float | Float[Tensor, ""] | None = None,
) -> LossOutput:
    r"""GRPO's loss with an advantage per token, and its metrics.

    .. math:: \mathcal L = \operatorname{aggregate}_t\bigl(\ell_t + \beta\, \widehat{\mathrm{KL}}_t\bigr)

    Plain GRPO is ``advantages[:, None].expand_as(log_probs)``; SRPO is :func:`~srpo_core.role_advantages`. The KL
    penalty is not weighted. No host sync; compiles whole.

    Args:
        log_probs: Each sampled token under the policy being trained, nats. The only input with a gradient.
        old_log_probs: The same tokens under the policy that sampled them, by the same code path.
        advantages: Credit of each token.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN. A NaN at a real token makes
            the loss NaN.
        ref_log_probs: The same tokens under the reference policy; required where `kl_coef` is above 0.
        surrogate: ``clip`` (:func:`clipped_surrogate`), ``cispo``, ``sapo``, ``gspo_token`` or ``gspo``.
        clip_low: For ``clip``, ``gspo_token`` and ``gspo``, in [0, 1).
        clip_high: Likewise, at least 0.
        dual_clip: For ``clip``, above 1, or None.
        max_ratio: For ``cispo``, above 0.
        temperature_positive: For ``sapo``, above 0.
        temperature_negative: For ``sapo``, above 0.
        kl_coef: :math:`\beta`, at least 0.
        kl_estimator: See :func:`kl_penalty`.
        reduction: See :func:`aggregate`.
        normalizer: See :func:`aggregate`.

    Returns:
        ``loss``, and detached 0-d ``metrics`` over the real tokens: ``loss/policy``, ``clip/low`` and ``clip/high``
        (share of tokens that a PPO clip holds back, whatever the surrogate), ``clip/dual``, ``ratio/mean``,
        ``ratio/min``, ``ratio/max``, ``kl/old`` (k3 of the sampling policy, nats) and, with a reference,
        ``kl/reference`` (nats).

    Raises:
        ValueError: If an option is unknown or out of range, or `ref_log_probs` is missing.

    Example:
        >>> log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> loss, metrics = grpo_loss(log_probs, log_probs.detach(), torch.tensor([[1.0, 3.0]]),
        ...                           torch.tensor([[True, True]]))
        >>> loss.backward()
        >>> log_probs.grad
        tensor([[-0.5000, -1.5000]])

    References:
        GRPO, arXiv:2402.03300, eq. 3.
    """
    policy, penalty = token_losses(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        ref_log_probs=ref_log_probs,
        surrogate=surrogate,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        max_ratio=max_ratio,
        temperature_positive=temperature_positive,
        temperature_negative=temperature_negative,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    policy_loss = aggregate(policy, mask, reduction=reduction, normalizer=normalizer)
    metrics = {"loss/policy": policy_loss.detach()}
    metrics |= _ratio_metrics(log_probs, old_log_probs, advantages, mask, clip_low, clip_high, dual_clip)
    loss = policy_loss
    if penalty is not None:
        metrics["kl/reference"] = masked_mean(penalty.detach(), mask)
        if kl_coef > 0.0:
            loss = policy_loss + kl_coef * aggregate(penalty, mask, reduction=reduction, normalizer=normalizer)
    return LossOutput(loss, metrics)


def token_losses(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_log_probs: Tensor | None,
    surrogate: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    max_ratio: float,
    temperature_positive: float,
    temperature_negative: float,
    kl_coef: float,
    kl_estimator: KLEstimator,
) -> tuple[Tensor, Tensor | None]:
    """Policy loss and KL penalty (None without a reference) of each token: what `grpo_loss` and its fused twin share.

    Every surrogate but the two of GSPO treats each token by itself, so any part of a batch may be asked alone.
    """
    if not kl_coef >= 0.0:
        raise ValueError(f"kl_coef must be at least 0, got {kl_coef}")
    if kl_coef > 0.0 and ref_log_probs is None:
        raise ValueError("ref_log_probs is None; kl_coef above 0 needs the reference policy's log-probs")
    _check_clips(clip_low, clip_high)
    inputs = (log_probs, old_log_probs, advantages, mask)
    surrogates = {
        "clip": lambda: clipped_surrogate(*inputs, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip),
        "cispo": lambda: cispo_surrogate(*inputs, max_ratio=max_ratio),
        "sapo": lambda: sapo_surrogate(
            *inputs, temperature_positive=temperature_positive, temperature_negative=temperature_negative
        ),
        "gspo_token": lambda: gspo_token_surrogate(*inputs, clip_low=clip_low, clip_high=clip_high),
        "gspo": lambda: gspo_surrogate(*inputs, clip_low=clip_low, clip_high=clip_high),
    }
    policy = choose("surrogate", surrogate, surrogates)()
    penalty = None if ref_log_probs is None else kl_penalty(log_probs, ref_log_probs, mask, estimator=kl_estimator)
    return policy, penalty


def _masked_inputs(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-ratio and advantages, 0 at padding: masked first, so that padding has ratio 1 and credit 0 all the way."""
    dtype = at_least_float32(torch.promote_types(log_probs.dtype, old_log_probs.dtype))
    log_ratio = torch.where(mask, log_probs.to(dtype) - old_log_probs.detach().to(dtype), 0.0)
    return log_ratio, torch.where(mask, advantages.detach().to(dtype), 0.0)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _k2(log_ratio: Tensor) -> Tensor:
    return 0.5 * log_ratio.square()


def _k3(log_ratio: Tensor) -> Tensor:
    # expm1 keeps the precision that exp - 1 loses near 0, where a policy close to its reference lives.
    return torch.expm1(log_ratio.clamp(max=MAX_LOG_RATIO)) - log_ratio


def _check_clips(clip_low: float, clip_high: float) -> None:
    if not 0.0 <= clip_low < 1.0:
        raise ValueError(f"clip_low must be in [0, 1), got {clip_low}")
    if not clip_high >= 0.0:
        raise ValueError(f"clip_high must be at least 0, got {clip_high}")


@torch.no_grad()
def _ratio_metrics(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> dict[str, Tensor]:
    log_ratio, advantages = _masked_inputs(log_probs, old_log_probs, advantages, mask)
    ratio = _ratio(log_ratio)

    def share(tokens: Tensor) -> Tensor:
        return masked_mean(tokens.to(ratio.dtype), mask)

    return {
        "clip/low": share((ratio < 1.0 - clip_low) & (advantages < 0)),
        "clip/high": share((ratio > 1.0 + clip_high) & (advantages > 0)),
        "clip/dual": share((ratio > (dual_clip or torch.inf)) & (advantages < 0)),
        "ratio/mean": masked_mean(ratio, mask, empty=1.0),
        "ratio/min": masked_min(ratio, mask, empty=1.0),
        "ratio/max": masked_max(ratio, mask, empty=1.0),
        # The tokens were drawn from the old policy, so this estimates KL(old || new).
        "kl/old": masked_mean(_k3(log_ratio), mask),
    }
