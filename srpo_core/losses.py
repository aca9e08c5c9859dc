"""Token advantages -> a loss: the surrogate of each token, KL penalties, aggregation."""

import math
from typing import NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from srpo_core.checked import choose
from srpo_core.masking import at_least_float32, is_barred, log_ratio_of, masked_max, masked_mean, masked_min
from srpo_core.options import KLEstimator, LossOptions, Reduction
from srpo_core.surrogates import masked_log_ratio, ratio_of
from srpo_core.typechecking import typechecked

__all__ = ["LossOutput", "aggregate", "grpo_loss", "kl_penalty"]

# Nats. From here on k3 is its tangent, with the slope of a token that is 148 times as likely under the reference.
_TANGENT_FROM = 5.0


class LossOutput(NamedTuple):
    """A loss to call ``backward`` on, and its metrics."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Float[Tensor, ""]]


@typechecked
def kl_penalty(
    log_probs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    ref_log_probs: Float[Tensor, "batch time"],
    estimator: KLEstimator = "k3",
    old_log_probs: Float[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time"]:
    r"""Estimate, from the sampled token, of :math:`\mathrm{KL}(\pi \| \pi_\text{ref})` at each token, nats.

    With :math:`\delta = \log \pi_\text{ref}(y_t) - \log \pi(y_t)`: ``k1`` is :math:`-\delta`, ``k2`` is
    :math:`\delta^2 / 2`, ``k3`` is :math:`e^\delta - \delta - 1` and ``abs`` is :math:`|\delta|`, which estimates no KL
    but penalizes each nat alike. The gradient is that of the estimate itself.
    On-policy the gradient of ``k1`` has mean 0, so as a loss it penalizes nothing: log ``k1``, and train with ``k2`` or
    ``k3``.

    Above :math:`\delta` = 5 nats ``k3`` continues along its tangent. Otherwise one outlier token would dominate a batch
    (:math:`e^{20}` is 5e8). Cutting its value off, as some trainers do, would remove the gradient of just the token
    that is furthest from the reference. This is a choice of this project. A token that one of the two policies bars
    (:math:`-\infty`) has :math:`\delta = \pm 20`, and a token that both policies bar has :math:`\delta = 0`; neither
    has a gradient.

    With `old_log_probs` the estimate is multiplied by the importance ratio :math:`\rho_t = \pi(y_t) /
    \pi_\text{old}(y_t)`, which has its gradient as well. The tokens come from :math:`\pi_\text{old}`, so without
    the ratio the estimate is biased as soon as the policy has moved; with it the expectation of ``k3`` and of ``k1`` is
    the KL, and the expected gradient is that of the KL.

    Args:
        log_probs: Each token under the policy being trained, nats. The only input with a gradient.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        ref_log_probs: The same tokens under the reference policy, nats.
        estimator: Which estimate.
        old_log_probs: The same tokens under the policy that sampled them, nats. None: the estimate is not multiplied.

    Raises:
        ValueError: If `estimator` is unknown.

    Example:
        >>> kl_penalty(torch.tensor([[-1.0]]), torch.tensor([[True]]), ref_log_probs=torch.tensor([[-2.0]]))
        tensor([[0.3679]])

    References:
        Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html; the ratio: DeepSeek-V3.2,
        arXiv:2512.02556.
    """
    estimate = choose("estimator", estimator, {"k1": torch.neg, "k2": _k2, "k3": k3, "abs": torch.abs})
    ref_log_probs = ref_log_probs.detach()
    if old_log_probs is None:
        return estimate(log_ratio_of(ref_log_probs, log_probs, mask))
    old_log_probs = old_log_probs.detach()
    # A product has two gradients: a token that any policy bars must have neither.
    barred = is_barred(ref_log_probs) | is_barred(old_log_probs)
    log_probs = torch.where(barred, log_probs.detach(), log_probs)
    ratio = ratio_of(log_ratio_of(log_probs, old_log_probs, mask))
    return ratio * estimate(log_ratio_of(ref_log_probs, log_probs, mask))


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
    ``sequence_sum`` (LUSPO)  token losses                        responses with a real token
    ``constant`` (Dr. GRPO)   token losses                        (`normalizer` is required)
    ``sum``                   token losses                        1 (`normalizer` is refused)
    ========================  ==================================  ====================================

    Where a batch is one of several (gradient accumulation, data-parallel ranks), pass the count over all of them as
    `normalizer`, because a mean of means is not the mean. Without any real token the loss is 0, and still part of the
    graph.

    Args:
        token_losses: The loss of each token.
        mask: True at response tokens; elsewhere losses may hold anything, even NaN.
        reduction: How the losses are added up.
        normalizer: What the sum is divided by, above 0. The value of a tensor is not checked.

    Raises:
        ValueError: If `reduction` is unknown, or `normalizer` is out of range, missing or out of place.

    Example:
        >>> losses, mask = torch.tensor([[1.0, 3.0], [8.0, 0.0]]), torch.tensor([[True, True], [True, False]])
        >>> aggregate(losses, mask), aggregate(losses, mask, reduction="sequence_mean")
        (tensor(4.), tensor(5.))
    """
    choose("reduction", reduction, dict.fromkeys(get_args(Reduction)))
    if reduction == "constant" and normalizer is None:
        raise ValueError("normalizer is None; reduction='constant' needs one, such as batch size * max response length")
    if reduction == "sum" and normalizer is not None:
        raise ValueError("normalizer must be None with reduction='sum'; pass reduction='constant' to divide the sum")
    if normalizer is not None and not isinstance(normalizer, Tensor) and not normalizer > 0.0:
        raise ValueError(f"normalizer must be above 0, got {normalizer}")
    # Half precision neither adds up many tokens nor, in float16, holds their sum.
    token_losses = token_losses.to(at_least_float32(token_losses.dtype))
    if reduction == "sequence_mean":
        total = masked_mean(token_losses, mask, dim=1).sum()
    else:
        total = torch.where(mask, token_losses, 0.0).sum()
    count = mask.any(1).sum() if reduction in ("sequence_mean", "sequence_sum") else mask.sum()
    if reduction == "sum":
        return total
    return total / (count.clamp(min=1) if normalizer is None else normalizer)


