"""The proof that SRPO's weights reach the actor's update: a method may still exist when verl no longer calls it."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transfer_queue import KVBatchMeta

from srpo_verl.upstream import installed, unknown_version

__all__ = ["Proof"]

logger = logging.getLogger(__name__)


class Proof:
    """Follows the weighted advantages of each batch from the driver to the actor's update."""

    def __init__(self) -> None:
        self.holds = False
        self._weighted: dict[str, Tensor] = {}

    def put(self, keys: Sequence[str], advantages: Tensor) -> None:
        """Weighted advantages of these rows were written, [rows, tokens], nested."""
        self._weighted = dict(zip(keys, advantages.unbind(), strict=True))

    def check_update(self, batch: KVBatchMeta, read: Callable[[], Tensor], *, step: int) -> None:
        """Raise unless the actor is about to be updated with weighted advantages; only then is SRPO said to be active.

        Args:
            batch: What it is updated with.
            read: Reads the advantages as the workers will, [rows, tokens], nested. Called until the proof holds.
            step: Training step.
        """
        fetched = batch.fields is None or "advantages" in batch.fields
        if not (set(batch.keys) <= set(self._weighted) and fetched):
            raise unknown_version("the actor is updated with a batch whose advantages SRPO did not weight")
        if self.holds:
            return
        if not all(torch.equal(row, self._weighted[key]) for key, row in zip(batch.keys, read().unbind(), strict=True)):
            raise unknown_version("advantages were replaced between SRPO's weights and the actor's update")
        self.holds = True
        logger.warning("SRPO is active: its weights reached the actor's update in step %d (%s)", step, installed())

    def check_step(self) -> None:
        """Raise if a step that updates the actor has ended without it."""
        if not self.holds:
            raise unknown_version("verl ended a step without PPOTrainer._update_actor, which SRPO extends")
