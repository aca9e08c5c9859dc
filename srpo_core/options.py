"""Every option: what it does, its range and its default. Nowhere else."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from torch import Tensor

from srpo_core.checked import CheckedOptions, OptionError, Range, option
from srpo_core.formats import read_format
from srpo_core.surrogates import Clip, Surrogate
from srpo_core.tags import DEFAULT_TAGS, RoleTags, tag_pair

__all__ = [
    "AMOUNTS",
    "ContextOptions",
    "CreditOptions",
    "GroupOptions",
    "LossOptions",
    "SRPOConfig",
    "adapter_options",
    "trainer_options",
]

AnswerRole = Literal["reasoning", "other"]
CorruptionKind = Literal[
    "patch_mask", "black", "gray", "noise", "blur", "pixelate", "patch_shuffle", "other_image", "none"
]
CounterfactualKind = Literal["swap", "drop", "mask"]
ContrastKind = Literal["log_ratio", "positive", "abs", "k3"]
DivergenceKind = Literal["full_kl", "reverse_kl", "jsd", "topk_kl"]
Score = Literal["log_ratio", "positive", "abs", "k3", "full_kl", "reverse_kl", "jsd", "topk_kl"]
RelianceMode = Literal["product", "share"]
Baseline = Literal["token", "role_balanced", "per_role", "median", "none"]
WeightMap = Literal["exp_tanh", "exp_clip", "one_plus_tanh", "sigmoid", "softplus", "softmax"]
Renormalization = Literal["trajectory", "per_role", "none"]
Scale = Literal["fixed", "batch_rms", "ema_rms"]
Sign = Literal["symmetric", "advantage"]
Normalization = Literal["std", "none", "leave_one_out", "batch_std", "length_weighted"]
RatioLevel = Literal["token", "sequence"]
OutOfBounds = Literal["truncate", "mask"]
KLEstimator = Literal["k3", "k1", "k2", "abs"]
KLCorrection = Literal["none", "ratio"]
Reduction = Literal["token_mean", "sequence_mean", "constant", "sum", "sequence_sum"]

# Beyond e^±40 a float32 weight, its square and its mean over a long response no longer all fit.
MAX_EXPONENT = 40.0


#: How much of each corruption there may be, and is by default. Kinds that are not here take no amount.
AMOUNTS: dict[str, tuple[float, Range, bool]] = {
    # kind: default, range, whole pixels only
    "patch_mask": (0.6, Range(above=0.0, at_most=1.0), False),
    "noise": (0.5, Range(above=0.0, below=math.inf), False),
    "blur": (10.0, Range(above=0.0, below=math.inf), False),
    "pixelate": (28.0, Range(at_least=2.0, below=math.inf), True),
    "patch_shuffle": (1.0, Range(above=0.0, at_most=1.0), False),
}


def problem_of_amount(kind: str, amount: float | None) -> str | None:
    """What is wrong with an amount of a kind of corruption, as the rest of a sentence that begins with its name."""
    if amount is None:
        return None
    if kind not in AMOUNTS:
        return f"has no meaning for kind {kind!r}: leave it out, got {amount}"
    _, bounds, whole = AMOUNTS[kind]
    if whole and not (bounds.holds(amount) and float(amount).is_integer()):
        return f"of kind {kind!r} must be a whole number of pixels, at least 2, got {amount}"
    return None if bounds.holds(amount) else f"of kind {kind!r} must be {bounds}, got {amount}"


@dataclass(frozen=True, kw_only=True)
class ContextOptions(CheckedOptions):
    """How responses are taken apart, and the other contexts in which they are scored."""

    perception_tags: tuple[str, str] = option(
        DEFAULT_TAGS.perception, "Opening and closing tag around what the model says it sees."
    )
    reasoning_tags: tuple[str, str] = option(
        DEFAULT_TAGS.reasoning, "Opening and closing tag around what the model concludes."
    )
    answer_tags: tuple[str, str] | None = option(
        DEFAULT_TAGS.answer, "Opening and closing tag around the answer; empty where answers are not tagged."
    )
    response_format: str = option(
        "",
        "The three of them in one: the name of a published format, or lines such as `perception = <see> ... </see>`, "
        "which also describe headings, JSON, and perceptions inside the reasoning. Empty: the tags above.",
    )
    answer_role: AnswerRole = option(
        "reasoning", "Whether answer tokens are weighted like reasoning tokens or keep weight 1."
    )
    corruption: CorruptionKind = option(
        "patch_mask", "What is done to the image; `none` scores the prompt without any image."
    )
    corruption_amount: float | None = option(
        None, "The amount of the corruption, in the unit of its kind: a share of patches, a standard deviation, pixels."
    )
    seed: int = option(
        0, "Seed of the corruption, whose private generator is keyed on the seed, the step and the prompt."
    )
    counterfactual: CounterfactualKind = option(
        "swap",
        "What is done to the perception that the reasoning follows: `swap` it for another response's, `drop` it, or "
        "`mask` it (exact only where masking equals removal).",
    )
    counterfactual_image: Literal["kept", "corrupted"] = option(
        "kept", "The image in the context with the changed perception."
    )
    reliance_spans: int = option(
        0,
        "The largest number of spans into which the perception is cut. The response is scored once more without each "
        "span, so that the score of a perception token also says how much the reasoning relies on it. An extension of "
        "this project, not SRPO's. 0: off.",
        at_least=0,
    )

    @property
    def tags(self) -> RoleTags:
        """The tags of the three kinds of block."""
        if self.response_format:
            return read_format(self.response_format)
        return RoleTags(self.perception_tags, self.reasoning_tags, self.answer_tags)

    def _coerced(self, name: str, value: Any) -> Any:
        if name == "answer_tags" and not value:
            return None
        if not name.endswith("_tags"):
            return super()._coerced(name, value)
        try:
            return tag_pair(value)  # YAML and command lines give lists
        except ValueError as error:
            problem = str(error)
        raise OptionError(lambda named: f"{named(name)} {problem}")

    def _check_together(self) -> None:
        super()._check_together()
        if self.response_format:
            self._check_response_format()
        try:
            _ = self.tags
        except ValueError as error:
            problem = str(error)
            raise OptionError(lambda named: f"{named('perception_tags')}, {named('reasoning_tags')}, "
                                            f"{named('answer_tags')}: {problem}") from None  # fmt: skip
        if (problem_of := problem_of_amount(self.corruption, self.corruption_amount)) is not None:
            raise OptionError(lambda named: f"{named('corruption_amount')} {problem_of}")

    def _check_response_format(self) -> None:
        try:
            read_format(self.response_format)
        except ValueError as error:
            problem = str(error)
            raise OptionError(lambda named: f"{named('response_format')} {problem}") from None
        names = [f"{kind}_tags" for kind in ("perception", "reasoning", "answer")]
        defaults = {each.name: each.default for each in fields(ContextOptions)}
        if changed := [name for name in names if getattr(self, name) != defaults[name]]:
            raise OptionError(
                lambda named: (
                    f"{named('response_format')} says what all tags are, and {named(changed[0])} is "
                    f"{getattr(self, changed[0])!r} as well: leave one of them out"
                )
            )


@dataclass(frozen=True, kw_only=True)
class CreditOptions(CheckedOptions):
    """How log-probabilities become weights."""

    strength: float = option(1.0, "How far weights may move from 1; at 0 training is GRPO, bit for bit.", at_least=0.0)
    visual_score: Score = option("log_ratio", "Score of perception tokens.")
    consistency_score: Score = option("log_ratio", "Score of reasoning tokens.")
    score_clip: float = option(5.0, "Bound of both scores, nats.", above=0.0)
    reliance_mode: RelianceMode = option(
        "product",
        "How reliance enters the scores of perception tokens: `product` multiplies each score by the token's reliance, "
        "`share` distributes the mean of the scores in proportion to reliance.",
    )
    baseline: Baseline | Callable[..., Tensor] = option("token", "What is subtracted from the scores of a trajectory.")
    weight_map: WeightMap | Callable[..., Tensor] = option("exp_tanh", "From centered scores to positive weights.")
    renormalization: Renormalization = option("trajectory", "Over which tokens the weights are brought to mean one.")
    scale: Scale = option(
        "fixed", "Unit of the scores: nats, or the root mean square of this batch or of a moving average."
    )
    visual_scale: float = option(1.0, "Size of a typical visual score, in that unit.", above=0.0)
    consistency_scale: float = option(1.0, "Size of a typical consistency score, in that unit.", above=0.0)
    scale_decay: float = option(
        0.99, "Decay of the moving average.", at_least=0.0, below=1.0, read_by=("scale", ("ema_rms",))
    )
    bound: float = option(
        math.log(2.0),
        "Bound of a centered score, nats.",
        above=0.0,
        read_by=("weight_map", ("exp_tanh", "exp_clip", "one_plus_tanh")),
    )
    sign: Sign = option(
        "symmetric", "With `advantage`, the supported tokens of a wrong answer are pushed down less, instead of more."
    )
    mix: float = option(1.0, "The share of the weights in a mixture with weight 1.", at_least=0.0, at_most=1.0)
    mix_warmup_steps: int = option(0, "Optimizer steps over which the mixture ramps up from 0.", at_least=0)

    def at_step(self, step: int) -> Self:
        """The same options with `mix` ramped linearly from 0 at step 0 to its full value at `mix_warmup_steps`.

        Example:
            >>> options = CreditOptions(mix_warmup_steps=4)
            >>> [options.at_step(step).mix for step in (0, 1, 4, 9)]
            [0.0, 0.25, 1.0, 1.0]
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        if step >= self.mix_warmup_steps:
            return self
        return replace(self, mix=self.mix * (step / self.mix_warmup_steps))

    @property
    def changes_nothing(self) -> bool:
        """Whether every weight is 1 whatever the scores are, so that training is GRPO."""
        return self.strength == 0.0 or self.mix == 0.0

    def _check_together(self) -> None:
        super()._check_together()
        if not self.strength <= MAX_EXPONENT / self.bound:
            raise OptionError(
                lambda named: (
                    f"{named('strength')} must be in [0, {MAX_EXPONENT:g} / {named('bound')}], got {self.strength} "
                    f"with {named('bound')} {self.bound}"
                )
            )