@typechecked
def grpo_loss(
    log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    options: LossOptions = LossOptions(),
    *,
    old_log_probs: Float[Tensor, "batch time"],
    ref_log_probs: Float[Tensor, "batch time"] | None = None,
    normalizer: float | Float[Tensor, ""] | None = None,
) -> LossOutput:
    r"""GRPO's loss with an advantage per token, and its metrics.

    .. math:: \mathcal L = \operatorname{aggregate}_t\bigl(\ell_t + \beta\, \widehat{\mathrm{KL}}_t\bigr)

    For plain GRPO pass ``advantages[:, None].expand_as(log_probs)``, for SRPO the advantages of
    :func:`~srpo_core.srpo_advantages`. The KL penalty is not weighted. The function never waits for the device, and
    compiles as a whole.

    Args:
        log_probs: Each sampled token under the policy being trained, nats. The only input with a gradient.
        advantages: The advantage of each token.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN. A NaN at a real token makes
            the loss NaN, and so does a log-prob of plus infinity; one of minus infinity is a barred token, whose
            gradient is 0. A loss beyond the largest number of its dtype is infinite or NaN.
        options: The surrogate :math:`\ell`, the weight :math:`\beta` of the KL penalty, and how losses are added up.
        old_log_probs: The same tokens under the policy that sampled them, nats, by the same code path.
        ref_log_probs: The same tokens under the reference policy, nats; required where `kl_coef` is above 0.
        normalizer: What the summed loss is divided by, see :func:`aggregate`.

    Returns:
        ``loss``, and detached 0-d ``metrics`` over the real tokens: ``loss/policy``, those of the surrogate,
        ``ratio/mean``, ``ratio/min``, ``ratio/max``, ``kl/old`` (k3 of the sampling policy, nats), with a reference
        ``kl/reference`` (nats), and with `off_policy_threshold` ``off_policy/dropped``, the share of the tokens that
        it keeps from training.

    Raises:
        ValueError: If `ref_log_probs` or `normalizer` is missing, or `log_probs` has no gradient and `advantages` or
            `old_log_probs` has one.

    Example:
        >>> log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> loss, metrics = grpo_loss(log_probs, torch.tensor([[1.0, 3.0]]), torch.tensor([[True, True]]),
        ...                           old_log_probs=log_probs.detach())
        >>> loss.backward()
        >>> log_probs.grad
        tensor([[-0.5000, -1.5000]])

    References:
        GRPO, arXiv:2402.03300, eq. 3; `off_policy_threshold`: DeepSeek-V3.2, arXiv:2512.02556.
    """
    policy, penalty = token_losses(
        log_probs, advantages, mask, options, old_log_probs=old_log_probs, ref_log_probs=ref_log_probs
    )
    policy_loss = aggregate(policy, mask, reduction=options.reduction, normalizer=normalizer)
    metrics = {"loss/policy": policy_loss.detach()}
    metrics |= _ratio_metrics(log_probs, advantages, mask, options, old_log_probs=old_log_probs)
    loss = policy_loss
    if penalty is not None:
        metrics["kl/reference"] = masked_mean(penalty.detach(), mask)
        if options.kl_coef > 0.0:
            summed = aggregate(penalty, mask, reduction=options.reduction, normalizer=normalizer)
            loss = policy_loss + options.kl_coef * summed
    return LossOutput(loss, metrics)


