"""``python -m srpo_swift``: the command ``swift rlhf --rlhf_type grpo``, with SRPO's plugin in its processes."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from srpo_swift.options import ENVIRONMENT_VARIABLE, dump_config, option_parser, parse_options
from srpo_swift.settings import check_config
from srpo_swift.upstream import check_upstream

_PLUGIN = str(Path(__file__).parent / "plugin" / "register.py")
_PLUGINS = ("--external_plugins", "--custom_register_path")


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``swift rlhf`` with SRPO.

    Args:
        argv: ``rlhf``, then ``--srpo_*`` options and any flags of ``swift rlhf`` in any order, or a YAML or JSON file
            with them; None for the command line.

    Raises:
        ValueError: If a setting cannot work with SRPO.
        ImportError: If the installed ms-swift is not a supported version.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        option_parser().print_help()
        print("\nThe rest is ms-swift's: swift rlhf --help lists it.")
        return
    if not argv or argv[0] != "rlhf":
        raise ValueError(
            f"the first argument must be rlhf, got {argv[0] if argv else 'nothing'}: SRPO works in `swift rlhf` alone, "
            "not in megatron, and not in rollout servers, which need no SRPO"
        )
    check_upstream("swift.cli.main")  # the others import the trainer, and are checked where it is registered
    from swift.cli.main import cli_main, parse_yaml_args

    flags = argv[1:]
    parse_yaml_args(flags)  # in place; ms-swift would read the file only after SRPO's options have been taken out
    config, rest = parse_options(flags)
    check_config(config)
    if _value_of(rest, "--rlhf_type") != "grpo":
        raise ValueError("--rlhf_type must be grpo: SRPO weights the advantages of GRPO. Pass --rlhf_type grpo")
    if config.rollouts is not None:  # a process may have a folder of its own
        config = replace(config, rollouts=os.path.abspath(config.rollouts))
    os.environ[ENVIRONMENT_VARIABLE] = dump_config(config)
    sys.argv = ["swift", "rlhf", *with_plugin(rest)]
    cli_main()


def with_plugin(flags: Sequence[str]) -> list[str]:
    """The flags with SRPO's plugin as the first one, before those that the user has.

    Example:
        >>> made = with_plugin(["--beta", "0", "--external_plugins", "mine.py"])
        >>> made[:3], made[-1]
        (['--beta', '0', '--external_plugins'], 'mine.py')
        >>> len(made)
        5
    """
    flags = list(flags)
    for name in _PLUGINS:  # of a flag that is given twice, ms-swift reads the second one alone
        if name in flags:
            at = flags.index(name) + 1
            return [*flags[:at], _PLUGIN, *flags[at:]]
    return [*flags, _PLUGINS[0], _PLUGIN]


def _value_of(flags: Sequence[str], name: str) -> str | None:
    """The value of a flag, written as one argument or as two."""
    for flag, value in zip(flags, [*flags[1:], None], strict=True):
        if flag == name:
            return value
        if flag.startswith(name + "="):
            return flag.partition("=")[2]
    return None


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError) as error:
        sys.exit(f"srpo_swift: {error}")
