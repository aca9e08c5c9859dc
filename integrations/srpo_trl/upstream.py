"""What the adapter relies on in TRL beyond TRL's documentation: listed and checked here, and nowhere else."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from packaging.specifiers import SpecifierSet

import srpo_core

__all__ = ["RELIED_ON", "SHARING_TRANSFORMERS", "SUPPORTED_TRL", "VISION_KEYS"]
__all__ += ["check_upstream", "transformers_is", "trl_is", "versions"]

# TRL 1.15 computes no log-probabilities on a CPU.
SUPPORTED_TRL = ">=1.0,!=1.15.*"
# What srpo_hf was tested with; before it TRL's own function scores every view.
SHARING_TRANSFORMERS = ">=5.4"

#: Names, by where they have to be. That the loss reads the advantages is proven by training, see the trainer.
RELIED_ON = {
    "trainer class": ("_generate_and_score_completions", "_get_per_token_logps_and_entropies", "_compute_loss"),
    "trainer": ("_metrics", "_logs", "reward_func_names", "reward_weights"),
    "completion log": ("prompt", "rewards", "extra"),
    "rollout batch": ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"),
}
#: Keys that a rollout batch may have beside these, and TRL's log-prob function takes by the same names.
VISION_KEYS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
    "pixel_position_ids",  # the name of the last one in TRL 1.0
)  # fmt: skip


def trl_is(specifier: str) -> bool:
    """Whether the installed TRL is one of these versions."""
    return SpecifierSet(specifier).contains(version("trl"), prereleases=True)


def transformers_is(specifier: str) -> bool:
    """Whether the installed transformers is one of these versions."""
    return SpecifierSet(specifier).contains(version("transformers"), prereleases=True)


def versions() -> str:
    """The end of an error message: what is installed, and what would work."""
    return (
        f"trl {version('trl')} and srpo_core {srpo_core.__version__} are installed, and SRPO was tested with trl 1.0 "
        "to 1.16: install one of these, and tell the maintainers of srpo_core"
    )


def check_upstream(where: str, found: Any) -> None:
    """Raise if something that the adapter relies on is missing.

    Args:
        where: A key of :data:`RELIED_ON`.
        found: What should have these attributes, or, if it is a mapping, these keys.
    """
    if not trl_is(SUPPORTED_TRL):
        raise ImportError(f"trl {version('trl')} is not supported: pip install 'trl{SUPPORTED_TRL}'")
    for name in RELIED_ON[where]:
        if not (name in found if isinstance(found, Mapping) else hasattr(found, name)):
            raise ImportError(f"TRL's {where} has no {name}, on which SRPO relies; {versions()}")