def token_losses(
    log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    options: LossOptions,
    *,
    old_log_probs: Tensor,
    ref_log_probs: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Policy loss and KL penalty (None without a reference) of each token: what `grpo_loss` and its fused twin share.

    Options that are not of the sequence level treat each token by itself, so any part of a batch may be asked alone.
    """
    if options.kl_coef > 0.0 and ref_log_probs is None:
        raise ValueError("ref_log_probs is None; kl_coef above 0 needs the reference policy's log-probs")
    policy = options.surrogate(log_probs, advantages, mask, old_log_probs=old_log_probs)
    if options.off_policy_threshold is not None:
        log_ratio, advantages = masked_log_ratio(log_probs.detach(), advantages, mask, old_log_probs=old_log_probs)
        policy = torch.where(_dropped(log_ratio, advantages, mask, options.off_policy_threshold), 0.0, policy)
    if ref_log_probs is None:
        return policy, None
    return policy, kl_penalty(
        log_probs,
        mask,
        ref_log_probs=ref_log_probs,
        estimator=options.kl_estimator,
        old_log_probs=old_log_probs if options.kl_correction == "ratio" else None,
    )


def _dropped(log_ratio: Tensor, advantages: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Where a token is pushed down by a response that the policy has already left far behind."""
    # NaN is not above the threshold: it stays, and shows in the loss.
    return (advantages < 0) & (-masked_mean(log_ratio, mask, dim=1)[:, None] > threshold)


def _k2(log_ratio: Tensor) -> Tensor:
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """Schulman's third estimate of a KL from the log-ratio of one sample; linear above 5 nats."""
    # expm1 keeps the precision that exp - 1 loses near 0, where a policy close to its reference lives.
    bounded = log_ratio.clamp(max=_TANGENT_FROM)
    # Not clamp: at the bound itself both clamps would pass a gradient, twice the slope.
    beyond = torch.relu(log_ratio - _TANGENT_FROM)
    return torch.expm1(bounded) - bounded + math.expm1(_TANGENT_FROM) * beyond


@torch.no_grad()
def _ratio_metrics(
    log_probs: Tensor, advantages: Tensor, mask: Tensor, options: LossOptions, *, old_log_probs: Tensor
) -> dict[str, Tensor]:
    log_ratio, advantages = masked_log_ratio(log_probs, advantages, mask, old_log_probs=old_log_probs)
    ratio = ratio_of(log_ratio)
    metrics = options.surrogate.metrics(log_ratio, advantages, mask)
    if options.off_policy_threshold is not None:
        dropped = _dropped(log_ratio, advantages, mask, options.off_policy_threshold)
        metrics["off_policy/dropped"] = masked_mean(dropped.to(ratio.dtype), mask)
    return metrics | {
        "ratio/mean": masked_mean(ratio, mask, empty=1.0),
        "ratio/min": masked_min(ratio, mask, empty=1.0),
        "ratio/max": masked_max(ratio, mask, empty=1.0),
        # The tokens were drawn from the old policy, so this estimates KL(old || new).
        "kl/old": masked_mean(k3(log_ratio), mask),
    }
