"""The ``--srpo_*`` options: from the command line to an :class:`~srpo_core.SRPOConfig`, and to ms-swift's processes."""

import argparse
import json
import os
from collections.abc import Sequence

from srpo_openrlhf.options import OpenRLHFOptions as SwiftOptions  # the same options; imports nothing of OpenRLHF
from srpo_openrlhf.options import add_options, offered

__all__ = ["ENVIRONMENT_VARIABLE", "SwiftOptions", "dump_config", "load_config", "option_parser", "parse_options"]

#: Carries the options to the processes that ms-swift starts, as JSON.
ENVIRONMENT_VARIABLE = "SRPO_SWIFT"
_PREFIX = "--srpo_"


def option_parser() -> argparse.ArgumentParser:
    """Parser of the ``--srpo_*`` options."""
    parser = argparse.ArgumentParser(
        "python -m srpo_swift",
        usage="%(prog)s rlhf --rlhf_type grpo [--srpo_* ...] [any flag of swift rlhf ...]",
        description="ms-swift's GRPO with SRPO's token weights multiplied into the advantages.",
        add_help=False,
        allow_abbrev=False,
    )
    add_options(parser.add_argument_group("SRPO"), _PREFIX)
    return parser


def parse_options(argv: Sequence[str]) -> tuple[SwiftOptions, list[str]]:
    """The checked options, and the rest of the command line for ms-swift, in its order.

    Exits with status 2 and a sentence if an option is unknown or out of range, as argparse does.

    Example:
        >>> config, rest = parse_options(["--beta", "0", "--srpo_strength", "0.5", "--seed", "1"])
        >>> config.strength, rest
        (0.5, ['--beta', '0', '--seed', '1'])
    """
    parser = option_parser()
    ours, rest = parser.parse_known_args(argv)
    if unknown := [flag for flag in rest if flag.startswith(_PREFIX)]:
        parser.error(f"unknown option {unknown[0].partition('=')[0]}; python -m srpo_swift --help lists them")
    values = {name: getattr(ours, _PREFIX.lstrip("-") + name) for name in offered()}
    try:
        return SwiftOptions.read_for_trainer(values, named=_PREFIX + "{}"), rest
    except ValueError as error:
        parser.error(str(error))


def dump_config(config: SwiftOptions) -> str:
    """The options as a string for an environment variable."""
    return json.dumps({name: getattr(config, name) for name in offered()})


def load_config() -> SwiftOptions:
    """The options that the launcher put into the environment.

    Raises:
        RuntimeError: If there are none.
    """
    dumped = os.environ.get(ENVIRONMENT_VARIABLE)
    if dumped is None:
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE} is not set: start with python -m srpo_swift in the place of swift")
    return SwiftOptions.read_for_trainer(json.loads(dumped), named=_PREFIX + "{}")
