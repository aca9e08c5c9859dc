"""Every option of the method as flat fields of TRL's own config."""

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from trl import GRPOConfig

import srpo_core
from srpo_core.contrasts import ContrastKind
from srpo_core.corruption import CorruptionKind
from srpo_core.counterfactuals import CounterfactualKind
from srpo_core.srpo import Scale
from srpo_core.use import Use
from srpo_core.weights import Baseline, Renormalization, Sign, WeightMap

__all__ = ["SRPOConfig"]

_CORE = srpo_core.SRPOConfig()


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class SRPOConfig(GRPOConfig):
    """:class:`trl.GRPOConfig` with the options of SRPO (arXiv:2605.07274), all named ``srpo_*``.

    Names, meanings, ranges and defaults are those of :class:`srpo_core.SRPOConfig` without the prefix. What TRL has an
    option for (loss, clipping, KL, normalisation of rewards) stays TRL's. ``TrlParser`` reads every field from YAML and
    from the command line.

    Raises:
        ValueError: If an option is unknown or out of range, or another option contradicts token weights.
    """

    srpo_strength: float = field(
        default=_CORE.strength,
        metadata=_help("How far weights may move from 1; at 0 training is GRPO, bit for bit, with SRPO's metrics."),
    )

    # What each response token does
    srpo_perception_tags: list[str] = field(
        default_factory=lambda: list(_CORE.tags.perception),
        metadata=_help("Opening and closing tag around what the model says it sees."),
    )
    srpo_reasoning_tags: list[str] = field(
        default_factory=lambda: list(_CORE.tags.reasoning),
        metadata=_help("Opening and closing tag around what the model concludes."),
    )
    srpo_answer_tags: list[str] = field(
        default_factory=lambda: list(_CORE.tags.answer or ()),
        metadata=_help("Opening and closing tag around the answer; an empty list if answers are not tagged."),
    )
    srpo_answer_role: Literal["reasoning", "other"] = field(
        default=_CORE.answer_role, metadata=_help("Whether answer tokens are weighted like reasoning or keep weight 1.")
    )

    # The two contexts that a response is scored under once more
    srpo_corruption: CorruptionKind = field(
        default=_CORE.corruption,
        metadata=_help("What is done to the image; `none` scores the prompt without any image."),
    )
    srpo_corruption_strength: float | None = field(
        default=_CORE.corruption_strength,
        metadata=_help(
            "How much of it, in the unit of its kind (a share of patches, a standard deviation, pixels). Default: the "
            "kind's own."
        ),
    )
    srpo_seed: int = field(
        default=_CORE.seed,
        metadata=_help(
            "Seed of the corruption, which draws from a generator of its own, keyed on seed, step and prompt."
        ),
    )
    srpo_counterfactual: CounterfactualKind = field(
        default=_CORE.counterfactual,
        metadata=_help(
            "What is done to the perception that the reasoning is conditioned on: `swap` it for another response's, "
            "`drop` it, or `mask` it (only where masking equals removal: the Qwen-VL families)."
        ),
    )
    srpo_counterfactual_image: Literal["kept", "corrupted"] = field(
        default=_CORE.counterfactual_image, metadata=_help("The image in that second context.")
    )

    # The use score, this project's extension: one context more for each span of the perception
    srpo_use_spans: int = field(
        default=_CORE.use_spans,
        metadata=_help(
            "Spans, at most, that the perception is cut into; the response is scored once more without each of them, "
            "so perception tokens count for what the reasoning owes to them too. An extension of this project, not "
            "SRPO's. 0: off."
        ),
    )
    srpo_use: Use = field(
        default=_CORE.use,
        metadata=_help(
            "What that does to the scores of perception tokens: `product` multiplies each by its use, `share` deals "
            "their mean out by use. Only with srpo_use_spans."
        ),
    )

    # From log-probabilities to weights
    srpo_visual_score: ContrastKind = field(default="log_ratio", metadata=_help("Score of perception tokens."))
    srpo_consistency_score: ContrastKind = field(default="log_ratio", metadata=_help("Score of reasoning tokens."))
    srpo_score_clip: float = field(default=_CORE.score_clip, metadata=_help("Bound of both scores, nats."))
    srpo_baseline: Baseline = field(
        default=_CORE.baseline, metadata=_help("What is subtracted from the scores of a trajectory.")
    )
    srpo_weight_map: WeightMap = field(
        default=_CORE.weight_map, metadata=_help("From centred scores to positive weights.")
    )
    srpo_renormalization: Renormalization = field(
        default=_CORE.renormalization, metadata=_help("Over what the weights are brought to mean one.")
    )
    srpo_scale: Scale = field(
        default=_CORE.scale,
        metadata=_help("Unit of the scores: fixed, or the root mean square of this batch or of a moving average."),
    )
    srpo_visual_scale: float = field(
        default=_CORE.visual_scale, metadata=_help("Scale of visual scores, nats or multiples of that unit.")
    )
    srpo_consistency_scale: float = field(
        default=_CORE.consistency_scale, metadata=_help("Scale of consistency scores, likewise.")
    )
    srpo_scale_decay: float = field(
        default=_CORE.scale_decay, metadata=_help("Decay of the moving average, in [0, 1).")
    )
    srpo_bound: float = field(
        default=_CORE.bound, metadata=_help("Bound of a centred score before it is exponentiated, nats.")
    )
    srpo_sign: Sign = field(
        default=_CORE.sign,
        metadata=_help("`advantage`: of a wrong answer, supported tokens are pushed down less instead of more."),
    )
    srpo_mix: float = field(default=_CORE.mix, metadata=_help("Share of the weights in the mixture with weight 1."))
    srpo_mix_warmup_steps: int = field(
        default=_CORE.mix_warmup_steps, metadata=_help("Optimiser steps over which the mixture ramps up.")
    )

    srpo_rollouts: str | None = field(
        default=None,
        metadata=_help(
            "File (JSON Lines) to which every training batch is written, for `srpo report` and its kin; resuming "
            "appends to it."
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} gives a whole response one ratio, under "
                "which token weights of mean one cancel: set importance_sampling_level='token', or train with "
                "trl.GRPOTrainer"
            )
        self.srpo_options()

    def srpo_options(self) -> srpo_core.SRPOConfig:
        """The same options as the core keeps them."""
        for name in ("srpo_visual_score", "srpo_consistency_score"):
            score, known = getattr(self, name), get_args(ContrastKind)
            if score not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, known))}, got {score!r}: "
                    "TRL returns the log-probability of the sampled token alone"
                )
        if self.srpo_use != _CORE.use and self.srpo_use_spans == 0:
            raise ValueError(
                f"srpo_use={self.srpo_use!r} says how a use score enters, and srpo_use_spans=0 makes none: set "
                "srpo_use_spans to the number of spans, each of which is one more forward pass, or leave srpo_use out"
            )
        options = {
            option.name.removeprefix("srpo_"): getattr(self, option.name)
            for option in fields(self)
            if option.name.startswith("srpo_") and option.name != "srpo_rollouts"
        }
        try:
            tags = srpo_core.RoleTags(
                options.pop("perception_tags"), options.pop("reasoning_tags"), options.pop("answer_tags") or None
            )
            return srpo_core.SRPOConfig(tags=tags, **options)
        except ValueError as error:
            raise ValueError(f"an srpo_* option is wrong: {error}") from error
