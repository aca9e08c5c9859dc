"""The command line -> :class:`VerlOptions`, and a sentence about every setting that cannot work. Needs no verl."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from srpo_core import SRPOConfig
from srpo_core.options import trainer_options
from srpo_core.rollouts import RecordingOptions

__all__ = ["VerlOptions", "check_config", "srpo_options"]


@dataclass(frozen=True, kw_only=True)
class VerlOptions(SRPOConfig, RecordingOptions):
    """Everything under ``algorithm.srpo``: the options that the core leaves to an adapter, and those that only record.

    In `correct`, reward functions are named by their keys in the extra info that verl's reward function returns.
    """


#: verl's own setting in the place of an option of the trainer; one that is not here has no setting in verl.
_VERLS_OWN = {
    "normalization": "algorithm.norm_adv_by_std_in_grpo",
    "surrogate": (
        "actor_rollout_ref.actor.policy_loss.loss_mode (its clip widths: actor_rollout_ref.actor.clip_ratio_low, "
        "clip_ratio_high and clip_ratio_c)"
    ),
    "kl_coef": "actor_rollout_ref.actor.kl_loss_coef",
    "kl_estimator": "actor_rollout_ref.actor.kl_loss_type",
    "reduction": "actor_rollout_ref.actor.loss_agg_mode",
}

#: Values that the core knows but this adapter cannot honor, and why.
_UNSUPPORTED = {
    ("counterfactual", "mask"): "verl's engines build their attention masks themselves; use 'swap' or 'drop'",
    ("corruption", "none"): "dropping the image would change the prompt; use 'gray' or 'black' for a blank image",
    ("corruption", "other_image"): (
        "a worker holds only its own rows, so which image is 'another' would depend on the number of workers; "
        "use 'patch_shuffle' or 'gray'"
    ),
    ("scale", "ema_rms"): "its running average would not survive a checkpoint; use 'batch_rms'",
}

#: Estimators that give a response one advantage, so that weights can split it among the tokens.
ESTIMATORS = ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "gpg")
#: Losses whose gradient at a token is proportional to that token's advantage, so that weighting it weights the token.
LOSS_MODES = ("vanilla", "dppo_tv", "dppo_kl", "sapo", "gpg", "cispo", "bypass_mode")
_STRATEGIES = ("fsdp", "fsdp2")

_SEQUENCE_RATIO = (
    "has one importance ratio for a whole response: weights of mean one cancel in it, and SRPO would silently be GRPO"
)
_NOT_HOMOGENEOUS = "chooses tokens by the size of their advantages, so weights would change more than a token's credit"
_REFUSED_LOSS_MODES = {
    "gspo": _SEQUENCE_RATIO,
    "geo_mean": _SEQUENCE_RATIO,
    "clip_cov": _NOT_HOMOGENEOUS,
    "kl_cov": _NOT_HOMOGENEOUS,
}
_REFUSED_MODES = {
    "separate_async": (
        "separate_async trains on rollouts of older policies while other GPUs generate, which SRPO's extra passes are "
        "not tested with"
    ),
    "colocate_async": "colocate_async resumes rollouts across policies, which SRPO's extra passes are not tested with",
}


def check_config(config: Mapping[str, Any]) -> VerlOptions | None:
    """SRPO's options in verl's resolved configuration, or None where it asks for another algorithm.

    Args:
        config: verl's whole configuration as plain containers (``OmegaConf.to_container(config, resolve=True)``).

    Raises:
        ValueError: If only a part of the settings asks for SRPO, an option is unknown or out of range, or a setting of
            verl excludes SRPO. The message names the setting and what to write instead.

    Example:
        >>> check_config({"trainer": {"v1": {"trainer_mode": "sync"}}, "algorithm": {"srpo": {"strength": 1.0}}})
        Traceback (most recent call last):
            ...
        ValueError: algorithm.srpo is set, but trainer.v1.trainer_mode='sync' would train plain GRPO: ...
    """
    mode = _get(config, "trainer.v1.trainer_mode")
    options = _get(config, "algorithm.srpo")
    if mode != "srpo" and options is None:
        return None
    if not _get(config, "trainer.use_v1", True):
        raise ValueError(
            "trainer.use_v1=false is verl's deprecated trainer, which has no place for SRPO's passes and would train "
            "plain GRPO: leave trainer.use_v1=true"
        )
    if mode != "srpo":
        reason = f" ({_REFUSED_MODES[mode]})" if mode in _REFUSED_MODES else ""
        raise ValueError(
            f"algorithm.srpo is set, but trainer.v1.trainer_mode={mode!r} would train plain GRPO: set "
            f"trainer.v1.trainer_mode=srpo, or leave algorithm.srpo out{reason}"
        )
    _check_verl(config)
    return srpo_options({} if options is None else options)


def srpo_options(values: Mapping[str, Any]) -> VerlOptions:
    """The options under ``algorithm.srpo``, checked.

    Raises:
        ValueError: If an option is unknown, verl's own, unsupported here, of the wrong type or out of range.

    Example:
        >>> srpo_options({"strength": 0.5, "perception_tags": ["<description>", "</description>"]}).strength
        0.5
        >>> srpo_options({"strenght": 0.5})
        Traceback (most recent call last):
            ...
        ValueError: algorithm.srpo.strenght is unknown; did you mean algorithm.srpo.strength? The options are ...
        >>> srpo_options({"kl_coef": 0.1})
        Traceback (most recent call last):
            ...
        ValueError: algorithm.srpo.kl_coef is verl's own: set actor_rollout_ref.actor.kl_loss_coef instead
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"algorithm.srpo must map names of options to values, got {values!r}")
    for name in trainer_options():
        if name in values:
            place = _VERLS_OWN.get(name)
            remedy = f"set {place} instead" if place else "it has no setting for this, so leave it out"
            raise ValueError(f"algorithm.srpo.{name} is verl's own: {remedy}")
    for (name, value), reason in _UNSUPPORTED.items():
        if values.get(name) == value:
            raise ValueError(f"algorithm.srpo.{name}={value!r} does not work in verl: {reason}")
    return VerlOptions.read_for_trainer(values, named="algorithm.srpo.{}")


