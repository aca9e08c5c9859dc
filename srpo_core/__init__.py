"""Role-aware token credit for GRPO on vision-language models.

SRPO (Structured Role-aware Policy Optimization, arXiv:2605.07274) as its abstract describes it. There is one path, and
each arrow is one pure function::

    response tokens --segment--> roles --+
    image --corrupt--> views --policy--> log-probs --contrast--> scores --shared baseline--> weights
                                                              weights x GRPO advantage --> token advantages --> loss
"""

from srpo_core.advantages import group_advantages, role_advantages
from srpo_core.batch import RolloutBatch, credit, plan
from srpo_core.contrasts import perception_consistency, visual_dependency
from srpo_core.corruption import corrupt_images
from srpo_core.counterfactuals import counterfactual_responses
from srpo_core.fused import fused_linear_grpo_loss, fused_linear_log_probs
from srpo_core.log_probs import token_divergence, token_log_probs
from srpo_core.losses import LossOutput, aggregate, grpo_loss, kl_penalty
from srpo_core.options import ContextOptions, CreditOptions, LossOptions, SRPOConfig
from srpo_core.output_layer import OutputLayer
from srpo_core.pixel_values import corrupt_pixel_values
from srpo_core.prompting import extract_answer, format_reward, system_prompt
from srpo_core.roles import Role, Segmentation, segment_responses, segment_roles
from srpo_core.srpo import Credit, srpo_advantages, srpo_loss
from srpo_core.tags import RoleTags
from srpo_core.weights import ScaleState, shared_baseline_weights

__version__ = "0.1.0"

__all__ = [
    "ContextOptions",
    "Credit",
    "CreditOptions",
    "LossOptions",
    "LossOutput",
    "OutputLayer",
    "Role",
    "RoleTags",
    "RolloutBatch",
    "SRPOConfig",
    "ScaleState",
    "Segmentation",
    "aggregate",
    "corrupt_images",
    "corrupt_pixel_values",
    "counterfactual_responses",
    "credit",
    "extract_answer",
    "format_reward",
    "fused_linear_grpo_loss",
    "fused_linear_log_probs",
    "group_advantages",
    "grpo_loss",
    "kl_penalty",
    "perception_consistency",
    "plan",
    "role_advantages",
    "segment_responses",
    "segment_roles",
    "shared_baseline_weights",
    "srpo_advantages",
    "srpo_loss",
    "system_prompt",
    "token_divergence",
    "token_log_probs",
    "visual_dependency",
]
