"""The whole path as one call: log-probabilities of three contexts -> token advantages, or a loss."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.advantages import role_advantages
from srpo_core.contrasts import clip_divergence, contrast
from srpo_core.diagnostics import credit_metrics
from srpo_core.losses import LossOutput, grpo_loss
from srpo_core.masking import check_finite, check_no_nan, log_probs_where_real
from srpo_core.options import DIVERGENCES, CreditOptions, SRPOConfig
from srpo_core.reliance import apply_reliance
from srpo_core.roles import check_roles, role_masks
from srpo_core.typechecking import typechecked
from srpo_core.weights import RoleScales, ScaleState, role_scales, shared_baseline_weights

__all__ = ["Credit", "srpo_advantages", "srpo_loss"]


class Credit(NamedTuple):
    """Token advantages, and everything that they were made of. All tensors are detached.

    Attributes:
        advantages: The advantage of each token.
        weights: The weight of each token, 1 on average over a trajectory's perception and reasoning tokens.
        scores: The score of each token under its role, nats.
        scale_state: For ``scale="ema_rms"``: pass it to the next call, and save it in checkpoints.
        metrics: 0-d tensors by name, from :func:`~srpo_core.diagnostics.credit_metrics`.
        old_log_probs: Each token under its own context, nats.
        corrupted_log_probs: The same tokens with the image corrupted; None if that was not scored.
        counterfactual_log_probs: The same tokens with the perception replaced, at the original positions; None if that
            was not scored.
        donors: The row whose perception replaced that of each row, -1 where there is none; None if it is not known.
    """

    advantages: Float[Tensor, "batch time"]
    weights: Float[Tensor, "batch time"]
    scores: Float[Tensor, "batch time"]
    scale_state: ScaleState | None
    metrics: dict[str, Float[Tensor, ""]]
    old_log_probs: Float[Tensor, "batch time"]
    corrupted_log_probs: Float[Tensor, "batch time"] | None = None
    counterfactual_log_probs: Float[Tensor, "batch time"] | None = None
    donors: Int[Tensor, " batch"] | None = None


_LOG_PROBS = ("old_log_probs", "corrupted_log_probs", "counterfactual_log_probs")


def _sound_where_read(arguments: Mapping[str, Any]) -> None:
    perception, reasoning = role_masks(arguments["roles"], arguments["mask"])
    for name, where, check in (
        ("advantages", arguments["mask"].any(1), check_finite),
        ("visual_divergence", perception, check_no_nan),
        ("consistency_divergence", reasoning, check_no_nan),
        ("reliance", perception, check_finite),
    ):
        if arguments.get(name) is not None:
            check(name, arguments[name], where)


@typechecked(values=(check_roles, log_probs_where_real(*_LOG_PROBS), _sound_where_read))
def srpo_advantages(
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    options: CreditOptions = CreditOptions(),
    *,
    corrupted_log_probs: Float[Tensor, "batch time"] | None = None,
    counterfactual_log_probs: Float[Tensor, "batch time"] | None = None,
    visual_divergence: Float[Tensor, "batch time"] | None = None,
    consistency_divergence: Float[Tensor, "batch time"] | None = None,
    reliance: Float[Tensor, "batch time"] | None = None,
    broken: Int[Tensor, " batch"] | None = None,
    scale_state: ScaleState | None = None,
) -> Credit:
    r"""Token advantages :math:`A_{i,t} = w_{i,t} A_i` of a rollout batch: scores, shared baseline, weights in one call.

    Call it once per rollout batch and reuse the result in every epoch. At `strength` 0 it returns GRPO's advantages
    bit for bit.

    Args:
        old_log_probs: Each token of the rollout under its own context, nats, by the trainer's own code path. Minus
            infinity, here and in the other contexts, stands for a token that was barred; weights stay finite.
        advantages: One per response, from :func:`~srpo_core.group_advantages` or your trainer.
        roles: From :func:`~srpo_core.segment_responses` or :func:`~srpo_core.segment_roles`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        options: How scores become weights. `mix` is read as it is; :meth:`~srpo_core.CreditOptions.at_step` raises it
            over the steps of a run.
        corrupted_log_probs: The same tokens with the image corrupted, by the same code path. None, or rows that are
            equal to the original ones: there is no image, and perception scores are 0.
        counterfactual_log_probs: The same tokens with the perception replaced, carried back to the original
            positions. None: reasoning scores are 0.
        visual_divergence: Needed and read only where `visual_score` is a divergence of full distributions, nats:
            from :func:`~srpo_core.token_divergence`.
        consistency_divergence: Needed and read only where `consistency_score` is one, nats.
        reliance: How much the reasoning relies on each perception token, 1 on average, from
            :mod:`srpo_core.reliance`; it enters the scores by `reliance_mode`. None: the image alone decides. An
            extension of this project, not SRPO's.
        broken: Why each response is malformed, which is only counted; its tokens are ``OTHER`` in `roles` already.
        scale_state: For `scale` ``ema_rms``: ``scale_state`` of the last result, None at the start.

    Returns:
        The advantages, the weights, the scores, the scale state and the metrics.

    Raises:
        ValueError: If a divergence is missing; outside ``torch.compile`` also if a role is outside the enum, a value
            that is read is NaN, a log-prob is plus infinity, or an advantage or the reliance is infinite, for which the
            tensors are read on the host.

    Example:
        >>> log_probs = torch.tensor([[-0.1, -1.0, -0.5]])
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING]])
        >>> srpo_advantages(log_probs, torch.tensor([2.0]), roles, torch.ones(1, 3).bool(),
        ...                 corrupted_log_probs=torch.tensor([[-2.1, -1.0, -0.5]])).advantages
        tensor([[3.7171, 1.1415, 1.1415]])

    References:
        SRPO, arXiv:2605.07274, as its abstract describes it; formulas and defaults are this project's choices.
    """
    perception, reasoning = role_masks(roles, mask)
    visual = _scores(
        "visual", options.visual_score, visual_divergence, perception, options, old_log_probs, corrupted_log_probs
    )
    consistency = _scores(
        "consistency",
        options.consistency_score,
        consistency_divergence,
        reasoning,
        options,
        old_log_probs,
        counterfactual_log_probs,
    )
    scores = visual + consistency  # each is 0 where the other one is not
    if reliance is not None:
        scores = apply_reliance(scores, roles, mask, reliance=reliance, mode=options.reliance_mode)
    scales = None
    if options.scale != "fixed":
        decay = options.scale_decay if options.scale == "ema_rms" else 0.0
        measured, scale_state = role_scales(scores, roles, mask, state=scale_state, decay=decay)
        scales = RoleScales(measured.visual * options.visual_scale, measured.consistency * options.consistency_scale)
    weights = shared_baseline_weights(scores, roles, mask, options, scales=scales, advantages=advantages)
    return Credit(
        role_advantages(weights, advantages, mask),
        weights,
        scores,
        scale_state,
        credit_metrics(weights, roles, mask, scores=scores, broken=broken),
        old_log_probs.detach(),
        *(None if other is None else other.detach() for other in (corrupted_log_probs, counterfactual_log_probs)),
    )


@typechecked(values=(check_roles, log_probs_where_real(*_LOG_PROBS), _sound_where_read), on_device=False)
def srpo_loss(
    log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    options: SRPOConfig = SRPOConfig(),
    *,
    old_log_probs: Float[Tensor, "batch time"],
    corrupted_log_probs: Float[Tensor, "batch time"] | None = None,
    counterfactual_log_probs: Float[Tensor, "batch time"] | None = None,
    visual_divergence: Float[Tensor, "batch time"] | None = None,
    consistency_divergence: Float[Tensor, "batch time"] | None = None,
    reliance: Float[Tensor, "batch time"] | None = None,
    broken: Int[Tensor, " batch"] | None = None,
    ref_log_probs: Float[Tensor, "batch time"] | None = None,
    normalizer: float | Float[Tensor, ""] | None = None,
) -> LossOutput:
    r"""SRPO's loss: GRPO's loss with the advantage of each token weighted by how much it depends on what was seen.

    :func:`srpo_advantages` followed by :func:`~srpo_core.grpo_loss`. The weights come from log-probs that stay fixed
    over the epochs of a rollout batch, so they are the same in each epoch. At `strength` 0 it is GRPO's loss bit for
    bit. The function compiles as a whole. On an accelerator it checks no values, because that would stall the step;
    :func:`srpo_advantages` does.

    Args:
        log_probs: Each sampled token under the policy being trained, nats. The only input with a gradient. Minus
            infinity, here and in the other log-probabilities, stands for a token that was barred; its gradient is 0.
        advantages: One per response.
        roles: From :func:`~srpo_core.segment_responses` or :func:`~srpo_core.segment_roles`.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        options: The options of the weights and of the loss. `scale` ``ema_rms`` has a state, so it needs
            :func:`srpo_advantages` once per rollout batch, then :func:`~srpo_core.grpo_loss`.
        old_log_probs: The same tokens under the policy that sampled them, nats: one side of both contrasts, and the
            denominator of the ratio.
        corrupted_log_probs: The same tokens with the image corrupted. None: perception scores are 0.
        counterfactual_log_probs: The same tokens with the perception replaced. None: reasoning scores are 0.
        visual_divergence: Read where `visual_score` is a divergence, nats.
        consistency_divergence: Read where `consistency_score` is one, nats.
        reliance: How much the reasoning relies on each perception token, 1 on average.
        broken: Why each response is malformed, which is only counted.
        ref_log_probs: The same tokens under the reference policy, nats; required where `kl_coef` is above 0.
        normalizer: What the summed loss is divided by, see :func:`~srpo_core.aggregate`.

    Returns:
        ``loss``, and the ``metrics`` of :func:`~srpo_core.grpo_loss` and
        :func:`~srpo_core.diagnostics.credit_metrics`.

    Raises:
        ValueError: As the two functions, and for `scale` ``ema_rms``.

    Example:
        >>> old = torch.tensor([[-0.1, -1.0, -0.5]])
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING]])
        >>> log_probs = old.clone().requires_grad_()
        >>> loss, metrics = srpo_loss(log_probs, torch.tensor([3.0]), roles, torch.ones(1, 3).bool(),
        ...                           old_log_probs=old, corrupted_log_probs=old - torch.tensor([[2.0, 0.0, 0.0]]))
        >>> loss.backward()
        >>> log_probs.grad
        tensor([[-1.8585, -0.5707, -0.5707]])

    References:
        SRPO, arXiv:2605.07274, as its abstract describes it; formulas and defaults are this project's choices.
    """
    if options.scale == "ema_rms":
        raise ValueError(
            "scale='ema_rms' has a state that must move once per rollout batch, not once per optimizer step: "
            "call srpo_advantages once per rollout batch and pass its advantages to grpo_loss"
        )
    credit = srpo_advantages(
        old_log_probs,
        advantages,
        roles,
        mask,
        options,
        corrupted_log_probs=corrupted_log_probs,
        counterfactual_log_probs=counterfactual_log_probs,
        visual_divergence=visual_divergence,
        consistency_divergence=consistency_divergence,
        reliance=reliance,
        broken=broken,
    )
    loss, metrics = grpo_loss(
        log_probs,
        credit.advantages,
        mask,
        options,
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
        normalizer=normalizer,
    )
    return LossOutput(loss, metrics | credit.metrics)


def _scores(
    role: str,
    kind: str,
    divergence: Tensor | None,
    where: Tensor,
    options: CreditOptions,
    log_probs: Tensor,
    other_log_probs: Tensor | None,
) -> Tensor:
    """Scores of one role's tokens, 0 elsewhere."""
    if kind not in DIVERGENCES:
        other = log_probs if other_log_probs is None else other_log_probs
        return contrast(log_probs, other, where, kind=kind, clip=options.score_clip)
    if divergence is None:
        raise ValueError(f"{role}_divergence is None; {role}_score={kind!r} needs token_divergence(..., kind={kind!r})")
    return clip_divergence(divergence, where, clip=options.score_clip)
