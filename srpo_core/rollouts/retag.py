"""Other tags for rollouts, whose roles are then read from the text again."""

from dataclasses import dataclass, replace
from typing import Any

from srpo_core.rollouts.record import Rollout, RolloutError
from srpo_core.tags import RoleTags

__all__ = ["Retag", "tags_as_json"]


@dataclass(frozen=True)
class Retag:
    """The tags with which a rollout is read, instead of the recorded ones.

    What the trainer found with its own tags is then not used: the roles, the reason why a response is malformed, and
    the scores, which depend on the roles. Log-probs, weights and rewards are used.

    Attributes:
        tags: All tags; None: those of the rollout.
        changed: Some tags, by kind of block (``perception``, ``reasoning``, ``answer``), in place of those.

    Example:
        >>> rollout = Rollout(text="<d>a cat</d>")
        >>> Retag(changed=(("perception", ("<d>", "</d>")),))(rollout).tags.perception
        ('<d>', '</d>')
    """

    tags: RoleTags | None = None
    changed: tuple[tuple[str, Any], ...] = ()

    def __bool__(self) -> bool:
        return self.tags is not None or bool(self.changed)

    def of(self, tags: RoleTags) -> RoleTags:
        """The tags that replace the given ones.

        Raises:
            RolloutError: If the changed tags contradict the others, because one tag would mean two things.
        """
        tags = tags if self.tags is None else self.tags
        try:
            return replace(tags, **dict(self.changed)) if self.changed else tags
        except ValueError as error:
            raise RolloutError(f"{error}; with the changed tags the format is {self._format(tags)}") from None

    def _format(self, tags: RoleTags) -> str:
        pairs = tags.pairs | dict(self.changed)
        return "; ".join(f"{kind} = {' ... '.join(filter(None, pair))}" for kind, pair in pairs.items() if pair)

    def __call__(self, rollout: Rollout) -> Rollout:
        """The rollout with these tags; the same object if nothing changes."""
        if not self or (tags := self.of(rollout.tags)) == rollout.tags:
            return rollout
        return replace(rollout, tags=tags, roles=None, broken=None, scores=None)


def tags_as_json(tags: RoleTags) -> dict[str, Any]:
    """Tags as a line of a rollout file holds them: a heading has no closing tag."""
    pairs: dict[str, Any] = {"answer": None} | {kind: [tag for tag in pair if tag] for kind, pair in tags.pairs.items()}
    return pairs | ({"nested": True} if getattr(tags, "nested", False) else {})
