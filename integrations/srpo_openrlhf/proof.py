"""Proof, with the first batch of a run, that OpenRLHF trains on the advantages that were weighted."""

from collections.abc import Sequence
from typing import Any

from srpo_openrlhf.hooks import unsupported

__all__ = ["Arrival"]


class Arrival:
    """Watches a ``RayActorGroup`` from the moment a batch is weighted until the actors are told to train on it.

    Raises:
        RuntimeError: Out of the group's methods: if the actors are sent other advantages than the weighted ones, or are
            told to train without having been sent these.
    """

    def __init__(self, group: Any, experiences: Sequence[Any]) -> None:
        self._group, self._weighted, self._is_proven = group, _fingerprints(experiences), False
        self._run, self._run_batch = group.async_run_method, group.async_run_method_batch
        # On the instance, so that deleting them brings the methods of its class back.
        group.async_run_method, group.async_run_method_batch = self._watch, self._watch_batch

    def check(self) -> None:
        """Raise unless the batch has arrived."""
        if not self._is_proven:
            raise unsupported("training went on without the experiences whose advantages SRPO weighted")

    def _watch_batch(self, method_name: str, **kwargs: Any) -> Any:
        if method_name == "append":
            if _fingerprints(kwargs["experience"]) != self._weighted:
                raise unsupported("the advantages that the actors were sent are not those that SRPO weighted")
            self._is_proven = True
        return self._run_batch(method_name, **kwargs)

    def _watch(self, method_name: str, *args: Any, **kwargs: Any) -> Any:
        if method_name == "fit":
            self.check()
            del self._group.async_run_method, self._group.async_run_method_batch
        return self._run(method_name, *args, **kwargs)


def _fingerprints(experiences: Sequence[Any]) -> list[int]:
    """One number for the tokens and advantages of each response, sorted: OpenRLHF may regroup and pad them anew."""
    return sorted(
        hash((tokens[attended.bool()].numpy().tobytes(), advantages[mask.bool()].double().numpy().tobytes()))
        for each in experiences
        for tokens, attended, advantages, mask in zip(
            each.sequences, each.attention_mask, each.advantages, each.action_mask, strict=True
        )
    )
