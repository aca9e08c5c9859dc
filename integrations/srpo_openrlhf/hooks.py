"""Patch OpenRLHF where it is imported, and nowhere else. Standard library only: this runs in every Ray worker."""

import importlib
import importlib.machinery
import importlib.metadata
import inspect
import sys
from collections.abc import Sequence
from functools import reduce
from inspect import Parameter
from types import ModuleType
from typing import Any

__all__ = ["NAMES", "SUPPORTED", "TARGET", "check_names", "install", "unsupported"]

#: Versions of OpenRLHF whose loop the adapter was run against.
SUPPORTED = "openrlhf>=0.11.2,<0.12"

#: The module that is patched when a process imports it.
TARGET = "openrlhf.trainer.ppo_utils.experience_maker"

#: Every name of OpenRLHF that the adapter relies on, by the module in which it is checked, with the parameters (or
#: fields) that it must take. It may take others if these have defaults.
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    TARGET: {
        # Its attributes `args`, `tokenizer` and `actor_model_group` are read.
        "RemoteExperienceMaker": (
            *("actor_model_group", "critic_model_group", "reward_model_group", "initial_model_group"),
            *("kl_controller", "strategy", "tokenizer"),
        ),
        "RemoteExperienceMaker.make_experience_batch": ("rollout_samples",),  # wrapped
        "RemoteExperienceMaker._dispatch_forward": ("group", "sync_condition", "kwargs"),
        "RemoteExperienceMaker._flatten_results": ("refs", "duplicate_factor"),
        # Both are watched until the first batch has arrived.
        "RayActorGroup.async_run_method": ("method_name", "args", "kwargs"),
        "RayActorGroup.async_run_method_batch": ("method_name", "kwargs"),
        "Experience": (
            *("sequences", "attention_mask", "action_mask", "action_log_probs", "rollout_log_probs"),
            *("advantages", "rewards", "index", "prompts", "mm_train_inputs", "info"),
        ),
    },
    "openrlhf.trainer.ray.ppo_actor": {
        "PolicyModelActor.forward": ("sequences", "action_mask", "attention_mask", "mm_train_inputs_list"),
        "PolicyModelActor.get_checkpoint_states": (),
        "PolicyModelActor.append": ("experience",),
        "PolicyModelActor.fit": ("kl_ctl",),
        "PolicyLoss.forward": ("log_probs", "old_log_probs", "advantages", "action_mask"),
    },
    "openrlhf.utils": {"get_strategy": ("args",)},  # wrapped by the launcher
}


def install() -> None:
    """Check what the adapter relies on, and patch the experience maker, as soon as this process imports either.

    The Ray worker hook of the job. Patching at once would import the maker, and with it deepspeed, into the rollout
    workers, which OpenRLHF keeps free of it.
    """
    if not any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchOnImport())
    for name in NAMES:
        if name in sys.modules:
            _prepare(sys.modules[name])


def check_names(module: ModuleType) -> None:
    """Raise unless a module has the names of :data:`NAMES`, with the parameters that the adapter passes.

    Raises:
        RuntimeError: If OpenRLHF changed; says which versions are supported.
    """
    for name, expected in NAMES[module.__name__].items():
        problem = _problem(reduce(lambda owner, part: getattr(owner, part, None), name.split("."), module), expected)
        if problem is not None:
            raise unsupported(f"{module.__name__}.{name} must take ({', '.join(expected)}), but {problem}")


def unsupported(problem: str) -> RuntimeError:
    """The error for an OpenRLHF that the adapter does not support."""
    try:
        found = f"openrlhf {importlib.metadata.version('openrlhf')}"
    except importlib.metadata.PackageNotFoundError:
        found = "an openrlhf without a version"
    return RuntimeError(
        f"srpo_openrlhf needs {SUPPORTED}, and found {found}: {problem}. Install a supported version, or run "
        "openrlhf.cli.train_ppo_ray without SRPO"
    )


def _problem(found: Any, expected: tuple[str, ...]) -> str | None:
    if found is None:
        return "is gone"
    parameters = inspect.signature(found).parameters
    optional = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    required = {name for name, each in parameters.items() if each.default is each.empty and each.kind not in optional}
    if set(expected) <= set(parameters) and required <= {"self", *expected}:
        return None
    return f"takes ({', '.join(name for name in parameters if name != 'self')})"


class _PatchOnImport:
    """First on ``sys.meta_path``: finds a module of :data:`NAMES` as usual, and prepares it once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in NAMES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _prepare(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _prepare(module: ModuleType) -> None:
    if hasattr(module, "_srpo_is_prepared"):
        return
    check_names(module)
    if module.__name__ == TARGET:
        # Here, not above: it imports torch.
        importlib.import_module("srpo_openrlhf.experience").patch_maker(module)
    module._srpo_is_prepared = True  # type: ignore[attr-defined]