@dataclass(frozen=True, kw_only=True)
class GroupOptions(CheckedOptions):
    """How rewards become advantages. A trainer that an adapter extends has its own options for this."""

    normalization: Normalization = option(
        "std", "What is subtracted from the reward of a response, and what the difference is divided by."
    )
    epsilon: float = option(
        1e-4,
        "Added to the standard deviation, in the unit of the reward.",
        at_least=0.0,
        read_by=("normalization", ("std", "batch_std")),
    )


@dataclass(frozen=True, kw_only=True)
class LossOptions(CheckedOptions):
    """How token advantages become a loss. A trainer that an adapter extends has its own options for this."""

    surrogate: Surrogate = option(
        Clip(), "The objective of a token; an object, its name, or a mapping with its name and its parameters."
    )
    kl_coef: float = option(
        0.0, "Weight of the KL penalty to the reference, which token weights never touch.", at_least=0.0
    )
    kl_estimator: KLEstimator = option("k3", "Estimate of that KL from the sampled token.")
    kl_correction: KLCorrection = option(
        "none",
        "With `ratio` the KL penalty of a token is multiplied by its importance ratio, so that it stays unbiased after "
        "the policy has moved away from the one that sampled.",
    )
    off_policy_threshold: float | None = option(
        None,
        "The largest mean log-ratio from the sampling policy to the trained one, nats per token, at which a response "
        "with a negative advantage still trains; None: all train.",
        at_least=0.0,
    )
    reduction: Reduction = option("token_mean", "How the losses of tokens add up.")

    @property
    def is_sequence_level(self) -> bool:
        """Whether the loss of a token depends on the other tokens of its response."""
        return self.surrogate.is_sequence_level or self.off_policy_threshold is not None

    def _coerced(self, name: str, value: Any) -> Any:
        if name != "surrogate" or not isinstance(value, str | Mapping):
            return super()._coerced(name, value)
        try:
            return Surrogate.named(value)
        except OptionError as error:
            wrong = error
            raise OptionError(lambda named: wrong.worded(lambda part: f"{named(name)}.{part}")) from None
        except ValueError as error:
            problem = str(error)
            raise OptionError(lambda named: f"{named(name)} {problem}") from None


