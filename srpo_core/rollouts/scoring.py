"""Recorded rollouts to scores and weights of their tokens, by the same functions that training uses."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srpo_core.contrasts import perception_consistency, visual_dependency
from srpo_core.diagnostics import ROLE_NAMES
from srpo_core.options import AnswerRole, ContrastKind, CreditOptions
from srpo_core.roles import Role, label_tokens, roles_of_blocks
from srpo_core.rollouts.correct import CorrectRule
from srpo_core.rollouts.record import Rollout
from srpo_core.rollouts.retag import Retag
from srpo_core.tags import BrokenReason
from srpo_core.weights import shared_baseline_weights

__all__ = ["ScoredRollout", "ScoringOptions", "score_rollouts"]

_WINDOW = 256  # rollouts that are sorted by length together
_BATCH_TOKENS = 2**17  # of one call of the core: arrays of this size stay in the cache

#: The values that a rollout file can serve, of options of which it cannot serve every value. A divergence needs the
#: full distributions, and a moving average needs the order of training.
SERVED: dict[str, tuple[str, ...]] = {
    "visual_score": get_args(ContrastKind),
    "consistency_score": get_args(ContrastKind),
    "scale": ("fixed", "batch_rms"),
}
#: Options that are not read here, because a file does not hold what they refer to.
UNREAD = ("reliance_mode", "scale_decay", "mix_warmup_steps")


@dataclass(frozen=True)
class ScoringOptions:
    """How recorded log-probs become weights.

    Attributes:
        config: How scores and weights are made, as in training, with the full `mix` at every step.
        answer_role: What answer tokens count as, where the roles are read from the text.
        recompute: Whether scores and weights are computed even where the trainer's own are recorded.
        right: Which responses count as right, by their reward. It replaces what is recorded. None: as recorded.
        tags: The tags with which responses are read instead of the recorded ones; see :class:`Retag`.

    Raises:
        ValueError: If `answer_role` is unknown, `right` names a reward function, whose rewards are in no file, or the
            options need more than a file holds: a divergence as a score needs the full distributions, and
            ``scale="ema_rms"`` the order of training.
    """

    config: CreditOptions = field(default_factory=CreditOptions)
    _: KW_ONLY
    answer_role: AnswerRole = "reasoning"
    recompute: bool = False
    right: CorrectRule | None = None
    tags: Retag = field(default_factory=Retag)

    def __post_init__(self) -> None:
        if self.right is not None and self.right.function is not None:
            raise ValueError(
                f"right must be a threshold on the whole reward, such as '>=1.0', got '{self.right}': a rollout file "
                "does not hold the rewards of single functions"
            )
        roles_of_blocks(self.answer_role)
        for name, values in SERVED.items():
            if (value := getattr(self.config, name)) not in values:
                others = " or ".join(map(repr, values))
                raise ValueError(f"{name}={value!r} needs more than a rollout file holds; choose {others}")


class ScoredRollout(NamedTuple):
    """A rollout with the roles, scores and weights of its tokens.

    Attributes:
        rollout: The recorded response.
        roles: :class:`~srpo_core.Role` of each token; all ``OTHER`` where the response is broken.
        broken: Why the response is malformed.
        scores: Visual dependency of perception tokens and perception consistency of reasoning tokens, nats.
        weights: As recorded, or computed.
        has_weights: Whether the weights are known: recorded, or computed from a contrast. Else `weights` are 1.
        known_scores: The roles whose scores are known, because scores or the log-probs of the second view are recorded.
            The scores of the other role are 0 in `scores`.
    """

    rollout: Rollout
    roles: NDArray[np.int64]
    broken: BrokenReason
    scores: NDArray[np.float32]
    weights: NDArray[np.float32]
    has_weights: bool
    known_scores: frozenset[Role]

    @property
    def has_contrast(self) -> bool:
        """Whether the scores of any role are known."""
        return bool(self.known_scores)

    @property
    def has_tokens(self) -> bool:
        """Whether the tokens are known."""
        return self.rollout.starts is not None


def score_rollouts(rollouts: Iterable[Rollout], options: ScoringOptions | None = None) -> Iterator[ScoredRollout]:
    """Rollouts with roles, scores and weights, in their order, a few at a time.

    Recorded roles, scores and weights are used where there are any. Otherwise roles come from the text, scores come
    from the log-probs, and weights come from the scores. With ``recompute`` scores come from the log-probs wherever
    these are recorded, and weights always come from the scores. `has_weights` and `known_scores` say what is not known,
    such as the scores of a rollout with neither log-probs nor scores; it is part of no figure.

    Args:
        rollouts: From :func:`~srpo_core.rollouts.read_rollouts`.
        options: How log-probs become weights; None for the defaults.

    Raises:
        ValueError: If ``sign="advantage"`` and a rollout has no advantage, or ``scale="batch_rms"``, which needs all
            rollouts at once: :func:`~srpo_core.rollouts.summarize_files` measures it.

    Example:
        >>> from srpo_core.rollouts import parse_rollout
        >>> rollout = parse_rollout('{"tokens": ["<perception>", "a", "cat", "</perception>"], "old_log_probs": '
        ...                         '[-1, -1, -1, -1], "corrupted_log_probs": [-1, -3, -1, -1]}')
        >>> next(score_rollouts([rollout])).weights
        array([1.       , 1.551016 , 0.4489839, 1.       ], dtype=float32)
    """
    options = options or ScoringOptions()
    if options.config.scale == "batch_rms":
        raise ValueError("scale='batch_rms' needs all rollouts at once: use summarize_files, or scale='fixed'")
    rollouts = map(options.tags, rollouts)
    while window := list(islice(rollouts, _WINDOW)):
        # Sorted by length, so that one long response does not pad all others.
        order = sorted(range(len(window)), key=lambda index: len(window[index]))
        scored: dict[int, ScoredRollout] = {}
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and (end - start + 1) * len(window[order[end]]) <= _BATCH_TOKENS:
                end += 1
            rows = order[start:end]
            scored |= zip(rows, _score_batch([window[row] for row in rows], options), strict=True)
            start = end
        yield from (scored[index] for index in range(len(window)))


def _score_batch(rollouts: list[Rollout], options: ScoringOptions) -> list[ScoredRollout]:
    lengths = [len(rollout) for rollout in rollouts]
    segmented = [_segment(rollout, options) for rollout in rollouts]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    roles = _padded([roles for roles, _ in segmented], mask, torch.int64)
    scores = _scores(rollouts, roles, mask, options)
    advantages = None
    if options.config.sign == "advantage":
        advantages = torch.tensor([_known_advantage(rollout) for rollout in rollouts])
    computed = shared_baseline_weights(scores, roles, mask, options.config, advantages=advantages)

    results = []
    for rollout, row_roles, broken, row_scores, row_weights in zip(
        rollouts, *zip(*segmented, strict=True), scores.numpy(), computed.numpy(), strict=True
    ):
        length = len(rollout)
        known = _second_passes(rollout) if rollout.scores is None else frozenset(ROLE_NAMES)
        recorded = None if options.recompute else rollout.weights
        weights = row_weights[:length] if recorded is None else recorded
        has_weights = recorded is not None or bool(known)
        results.append(ScoredRollout(rollout, row_roles, broken, row_scores[:length], weights, has_weights, known))
    return results


def _scores(rollouts: list[Rollout], roles: Tensor, mask: Tensor, options: ScoringOptions) -> Tensor:
    """The score of each token under its role, from the log-probs or as recorded, 0 where there is none."""
    config, clip = options.config, options.config.score_clip
    old = _padded([rollout.old_log_probs for rollout in rollouts], mask)

    def of_second_pass(name: str) -> Tensor:
        others = [getattr(rollout, name) if rollout.old_log_probs is not None else None for rollout in rollouts]
        # Without a second pass both sides are equal, and the contrast is 0.
        missing = torch.tensor([other is None for other in others])[:, None]
        return torch.where(missing, old, _padded(others, mask))

    visual_kind: Any = config.visual_score  # no divergence: see ScoringOptions
    consistency_kind: Any = config.consistency_score
    corrupted, counterfactual = of_second_pass("corrupted_log_probs"), of_second_pass("counterfactual_log_probs")
    visual = visual_dependency(old, roles, mask, corrupted_log_probs=corrupted, kind=visual_kind, clip=clip)
    consistency = perception_consistency(
        old, roles, mask, counterfactual_log_probs=counterfactual, kind=consistency_kind, clip=clip
    )
    recorded = _padded([rollout.scores for rollout in rollouts], mask).clamp(-clip, clip)
    recorded = torch.where(mask & (roles != int(Role.OTHER)), recorded, 0.0)
    scores = torch.zeros_like(old)
    for role, computed in ((Role.PERCEPTION, visual), (Role.REASONING, consistency)):
        use_recorded = [
            rollout.scores is not None and not (options.recompute and role in _second_passes(rollout))
            for rollout in rollouts
        ]
        of_role = torch.where(torch.tensor(use_recorded)[:, None], recorded, computed)
        scores = torch.where(roles == int(role), of_role, scores)
    return scores


def _second_passes(rollout: Rollout) -> frozenset[Role]:
    """The roles whose contrast the log-probs tell."""
    others = {Role.PERCEPTION: rollout.corrupted_log_probs, Role.REASONING: rollout.counterfactual_log_probs}
    return frozenset(role for role, other in others.items() if rollout.old_log_probs is not None and other is not None)


def _known_advantage(rollout: Rollout) -> float:
    if not len(rollout):  # nothing is weighted
        return 0.0
    if rollout.advantage is None:
        raise ValueError("sign='advantage' needs 'advantage' in every line: pass advantages to RolloutWriter.write")
    return rollout.advantage


def _segment(rollout: Rollout, options: ScoringOptions) -> tuple[NDArray[np.int64], BrokenReason]:
    if rollout.roles is not None and rollout.broken is not None:
        return rollout.roles, rollout.broken
    parsed = rollout.parsed
    if rollout.roles is not None:
        return rollout.roles, parsed.reason
    if rollout.starts is None or rollout.ends is None:
        return np.zeros(0, np.int64), parsed.reason
    starts, ends, role_of = rollout.starts.tolist(), rollout.ends.tolist(), roles_of_blocks(options.answer_role)
    roles, _ = label_tokens(rollout.text, starts, ends, parsed, rollout.tags, role_of)
    return np.array(roles, dtype=np.int64), parsed.reason


def _padded(rows: Sequence[NDArray[Any] | None], mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    padded = np.zeros(mask.shape, dtype=np.int64 if dtype == torch.int64 else np.float32)
    for row, values in enumerate(rows):
        if values is not None:
            padded[row, : len(values)] = values
    return torch.from_numpy(padded)
