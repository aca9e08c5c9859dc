"""What verl loads, by the entry point or by ``VERL_USE_EXTERNAL_MODULES=srpo_verl.plugin``. No function of this module
is called by name.

verl loads plugins while it is imported itself, in every process of a run, and hides their errors at DEBUG level. So
this module imports none of verl's trainers (9 seconds, and not needed in a rollout server): it adds SRPO's trainer when
those are imported, and where that fails, the failure waits for the run that asks for ``trainer_mode=srpo``.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__: list[str] = []


def _add_trainer(trainers: ModuleType) -> None:
    """``trainer_mode=srpo`` becomes known to verl."""
    try:
        importlib.import_module("srpo_verl.upstream").check_functions()
        importlib.import_module("srpo_verl.trainer")
    except Exception as error:
        reason = f"srpo_verl could not be loaded, so trainer.v1.trainer_mode=srpo does not work: {error!r}"
        cause = error

        class _Unusable(trainers.PPOTrainer):
            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                raise RuntimeError(reason) from cause

        trainers.register_trainer("srpo")(_Unusable)


def _check_command_line(configuration: ModuleType) -> None:
    """verl's own check of the configuration, before Ray starts, also checks SRPO's part of it."""
    validate_config = getattr(configuration, "validate_config", None)
    # None: SRPO's trainer says so when it starts, and nobody else is disturbed. Wrapped: this module was loaded twice.
    if validate_config is None or hasattr(validate_config, "__wrapped__"):
        return

    @functools.wraps(validate_config)
    def validate_srpo_too(config: Any, *args: Any, **kwargs: Any) -> Any:
        from omegaconf import OmegaConf

        from srpo_verl.options import check_config

        # Nobody else's configuration is resolved early, or can fail here.
        if OmegaConf.select(config, "trainer.v1.trainer_mode") == "srpo" or OmegaConf.select(config, "algorithm.srpo"):
            check_config(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        return validate_config(config, *args, **kwargs)

    vars(configuration)["validate_config"] = validate_srpo_too


_WHEN_IMPORTED: dict[str, Callable[[ModuleType], None]] = {
    "verl.trainer.ppo.v1": _add_trainer,
    "verl.utils.config": _check_command_line,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the other finders find, and has something done once it is imported."""

    def __init__(self) -> None:
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _WHEN_IMPORTED or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            execute(module)
            _WHEN_IMPORTED[fullname](module)

        spec.loader.exec_module = execute_then_act  # type: ignore[method-assign]
        return spec


def _install() -> None:
    for name, act in _WHEN_IMPORTED.items():
        if name in sys.modules:
            act(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


_install()
