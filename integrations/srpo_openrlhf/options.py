"""The ``--srpo.*`` options: from the command line to an :class:`~srpo_core.SRPOConfig`, and on to the Ray workers."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, get_origin, get_type_hints

from srpo_core import SRPOConfig
from srpo_core.checked import kinds_of, names_of
from srpo_core.options import adapter_options
from srpo_core.rollouts import RecordingOptions

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "OpenRLHFOptions",
    "add_options",
    "dump_config",
    "load_config",
    "offered",
    "option_parser",
    "parse_options",
]

#: Carries the options to the Ray workers, as JSON.
ENVIRONMENT_VARIABLE = "SRPO_OPENRLHF"
_PREFIX = "--srpo."


@dataclass(frozen=True, kw_only=True)
class OpenRLHFOptions(SRPOConfig, RecordingOptions):
    """Every ``--srpo.*`` option: those that the core leaves to an adapter, and those that only record.

    In `correct`, reward functions are named as OpenRLHF names their values in the ``info`` of an experience.
    """


def offered() -> dict[str, Any]:
    """The dataclass fields of the options on the command line, by name."""
    return {each.name: each for each in fields(RecordingOptions)} | adapter_options()


def option_parser() -> argparse.ArgumentParser:
    """Parser of the ``--srpo.*`` options."""
    parser = argparse.ArgumentParser(
        "python -m srpo_openrlhf",
        usage="%(prog)s [--srpo.* ...] [any flag of openrlhf.cli.train_ppo_ray ...]",
        description="OpenRLHF's train_ppo_ray with SRPO's token weights multiplied into the advantages.",
        add_help=False,
        allow_abbrev=False,
    )
    add_options(parser.add_argument_group("SRPO"), _PREFIX)
    return parser


def add_options(group: Any, prefix: str) -> None:
    """Add an argument for each option to a group of an ``argparse`` parser.

    Args:
        group: What has ``add_argument``.
        prefix: Before the name of each option, such as ``--srpo.``.
    """
    hints = get_type_hints(OpenRLHFOptions)
    for name, field in offered().items():
        text = f"{field.metadata['help']} (default: {_shown(field.default)})".replace("%", "%%")
        group.add_argument(prefix + name, default=field.default, help=text, **_argument(hints[name]))


def parse_options(argv: Sequence[str]) -> tuple[OpenRLHFOptions, list[str]]:
    """The checked options, and the rest of the command line for OpenRLHF, in its order.

    Exits with status 2 and a sentence if an option is unknown or out of range, as argparse does.

    Example:
        >>> config, rest = parse_options(["--actor.adam.lr", "1e-6", "--srpo.strength", "0.5", "--seed", "1"])
        >>> config.strength, rest
        (0.5, ['--actor.adam.lr', '1e-6', '--seed', '1'])
    """
    parser = option_parser()
    ours, rest = parser.parse_known_args(argv)
    unknown = [flag for flag in rest if flag.startswith(_PREFIX)]
    if unknown:
        parser.error(f"unknown option {unknown[0].partition('=')[0]}; python -m srpo_openrlhf --help lists them")
    values = {name.removeprefix("srpo."): value for name, value in vars(ours).items()}
    try:
        return OpenRLHFOptions.read_for_trainer(values, named=_PREFIX + "{}"), rest
    except ValueError as error:
        parser.error(str(error))


def dump_config(config: OpenRLHFOptions) -> str:
    """The options as a string for an environment variable."""
    return json.dumps({name: getattr(config, name) for name in offered()})


def load_config() -> OpenRLHFOptions:
    """The options that the launcher put into this worker's environment.

    Raises:
        RuntimeError: If this worker has no such options.
    """
    dumped = os.environ.get(ENVIRONMENT_VARIABLE)
    if dumped is None:
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE} is not set in this Ray worker: start with python -m srpo_openrlhf")
    return OpenRLHFOptions.read_for_trainer(json.loads(dumped), named=_PREFIX + "{}")


def _argument(annotation: Any) -> dict[str, Any]:
    """Number, type and choices of an option's values, read off its annotation."""
    if names := names_of(annotation):
        return {"choices": names}
    kinds = kinds_of(annotation)
    if any(get_origin(kind) is tuple for kind in kinds):  # a pair of tags; none at all where these may be left out
        return {"nargs": "*" if NoneType in kinds else 2, "metavar": "TAG"}
    if bool in kinds:
        return {"type": _switch, "metavar": "true|false"}
    kind = next(kind for kind in kinds if kind is not NoneType)
    return {"type": kind, "metavar": kind.__name__.upper()}


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(default)
    return f"{default:.4g}" if isinstance(default, float) else str(default)
