"""Patch OpenRLHF where it is imported, and nowhere else. Standard library only: this runs in every Ray worker."""

import importlib
import importlib.machinery
import importlib.metadata
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType

__all__ = ["SIGNATURES", "SUPPORTED", "TARGET", "check_signatures", "install"]

#: Versions of OpenRLHF whose loop the adapter was run against.
SUPPORTED = "openrlhf>=0.11.2,<0.12"

#: The module that is patched when a process imports it.
TARGET = "openrlhf.trainer.ppo_utils.experience_maker"

#: Methods that the adapter wraps (the first two) or calls, and their parameters without `self`.
SIGNATURES = {
    "make_experience": ("samples_list",),
    "compute_advantages_and_returns": ("experiences",),
    "_dispatch_forward": ("group", "sync_condition", "kwargs"),
    "_flatten_results": ("refs", "duplicate_factor"),
}


def install() -> None:
    """Patch OpenRLHF's experience maker as soon as this process imports it.

    The Ray worker hook of the job. Patching at once would import the maker, and with it deepspeed, into the rollout
    workers, which OpenRLHF keeps free of it.
    """
    if TARGET in sys.modules:
        _patch(sys.modules[TARGET])
    if not any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchOnImport())


def check_signatures(module: ModuleType) -> None:
    """Raise unless ``RemoteExperienceMaker`` has the methods that the adapter needs, with the expected parameters.

    Raises:
        RuntimeError: If OpenRLHF changed; says which versions are supported.
    """
    for name, expected in SIGNATURES.items():
        method = getattr(getattr(module, "RemoteExperienceMaker", None), name, None)
        found = tuple(inspect.signature(method).parameters)[1:] if method else None
        if found != expected:
            problem = "is gone" if found is None else f"takes ({', '.join(found)})"
            raise RuntimeError(
                f"srpo_openrlhf needs {SUPPORTED}, and found {_installed()}: RemoteExperienceMaker.{name} must take "
                f"({', '.join(expected)}), but {problem}. Install a supported version, or run "
                "openrlhf.cli.train_ppo_ray without SRPO"
            )


class _PatchOnImport:
    """First on ``sys.meta_path``: finds the target as usual and patches it once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TARGET:
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
    if hasattr(module, "_srpo_is_patched"):
        return
    check_signatures(module)
    # Here, not above: it imports torch.
    importlib.import_module("srpo_openrlhf.experience").patch_maker(module)
    module._srpo_is_patched = True  # type: ignore[attr-defined]


def _installed() -> str:
    try:
        return f"openrlhf {importlib.metadata.version('openrlhf')}"
    except importlib.metadata.PackageNotFoundError:
        return "an openrlhf without a version"
