"""What the adapter relies on in ms-swift beyond its documentation: listed and checked here, and nowhere else."""

import importlib
import inspect
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.specifiers import SpecifierSet

__all__ = ["RELIED_ON", "SUPPORTED", "check_upstream", "register", "unsupported"]

#: Versions of ms-swift whose trainer the adapter was run with.
SUPPORTED = ">=4.6,<4.7"
_TRAINER = "srpo_swift.trainer.SRPOTrainer"

#: Names by their module, with the parameters (or fields) that they must take; all as in ms-swift 4.6.0.
RELIED_ON: dict[str, dict[str, tuple[str, ...]]] = {
    "swift.trainers.trainer_factory": {"TrainerFactory.TRAINER_MAPPING": ()},
    "swift.cli.main": {"cli_main": (), "parse_yaml_args": ("argv",)},
    "swift.rlhf_trainers.grpo_trainer": {
        "GRPOTrainer._postprocess_batch": ("samples", "batch_encoded_inputs"),  # overridden
        "GRPOTrainer._compute_loss_and_metrics": ("model", "model_inputs", "grpo_batch"),  # watched
        "GRPOTrainer._get_per_token_logps_and_entropies": ("model", "model_inputs", "grpo_batch"),
        "GRPOTrainer.split_by_mini_batches": ("samples",),
        "GRPOTrainer._template_context": ("template",),
        "collate_to_grpo_micro_batch": ("samples", "template", "device", "use_logits_to_keep"),
        "disable_gradient_checkpointing": ("model", "gradient_checkpointing_kwargs"),
    },
    "swift.rl_core.data": {
        "GRPOBatch": ("completion_mask", "old_per_token_logps", "rollout_per_token_logps", "advantages"),
        "GRPOSample": ("messages", "encoded", "advantages"),
    },
}


def check_upstream(*modules: str) -> None:
    """Raise unless ms-swift is a supported version with the names of :data:`RELIED_ON`.

    Args:
        modules: Those to look at, which takes an import; none: all.

    Raises:
        ImportError: Says which version was found and which would do.
    """
    try:
        found = version("ms-swift")
    except PackageNotFoundError:
        raise ImportError(f"ms-swift is not installed: pip install 'ms-swift{SUPPORTED}'") from None
    if not SpecifierSet(SUPPORTED).contains(found, prereleases=True):
        raise unsupported("this version was not tried")
    for module in modules or RELIED_ON:
        names = RELIED_ON[module]
        owner = importlib.import_module(module)
        for name, expected in names.items():
            there: Any = reduce(lambda holder, part: getattr(holder, part, None), name.split("."), owner)
            if there is None:
                raise unsupported(f"{module}.{name} is gone")
            if missing := set(expected) - set(inspect.signature(there).parameters if expected else ()):
                raise unsupported(f"{module}.{name} takes no {', '.join(sorted(missing))}")


def unsupported(problem: str) -> ImportError:
    """The error for an ms-swift that the adapter does not support."""
    return ImportError(
        f"srpo_swift needs ms-swift{SUPPORTED} and found {version('ms-swift')}: {problem}. Install a supported "
        "version, or train with `swift rlhf` without SRPO"
    )


def register() -> None:
    """Make ``--rlhf_type grpo`` train with :class:`~srpo_swift.trainer.SRPOTrainer` in this process."""
    check_upstream()
    from swift.trainers.trainer_factory import TrainerFactory

    TrainerFactory.TRAINER_MAPPING["grpo"] = _TRAINER