def _check_verl(config: Mapping[str, Any]) -> None:
    """Refuse settings that would silently turn SRPO off, or that were never run with it."""
    if not _get(config, "actor_rollout_ref.hybrid_engine", True):
        raise ValueError(
            f"actor_rollout_ref.hybrid_engine=false belongs to trainer_mode=separate_async: "
            f"{_REFUSED_MODES['separate_async']}. Leave hybrid_engine=true"
        )
    estimator = _get(config, "algorithm.adv_estimator")
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"algorithm.adv_estimator={estimator!r} is not supported: SRPO splits one advantage of a response among "
            f"its tokens, so choose one of {', '.join(ESTIMATORS)}"
        )
    loss_mode = _get(config, "actor_rollout_ref.actor.policy_loss.loss_mode", "vanilla")
    if loss_mode not in LOSS_MODES:
        reason = _REFUSED_LOSS_MODES.get(loss_mode, "was not tested with token weights")
        raise ValueError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode={loss_mode!r} {reason}: choose one of "
            f"{', '.join(LOSS_MODES)}"
        )
    strategy = _get(config, "actor_rollout_ref.actor.strategy")
    if strategy not in _STRATEGIES:
        raise ValueError(
            f"actor_rollout_ref.actor.strategy={strategy!r} was not tested with SRPO: choose one of "
            f"{', '.join(_STRATEGIES)}"
        )
    if _get(config, "distillation.enabled", False):
        raise ValueError("distillation.enabled=true was not tested with SRPO: set distillation.enabled=false")
    temperature = _get(config, "actor_rollout_ref.rollout.temperature", 1.0)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"actor_rollout_ref.rollout.temperature must be above 0 for log-probs to exist, got {temperature}"
        )


def _get(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping) or value.get(key) is None:
            return default
        value = value[key]
    return value