@dataclass(frozen=True, kw_only=True)
class SRPOConfig(LossOptions, GroupOptions, CreditOptions, ContextOptions):
    """Every option of the method in one flat object. It is each of the groups, and goes wherever one of them does.

    All options are checked on construction, each under its own name.

    Example:
        >>> SRPOConfig(strength=0.5, surrogate={"name": "clip", "high": 0.28}).surrogate
        Clip(low=0.2, high=0.28, dual=None)
        >>> SRPOConfig(corruption="blurr")
        Traceback (most recent call last):
            ...
        srpo_core.checked.OptionError: corruption must be one of 'patch_mask', 'black', 'gray', 'noise', 'blur', ...

    Raises:
        ValueError: If an option is unknown, of the wrong type, out of range, or read by nothing that was chosen.
    """

    @property
    def reliance_passes(self) -> int:
        """Forward passes that reliance takes in a trainer: `reliance_spans`, and none where every weight is 1."""
        return 0 if self.changes_nothing else self.reliance_spans

    @classmethod
    def read_for_trainer(cls, values: Mapping[str, Any], *, named: str) -> Self:
        """The options of an adapter's users, refusing also what no trainer can honor.

        Args:
            values: By the names of the options.
            named: How the user wrote an option's name, with ``{}`` where the name goes: ``"srpo_{}"``.

        Raises:
            ValueError: As for ``read``; or if a score is a divergence, or `reliance_mode` is set although no reliance
                is measured.
        """
        config = cls.read(values, named=named)

        def written(name: str) -> str:
            return named.replace("{}", name)

        for name in ("visual_score", "consistency_score"):
            if (score := getattr(config, name)) in DIVERGENCES:
                raise ValueError(
                    f"{written(name)}={score!r} compares full distributions, and trainers return the log-probability "
                    "of the sampled token alone: choose 'log_ratio', 'positive', 'abs' or 'k3'"
                )
        if config.reliance_spans == 0 and config.reliance_mode != CreditOptions().reliance_mode:
            spans = written("reliance_spans")
            raise ValueError(
                f"{written('reliance_mode')}={config.reliance_mode!r} says how reliance enters the scores, and "
                f"{spans}=0 measures none: set {spans} to the number of spans, each of which is one more forward pass, "
                f"or leave {written('reliance_mode')} out"
            )
        return config

    def _check_together(self) -> None:
        super()._check_together()
        if self.surrogate.is_one_ratio and not self.changes_nothing:
            raise OptionError(
                lambda named: (
                    f"{named('surrogate')}={self.surrogate.name!r} with {named('strength')}={self.strength}: "
                    f"{self.surrogate.refusal_of_weights}"
                )
            )


def adapter_options() -> dict[str, Any]:
    """The dataclass fields that an adapter offers its users, by name: the contexts, and how weights are made."""
    return {each.name: each for group in (ContextOptions, CreditOptions) for each in fields(group)}


def trainer_options() -> dict[str, Any]:
    """The dataclass fields that a trainer has its own options for, by name: advantages and loss."""
    return {each.name: each for group in (GroupOptions, LossOptions) for each in fields(group)}


#: Scores that need the full distributions instead of the log-probability of the sampled token.
DIVERGENCES: tuple[str, ...] = get_args(DivergenceKind)
