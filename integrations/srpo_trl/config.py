"""The options of the core as flat fields of TRL's own config."""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, make_dataclass
from typing import Any, Union, get_origin, get_type_hints

from trl import GRPOConfig

import srpo_core
from srpo_core.checked import kinds_of
from srpo_core.options import adapter_options
from srpo_core.rollouts import RecordingOptions
from srpo_trl.upstream import trl_is

__all__ = ["SRPOConfig"]

_TYPES = get_type_hints(srpo_core.SRPOConfig) | get_type_hints(RecordingOptions)
_RECORDING = {each.name: each for each in fields(RecordingOptions)}


def _flat(name: str, option: Field[Any]) -> tuple[str, Any, Any]:
    """An option of the core as a field that TRL's parser can read: tags are a list, and functions go by their names."""
    kinds = kinds_of(_TYPES[name])
    metadata = {"help": option.metadata["help"]}  # no more than this: the parser gives all of it to argparse
    if any(get_origin(kind) is tuple for kind in kinds):
        tags: Any = option.default or ()
        return f"srpo_{name}", list[str], field(default_factory=lambda: list(tags), metadata=metadata)
    readable = Union[tuple(kind for kind in kinds if get_origin(kind) is not Callable)]  # noqa: UP007
    return f"srpo_{name}", readable, field(default=option.default, metadata=metadata)


# Any: a type checker cannot know fields that are made at run time. Keyword-only: TRL's own fields stay the first ones.
_Options: Any = make_dataclass(
    "_Options", [_flat(*item) for item in (adapter_options() | _RECORDING).items()], kw_only=True
)

#: Settings of TRL that exclude token weights: the option, whether its value is such a one, why, and what to do.
_REFUSED: tuple[tuple[str, Callable[["SRPOConfig", Any], bool], str], ...] = (
    (
        "importance_sampling_level",
        lambda config, level: level != "token",
        "gives a whole response one ratio, in which token weights of mean one cancel: set "
        "importance_sampling_level='token', or train with trl.GRPOTrainer",
    ),
    (
        "use_liger_kernel",
        lambda config, is_used: is_used and trl_is("<1.14"),
        "takes one advantage per response on TRL below 1.14: set it to False, or upgrade TRL",
    ),
)


@dataclass
class SRPOConfig(GRPOConfig, _Options):
    """:class:`trl.GRPOConfig` with the options of SRPO (arXiv:2605.07274), all named ``srpo_*``.

    Names, meanings, ranges and defaults are those of :class:`srpo_core.SRPOConfig` without the prefix. What TRL has an
    option for (loss, clipping, KL, normalization of rewards) stays TRL's. ``TrlParser`` reads every field from YAML and
    from the command line.

    Raises:
        ValueError: If an option is unknown or out of range, or TRL cannot honor it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.srpo_options()
        self.srpo_recording()

    def srpo_recording(self) -> RecordingOptions:
        """The options that only record, checked."""
        return RecordingOptions.read({name: getattr(self, f"srpo_{name}") for name in _RECORDING}, named="srpo_{}")

    def srpo_options(self) -> srpo_core.SRPOConfig:
        """The same options as the core keeps them, checked."""
        values = {name: getattr(self, f"srpo_{name}") for name in adapter_options()}
        options = srpo_core.SRPOConfig.read_for_trainer(values, named="srpo_{}")
        for name, is_refused, reason in _REFUSED:
            value = getattr(self, name, None)
            if is_refused(self, value):
                raise ValueError(f"{name}={value!r} {reason}")
        return options
