"""``python -m srpo_openrlhf``: the stock command line of ``train_ppo_ray``, with SRPO's hook in its workers."""

import functools
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from srpo_openrlhf import hooks
from srpo_openrlhf.options import ENVIRONMENT_VARIABLE, dump_config, option_parser, parse_options
from srpo_openrlhf.settings import check_arguments, check_config

_STOCK = "openrlhf.cli.train_ppo_ray"


def main(argv: Sequence[str] | None = None) -> None:
    """Run OpenRLHF's ``train_ppo_ray`` with SRPO.

    Args:
        argv: ``--srpo.*`` options and any flags of ``train_ppo_ray``, in any order; None for the command line.

    Raises:
        ValueError: If a setting cannot work with SRPO.
        RuntimeError: If the installed OpenRLHF is not a supported version.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        option_parser().print_help()
        print(f"\nThe rest is {_STOCK}'s:\n", flush=True)
        _run_stock(["--help"])
        return
    config, rest = parse_options(argv)
    check_config(config)
    # Here, too, so that an unsupported version fails before any worker starts.
    hooks.install()
    for name in hooks.NAMES:
        importlib.import_module(name)
    if config.rollouts is not None:  # a worker has a folder of its own
        config = replace(config, rollouts=os.path.abspath(config.rollouts))
    _hook_workers({ENVIRONMENT_VARIABLE: dump_config(config)})
    _check_before_start()
    _run_stock(rest)


def _run_stock(argv: list[str]) -> None:
    sys.argv = [_STOCK, *argv]
    runpy.run_module(_STOCK, run_name="__main__", alter_sys=True)  # its parser lives under `if __name__ == "__main__"`


def _hook_workers(variables: dict[str, str]) -> None:
    """Add the worker hook and the options to whatever runtime environment the stock code starts Ray with."""
    import ray

    def with_hook(init: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(init)
        def wrapper(*args: Any, runtime_env: dict[str, Any] | None = None, **kwargs: Any) -> Any:
            runtime_env = dict(runtime_env or {})
            runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **variables}
            runtime_env["worker_process_setup_hook"] = f"{hooks.__name__}.{hooks.install.__name__}"
            return init(*args, runtime_env=runtime_env, **kwargs)

        return wrapper

    os.environ.update(variables)
    ray.init = with_hook(ray.init)


def _check_before_start() -> None:
    """Refuse settings at the first call that sees them parsed and completed, before any model is made."""
    import openrlhf.utils

    def checked(get_strategy: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(get_strategy)
        def wrapper(args: Any) -> Any:
            check_arguments(args)
            return get_strategy(args)

        return wrapper

    openrlhf.utils.get_strategy = checked(openrlhf.utils.get_strategy)


if __name__ == "__main__":
    main()
