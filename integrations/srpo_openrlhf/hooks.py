"""Patch OpenRLHF where it is imported, and nowhere else. Standard library only: this runs in every Ray worker."""

import importlib
import importlib.machinery
import importlib.metadata
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ["SIGNATURES", "SUPPORTED", "check_signatures", "install"]

#: Versions of OpenRLHF whose loop the adapter was run against.
SUPPORTED = "openrlhf>=0.11.2,<0.12"

#: What the adapter wraps or calls, by module: a method and its parameters, `self` left out.
SIGNATURES: dict[str, dict[str, tuple[str, ...]]] = {
    "openrlhf.trainer.ppo_utils.experience_maker": {
        "RemoteExperienceMaker.make_experience": ("samples_list",),
        "RemoteExperienceMaker.compute_advantages_and_returns": ("experiences",),
        "RemoteExperienceMaker._dispatch_forward": ("group", "sync_condition", "kwargs"),
        "RemoteExperienceMaker._flatten_results": ("refs", "duplicate_factor"),
    },
    "openrlhf.trainer.ppo_trainer": {"BasePPOTrainer.train_step": ("rollout_samples", "global_step")},
}


def install() -> None:
    """Patch OpenRLHF's experience maker as soon as this process imports it.

    The Ray worker hook of the job. Patching at once would import the maker, and with it deepspeed, into the rollout
    workers, which OpenRLHF keeps free of it.
    """
    for name in SIGNATURES:
        if name in sys.modules:
            _patch(sys.modules[name])
    if not any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchOnImport())


def check_signatures(module: ModuleType) -> None:
    """Raise unless the module has every method that the adapter hooks, with the parameters it expects.

    Raises:
        RuntimeError: If OpenRLHF changed; says which versions are supported.
    """
    for path, expected in SIGNATURES[module.__name__].items():
        found = _parameters(module, path)
        if found != expected:
            name = f"{module.__name__}.{path}"
            signature = "is gone" if found is None else f"takes ({', '.join(found)})"
            raise RuntimeError(
                f"srpo_openrlhf needs {SUPPORTED}, and found {_installed()}: {name} must take ({', '.join(expected)}), "
                f"but {signature}. Install a supported version, or run openrlhf.cli.train_ppo_ray without SRPO"
            )


class _PatchOnImport:
    """First on ``sys.meta_path``: finds the hooked modules as usual and patches them once they have run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in SIGNATURES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch(module: ModuleType) -> None:
    # Here, not above: it imports torch.
    experience = importlib.import_module("srpo_openrlhf.experience")
    check_signatures(module)
    patch = {"experience_maker": experience.patch_maker, "ppo_trainer": experience.patch_trainer}
    patch[module.__name__.rpartition(".")[2]](module)


def _parameters(module: ModuleType, path: str) -> tuple[str, ...] | None:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return tuple(inspect.signature(value).parameters)[1:] if callable(value) else None


def _installed() -> str:
    try:
        return f"openrlhf {importlib.metadata.version('openrlhf')}"
    except importlib.metadata.PackageNotFoundError:
        return "an openrlhf without a version"
