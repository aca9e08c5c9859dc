"""Role-aware token credit for GRPO on vision-language models.

SRPO (Structured Role-aware Policy Optimization, arXiv:2605.07274) as its abstract describes it. One path, one pure
function an arrow::

    response tokens --segment--> roles --+
    image --corrupt--> views --policy--> log-probs --contrast--> scores --shared baseline--> weights
                                                              weights x GRPO advantage --> token advantages --> loss
"""

from srpo_core.advantages import group_advantages, role_advantages
from srpo_core.contrasts import perception_consistency, visual_dependency
from srpo_core.corruption import corrupt_images, corrupt_pixel_values
from srpo_core.counterfactuals import CounterfactualResponses, counterfactual_responses
from srpo_core.diagnostics import credit_metrics
from srpo_core.fused import (
    LogProbsAndEntropy,
    fused_linear_grpo_loss,
    fused_linear_jsd,
    fused_linear_kl,
    fused_linear_log_probs,
    fused_linear_log_probs_and_entropy,
    fused_linear_srpo_loss,
)
from srpo_core.log_probs import token_divergence, token_entropy, token_log_probs
from srpo_core.losses import (
    LossOutput,
    aggregate,
    cispo_surrogate,
    clipped_surrogate,
    grpo_loss,
    gspo_surrogate,
    gspo_token_surrogate,
    kl_penalty,
    sapo_surrogate,
)
from srpo_core.roles import (
    BrokenReason,
    Role,
    RoleTagIds,
    RoleTags,
    Segmentation,
    segment_responses,
    segment_roles,
)
from srpo_core.srpo import RoleAdvantages, SRPOConfig, srpo_advantages, srpo_loss
from srpo_core.use import (
    SpanCounterfactuals,
    apply_use,
    perception_spans,
    perception_use,
    span_counterfactuals,
    span_use,
)
from srpo_core.weights import RoleScales, ScaleState, mix_schedule, role_scales, shared_baseline_weights

__all__ = [
    "BrokenReason",
    "CounterfactualResponses",
    "LogProbsAndEntropy",
    "LossOutput",
    "Role",
    "RoleAdvantages",
    "RoleScales",
    "RoleTagIds",
    "RoleTags",
    "SRPOConfig",
    "ScaleState",
    "Segmentation",
    "SpanCounterfactuals",
    "aggregate",
    "apply_use",
    "cispo_surrogate",
    "clipped_surrogate",
    "corrupt_images",
    "corrupt_pixel_values",
    "counterfactual_responses",
    "credit_metrics",
    "fused_linear_grpo_loss",
    "fused_linear_jsd",
    "fused_linear_kl",
    "fused_linear_log_probs",
    "fused_linear_log_probs_and_entropy",
    "fused_linear_srpo_loss",
    "group_advantages",
    "grpo_loss",
    "gspo_surrogate",
    "gspo_token_surrogate",
    "kl_penalty",
    "mix_schedule",
    "perception_consistency",
    "perception_spans",
    "perception_use",
    "role_advantages",
    "role_scales",
    "sapo_surrogate",
    "segment_responses",
    "segment_roles",
    "shared_baseline_weights",
    "span_counterfactuals",
    "span_use",
    "srpo_advantages",
    "srpo_loss",
    "token_divergence",
    "token_entropy",
    "token_log_probs",
    "visual_dependency",
]
