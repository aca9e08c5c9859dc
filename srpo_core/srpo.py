"""The whole path as one call: log-probabilities of three contexts to token advantages, or to a loss."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core._masked import check_no_nan, check_roles
from srpo_core.advantages import Normalization, group_advantages, role_advantages
from srpo_core.contrasts import clip_divergence, contrast
from srpo_core.corruption import CorruptionKind, corrupt_images
from srpo_core.counterfactuals import CounterfactualKind
from srpo_core.diagnostics import credit_metrics
from srpo_core.log_probs import DivergenceKind
from srpo_core.losses import GSPO_REFUSAL, KLEstimator, LossOutput, Reduction, Surrogate, grpo_loss
from srpo_core.roles import Role, RoleTags
from srpo_core.typechecking import choose, typechecked
from srpo_core.use import Use, used
from srpo_core.weights import (
    Baseline,
    Renormalization,
    ScaleState,
    Sign,
    WeightMap,
    mix_schedule,
    role_scales,
    weights_of_scores,
)

__all__ = ["RoleAdvantages", "SRPOConfig", "Scale", "Score", "srpo_advantages", "srpo_loss"]

Score = Literal["log_ratio", "positive", "abs", "k3", "full_kl", "reverse_kl", "jsd", "topk_kl"]
Scale = Literal["fixed", "batch_rms", "ema_rms"]


class RoleAdvantages(NamedTuple):
    """Token advantages, and everything they were made of. All detached."""

    advantages: Float[Tensor, "batch time"]
    weights: Float[Tensor, "batch time"]
    visual_dependency: Float[Tensor, "batch time"]
    perception_consistency: Float[Tensor, "batch time"]
    scale_state: ScaleState | None
    metrics: dict[str, Float[Tensor, ""]]


@typechecked
def srpo_advantages(
    old_log_probs: Float[Tensor, "batch time"],
    corrupted_log_probs: Float[Tensor, "batch time"] | None,
    counterfactual_log_probs: Float[Tensor, "batch time"] | None,
    roles: Int[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch time"],
    *,
    broken: Int[Tensor, " batch"] | None = None,
    strength: float = 1.0,
    visual_score: Score = "log_ratio",
    consistency_score: Score = "log_ratio",
    score_clip: float = 5.0,
    visual_divergence: Float[Tensor, "batch time"] | None = None,
    consistency_divergence: Float[Tensor, "batch time"] | None = None,
    perception_use: Float[Tensor, "batch time"] | None = None,
    use: Use = "product",
    baseline: Baseline = "token",
    weight_map: WeightMap = "exp_tanh",
    renormalization: Renormalization = "trajectory",
    scale: Scale = "fixed",
    visual_scale: float = 1.0,
    consistency_scale: float = 1.0,
    scale_state: ScaleState | None = None,
    scale_decay: float = 0.99,
    bound: float = math.log(2.0),
    sign: Sign = "symmetric",
    mix: float = 1.0,
) -> RoleAdvantages:
    r"""Token advantages :math:`A_{i,t} = w_{i,t} A_i` of a rollout batch: scores, shared baseline, weights in one call.

    Call it once per rollout batch and reuse the result in every epoch. At `strength` 0 it returns GRPO's advantages
    bit for bit.

    Args:
        old_log_probs: Each token of the rollout under its own context, nats, by the trainer's own code path.
        corrupted_log_probs: The same tokens with the image corrupted, by the same code path. None, or equal rows:
            no image, so perception scores are 0.
        counterfactual_log_probs: The same tokens with the perception replaced, carried back to the original
            positions. None: reasoning scores are 0.
        roles: From :func:`~srpo_core.segment_responses` or :func:`~srpo_core.segment_roles`.
        advantages: One per response, from :func:`~srpo_core.group_advantages` or your trainer.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        broken: Why each response is malformed, only to be counted; a broken one is ``OTHER`` in `roles` already.
        strength: 0 is GRPO; see :func:`~srpo_core.shared_baseline_weights`.
        visual_score: Contrast of perception tokens (:func:`~srpo_core.visual_dependency`), or a divergence of full
            distributions (:func:`~srpo_core.token_divergence`), which is then passed as `visual_divergence`.
        consistency_score: Likewise for reasoning tokens, with `consistency_divergence`.
        score_clip: Bound of both scores, nats, above 0.
        visual_divergence: Needed and read only by a divergence as `visual_score`, nats.
        consistency_divergence: Needed and read only by a divergence as `consistency_score`, nats.
        perception_use: What the reasoning owes to each perception token, 1 on average, from
            :func:`~srpo_core.perception_use` or :func:`~srpo_core.span_use`; with it the returned visual dependency
            is the score after use. None: the image alone decides. An extension of this project, not SRPO's.
        use: How the two are combined, :func:`~srpo_core.apply_use`; read only with `perception_use`.
        baseline: See :func:`~srpo_core.shared_baseline_weights`.
        weight_map: See there.
        renormalization: See there.
        scale: Unit of the scores: `visual_scale` and `consistency_scale` (``fixed``), or these times the root mean
            square of the role's scores in this batch (``batch_rms``) or as a moving average (``ema_rms``).
        visual_scale: Nats, or multiples of the root mean square.
        consistency_scale: Likewise.
        scale_state: For ``ema_rms``: ``scale_state`` of the last result, None at the start; save it in checkpoints.
        scale_decay: For ``ema_rms``, in [0, 1).
        bound: See :func:`~srpo_core.shared_baseline_weights`.
        sign: See there.
        mix: See there; :func:`~srpo_core.mix_schedule` ramps it up.

    Returns:
        The advantages, the weights, both scores, the scale state and the metrics of
        :func:`~srpo_core.diagnostics.credit_metrics`.

    Raises:
        ValueError: If an option is unknown or out of range, a role is outside the enum, or a log-prob of a real token
            is NaN (eager mode; the tensors are read on the host).

    Example:
        >>> log_probs = torch.tensor([[-0.1, -1.0, -0.5]])
        >>> corrupted = torch.tensor([[-2.1, -1.0, -0.5]])
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING]])
        >>> srpo_advantages(log_probs, corrupted, None, roles, torch.tensor([2.0]), torch.ones(1, 3).bool()).advantages
        tensor([[3.7171, 1.1415, 1.1415]])

    References:
        SRPO, arXiv:2605.07274, as its abstract describes it; formulas and defaults are this project's choices.
    """
    _check_values(
        roles,
        mask,
        old_log_probs=old_log_probs,
        corrupted_log_probs=corrupted_log_probs,
        counterfactual_log_probs=counterfactual_log_probs,
        visual_divergence=visual_divergence,
        consistency_divergence=consistency_divergence,
        perception_use=perception_use,
    )
    return _role_advantages(
        old_log_probs,
        corrupted_log_probs,
        counterfactual_log_probs,
        roles,
        advantages,
        mask,
        broken=broken,
        strength=strength,
        visual_score=visual_score,
        consistency_score=consistency_score,
        score_clip=score_clip,
        visual_divergence=visual_divergence,
        consistency_divergence=consistency_divergence,
        perception_use=perception_use,
        use=use,
        baseline=baseline,
        weight_map=weight_map,
        renormalization=renormalization,
        scale=scale,
        visual_scale=visual_scale,
        consistency_scale=consistency_scale,
        scale_state=scale_state,
        scale_decay=scale_decay,
        bound=bound,
        sign=sign,
        mix=mix,
    )


@typechecked
def srpo_loss(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    corrupted_log_probs: Float[Tensor, "batch time"] | None,
    counterfactual_log_probs: Float[Tensor, "batch time"] | None,
    roles: Int[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch time"],
    *,
    broken: Int[Tensor, " batch"] | None = None,
    strength: float = 1.0,
    visual_score: Score = "log_ratio",
    consistency_score: Score = "log_ratio",
    score_clip: float = 5.0,
    visual_divergence: Float[Tensor, "batch time"] | None = None,
    consistency_divergence: Float[Tensor, "batch time"] | None = None,
    perception_use: Float[Tensor, "batch time"] | None = None,
    use: Use = "product",
    baseline: Baseline = "token",
    weight_map: WeightMap = "exp_tanh",
    renormalization: Renormalization = "trajectory",
    scale: Scale = "fixed",
    visual_scale: float = 1.0,
    consistency_scale: float = 1.0,
    bound: float = math.log(2.0),
    sign: Sign = "symmetric",
    mix: float = 1.0,
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
    r"""SRPO's loss: GRPO's, each token's advantage weighted by what the token owes to the image or the perception.

    :func:`srpo_advantages` followed by :func:`~srpo_core.grpo_loss`. The weights come from log-probs that stay fixed
    over the epochs of a rollout batch, so they are the same in each. `strength` 0 is GRPO bit for bit. Compiles
    whole; on an accelerator no value is checked, for that would stall the step (:func:`srpo_advantages` checks).

    Args:
        log_probs: Each sampled token under the policy being trained, nats. The only input with a gradient.
        old_log_probs: See :func:`srpo_advantages`; also the denominator of the ratio.
        corrupted_log_probs: See :func:`srpo_advantages`.
        counterfactual_log_probs: See :func:`srpo_advantages`.
        roles: See :func:`srpo_advantages`.
        advantages: One per response.
        mask: True at response tokens; elsewhere the inputs may hold anything, even NaN.
        broken: See :func:`srpo_advantages`.
        strength: See :func:`srpo_advantages`, as all up to `mix`; ``scale="ema_rms"`` has a state, so it needs
            :func:`srpo_advantages` once per rollout batch, then :func:`~srpo_core.grpo_loss`.
        visual_score: See :func:`srpo_advantages`.
        consistency_score: See :func:`srpo_advantages`.
        score_clip: See :func:`srpo_advantages`.
        visual_divergence: See :func:`srpo_advantages`.
        consistency_divergence: See :func:`srpo_advantages`.
        perception_use: See :func:`srpo_advantages`.
        use: See :func:`srpo_advantages`.
        baseline: See :func:`srpo_advantages`.
        weight_map: See :func:`srpo_advantages`.
        renormalization: See :func:`srpo_advantages`.
        scale: See :func:`srpo_advantages`.
        visual_scale: See :func:`srpo_advantages`.
        consistency_scale: See :func:`srpo_advantages`.
        bound: See :func:`srpo_advantages`.
        sign: See :func:`srpo_advantages`.
        mix: See :func:`srpo_advantages`.
        ref_log_probs: See :func:`~srpo_core.grpo_loss`, as all that follow; ``surrogate="gspo"`` needs `strength` 0.
        surrogate: See :func:`~srpo_core.grpo_loss`.
        clip_low: See :func:`~srpo_core.grpo_loss`.
        clip_high: See :func:`~srpo_core.grpo_loss`.
        dual_clip: See :func:`~srpo_core.grpo_loss`.
        max_ratio: See :func:`~srpo_core.grpo_loss`.
        temperature_positive: See :func:`~srpo_core.grpo_loss`.
        temperature_negative: See :func:`~srpo_core.grpo_loss`.
        kl_coef: See :func:`~srpo_core.grpo_loss`.
        kl_estimator: See :func:`~srpo_core.grpo_loss`.
        reduction: See :func:`~srpo_core.aggregate`.
        normalizer: See :func:`~srpo_core.aggregate`.

    Returns:
        ``loss``, and the ``metrics`` of :func:`~srpo_core.grpo_loss` and
        :func:`~srpo_core.diagnostics.credit_metrics`.

    Raises:
        ValueError: As the two functions, and for a sequence-level ratio with weights.

    Example:
        >>> old = torch.tensor([[-0.1, -1.0, -0.5]])
        >>> roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING]])
        >>> log_probs = old.clone().requires_grad_()
        >>> loss, metrics = srpo_loss(log_probs, old, old - torch.tensor([[2.0, 0.0, 0.0]]), None, roles,
        ...                           torch.tensor([3.0]), torch.ones(1, 3).bool())
        >>> loss.backward()
        >>> log_probs.grad
        tensor([[-1.8585, -0.5707, -0.5707]])

    References:
        SRPO, arXiv:2605.07274, as its abstract describes it; formulas and defaults are this project's choices.
    """
    credit = step_credit(
        old_log_probs,
        corrupted_log_probs,
        counterfactual_log_probs,
        roles,
        advantages,
        mask,
        surrogate=surrogate,
        broken=broken,
        strength=strength,
        visual_score=visual_score,
        consistency_score=consistency_score,
        score_clip=score_clip,
        visual_divergence=visual_divergence,
        consistency_divergence=consistency_divergence,
        perception_use=perception_use,
        use=use,
        baseline=baseline,
        weight_map=weight_map,
        renormalization=renormalization,
        scale=scale,
        visual_scale=visual_scale,
        consistency_scale=consistency_scale,
        bound=bound,
        sign=sign,
        mix=mix,
    )
    loss, metrics = grpo_loss(
        log_probs,
        old_log_probs,
        credit.advantages,
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
        reduction=reduction,
        normalizer=normalizer,
    )
    return LossOutput(loss, metrics | credit.metrics)


@dataclass(frozen=True, kw_only=True)
class SRPOConfig:
    """Every option of the method, with the defaults of the functions that read them; checked on construction.

    The functions take plain arguments; this is where a training script or an adapter keeps them together.

    Example:
        >>> config = SRPOConfig(strength=0.5, kl_coef=0.01)
        >>> config.advantage_options()["strength"], config.loss_options()["kl_coef"]
        (0.5, 0.01)
        >>> SRPOConfig(corruption="blurr")
        Traceback (most recent call last):
            ...
        ValueError: corruption must be one of 'patch_mask', 'black', 'gray', 'noise', 'blur', 'pixelate', ...

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    # Roles: segment_responses, segment_roles
    tags: RoleTags = field(default_factory=RoleTags)
    answer_role: Literal["reasoning", "other"] = "reasoning"
    # Contexts: corrupt_images, corrupt_pixel_values, counterfactual_responses
    corruption: CorruptionKind = "patch_mask"
    corruption_strength: float | None = None
    seed: int = 0
    counterfactual: CounterfactualKind = "swap"
    counterfactual_image: Literal["kept", "corrupted"] = "kept"
    # The use score, an extension of this project: span_counterfactuals
    use_spans: int = 0
    # Advantages: group_advantages
    normalization: Normalization = "std"
    epsilon: float = 1e-4
    # Credit: srpo_advantages
    strength: float = 1.0
    visual_score: Score = "log_ratio"
    consistency_score: Score = "log_ratio"
    score_clip: float = 5.0
    use: Use = "product"
    baseline: Baseline = "token"
    weight_map: WeightMap = "exp_tanh"
    renormalization: Renormalization = "trajectory"
    scale: Scale = "fixed"
    visual_scale: float = 1.0
    consistency_scale: float = 1.0
    scale_decay: float = 0.99
    bound: float = math.log(2.0)
    sign: Sign = "symmetric"
    mix: float = 1.0
    mix_warmup_steps: int = 0
    # Loss: grpo_loss
    surrogate: Surrogate = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    max_ratio: float = 5.0
    temperature_positive: float = 1.0
    temperature_negative: float = 1.05
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        for name, annotation in get_type_hints(type(self)).items():
            if get_origin(annotation) is Literal:
                choose(name, getattr(self, name), dict.fromkeys(get_args(annotation)))
        spans = self.use_spans
        if not isinstance(spans, int) or isinstance(spans, bool) or spans < 0:
            raise ValueError(
                f"use_spans must be a whole number of at least 0, got {spans!r}; pass 0 for no use score, or the "
                "number of spans, each of which is one more forward pass"
            )
        # The functions know their ranges: an empty batch asks them.
        tokens, responses = torch.zeros(0, 0), torch.zeros(0)
        ids, mask = responses.long(), tokens.bool()
        if self.corruption != "none":
            images = torch.zeros(0, 3, 1, 1)
            corrupt_images(images, prompt_ids=ids, kind=self.corruption, strength=self.corruption_strength)
        group_advantages(responses, ids, normalization=self.normalization, epsilon=self.epsilon)
        divergences = {"visual_divergence": tokens, "consistency_divergence": tokens}
        options = self.advantage_options(step=0)
        srpo_advantages(tokens, None, None, tokens.long(), responses, mask, **divergences, **options)
        _refuse_sequence_ratio(self.surrogate, self.strength, self.mix)
        normalizer = 1.0 if self.reduction == "constant" else None
        grpo_loss(tokens, tokens, tokens, mask, ref_log_probs=tokens, normalizer=normalizer, **self.loss_options())

    @property
    def use_passes(self) -> int:
        """Forward passes that the use score takes in a trainer: `use_spans`, and none where every weight is 1 anyway.

        That is at `strength` 0 and `mix` 0, where training is GRPO.
        """
        return self.use_spans if self.strength > 0.0 and self.mix > 0.0 else 0

    def advantage_options(self, *, step: int | None = None) -> dict[str, Any]:
        """Keyword arguments for :func:`srpo_advantages` and :func:`srpo_loss`, which takes no ``scale="ema_rms"``.

        With `step`, `mix` is ramped over `mix_warmup_steps`.
        """
        options = self._options(_CREDIT_OPTIONS)
        if self.scale != "ema_rms":
            del options["scale_decay"]  # srpo_loss does not know it
        if step is not None:
            options["mix"] = mix_schedule(step, warmup_steps=self.mix_warmup_steps, mix=self.mix)
        return options

    def loss_options(self) -> dict[str, Any]:
        """Keyword arguments for :func:`~srpo_core.grpo_loss`; `normalizer` is the trainer's to give."""
        return self._options(_LOSS_OPTIONS)

    def _options(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


_FIELDS = tuple(option.name for option in fields(SRPOConfig))
_CREDIT_OPTIONS = _FIELDS[_FIELDS.index("strength") : _FIELDS.index("mix_warmup_steps")]
_LOSS_OPTIONS = _FIELDS[_FIELDS.index("surrogate") :]


def step_credit(
    old_log_probs: Tensor,
    corrupted_log_probs: Tensor | None,
    counterfactual_log_probs: Tensor | None,
    roles: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    surrogate: str,
    visual_divergence: Tensor | None,
    consistency_divergence: Tensor | None,
    perception_use: Tensor | None,
    use: str,
    strength: float,
    scale: str,
    mix: float,
    **options: Any,
) -> RoleAdvantages:
    """Token advantages for a loss of every step: `srpo_advantages` without a state, and no value read off a device."""
    if scale == "ema_rms":
        raise ValueError(
            "scale='ema_rms' has a state that must move once per rollout batch, not once per optimiser step: "
            "call srpo_advantages once per rollout batch and pass its advantages to grpo_loss"
        )
    _refuse_sequence_ratio(surrogate, strength, mix)
    if old_log_probs.device.type == "cpu":
        _check_values(
            roles,
            mask,
            old_log_probs=old_log_probs,
            corrupted_log_probs=corrupted_log_probs,
            counterfactual_log_probs=counterfactual_log_probs,
            visual_divergence=visual_divergence,
            consistency_divergence=consistency_divergence,
            perception_use=perception_use,
        )
    return _role_advantages(
        old_log_probs,
        corrupted_log_probs,
        counterfactual_log_probs,
        roles,
        advantages,
        mask,
        visual_divergence=visual_divergence,
        consistency_divergence=consistency_divergence,
        perception_use=perception_use,
        use=use,
        strength=strength,
        scale=scale,
        mix=mix,
        scale_state=None,
        scale_decay=0.0,
        **options,
    )


def _role_advantages(
    old_log_probs: Tensor,
    corrupted_log_probs: Tensor | None,
    counterfactual_log_probs: Tensor | None,
    roles: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    broken: Tensor | None,
    visual_score: str,
    consistency_score: str,
    score_clip: float,
    visual_divergence: Tensor | None,
    consistency_divergence: Tensor | None,
    perception_use: Tensor | None,
    use: str,
    scale: str,
    visual_scale: float,
    consistency_scale: float,
    scale_state: ScaleState | None,
    scale_decay: float,
    **weight_options: Any,
) -> RoleAdvantages:
    """`srpo_advantages` without the checks of values, so without a host sync."""
    perception, reasoning = mask & (roles == int(Role.PERCEPTION)), mask & (roles == int(Role.REASONING))
    visual = _scores(
        ("visual_score", "visual_divergence"),
        visual_score,
        old_log_probs,
        corrupted_log_probs,
        visual_divergence,
        perception,
        score_clip,
    )
    consistency = _scores(
        ("consistency_score", "consistency_divergence"),
        consistency_score,
        old_log_probs,
        counterfactual_log_probs,
        consistency_divergence,
        reasoning,
        score_clip,
    )
    choose("use", use, dict.fromkeys(get_args(Use)))
    if perception_use is not None:
        visual = used(visual, perception_use, perception, mode=use)
    decay = choose("scale", scale, {"fixed": None, "batch_rms": 0.0, "ema_rms": scale_decay})
    scales: tuple[float | Tensor, float | Tensor] = (visual_scale, consistency_scale)
    if decay is not None:
        measured, scale_state = role_scales(visual, consistency, roles, mask, state=scale_state, decay=decay)
        scales = (measured.visual * visual_scale, measured.consistency * consistency_scale)
    weights = weights_of_scores(
        visual,
        consistency,
        roles,
        mask,
        visual_scale=scales[0],
        consistency_scale=scales[1],
        advantages=advantages,
        **weight_options,
    )
    metrics = credit_metrics(weights, visual, consistency, roles, mask, broken=broken)
    token_advantages = role_advantages(weights, advantages, mask)
    return RoleAdvantages(token_advantages, weights, visual, consistency, scale_state, metrics)


def _scores(
    arguments: tuple[str, str],
    score: str,
    log_probs: Tensor,
    other_log_probs: Tensor | None,
    divergence: Tensor | None,
    where: Tensor,
    clip: float,
) -> Tensor:
    choose(arguments[0], score, dict.fromkeys(get_args(Score)))
    if score in get_args(DivergenceKind):
        if divergence is None:
            raise ValueError(
                f"{arguments[1]} is None; {arguments[0]}={score!r} needs token_divergence(..., kind={score!r})"
            )
        return clip_divergence(divergence, where, clip=clip)
    return contrast(log_probs, log_probs if other_log_probs is None else other_log_probs, where, kind=score, clip=clip)


def _refuse_sequence_ratio(surrogate: str, strength: float, mix: float) -> None:
    if surrogate == "gspo" and strength > 0.0 and mix > 0.0:
        raise ValueError(f"surrogate='gspo' with strength={strength}: {GSPO_REFUSAL}")


def _check_values(roles: Tensor, mask: Tensor, **tensors: Tensor | None) -> None:
    check_roles(roles, mask)
    for argument, values in tensors.items():
        if values is not None:
            check_no_nan(argument, values, mask)
