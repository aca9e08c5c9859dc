"""Scored rollouts to one row of numbers per response, and counts of weights and scores: all that a summary keeps."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from srpo_core.diagnostics import QUANTILES, ROLE_NAMES
from srpo_core.roles import Role
from srpo_core.rollouts.record import Rollout
from srpo_core.rollouts.scoring import ScoredRollout, ScoringOptions

# Weights are counted on a grid of equal ratios that contains 1, scores on a grid of equal steps of asinh that contains
# 0. A quantile that is read off a grid lies between two values that are exact to 0.3 %, however many tokens there are.
_WEIGHT_STEPS, _WEIGHT_REACH = 128, 8  # steps to a factor of 2, and factors of 2 in each direction
_SCORE_STEPS, _SCORE_REACH, _SCORE_UNIT = 200, 12, 1e-3
#: The weights that are counted; others count as the nearest of them.
WEIGHT_GRID = 2.0 ** (np.arange(-_WEIGHT_REACH * _WEIGHT_STEPS, _WEIGHT_REACH * _WEIGHT_STEPS + 1) / _WEIGHT_STEPS)
#: The scores that are counted, nats.
SCORE_GRID = _SCORE_UNIT * np.sinh(
    np.arange(-_SCORE_REACH * _SCORE_STEPS, _SCORE_REACH * _SCORE_STEPS + 1) / _SCORE_STEPS
)
#: Stands for an unknown value in columns that otherwise hold 0 for no and 1 for yes.
UNKNOWN = -1

# What is known about an answer. The last two are folded when all files have been read: rewards that are only 0 and 1
# distinguish right answers from wrong ones, other rewards do not.
WRONG, RIGHT, UNTOLD, REWARD_0, REWARD_1 = range(5)


class Counted(NamedTuple):
    """The numbers of some responses.

    Attributes:
        columns: Arrays with one entry per response.
        weights: Number of tokens by role, answer (wrong, right, unknown, reward 0, reward 1) and weight.
        scores: Number of tokens by role and score.
        changes: Number of tokens by role and by the nats that they lose in their second view.
        extremes: Least and greatest weight by role.
    """

    columns: dict[str, NDArray[Any]]
    weights: NDArray[np.int64]
    scores: NDArray[np.int64]
    changes: NDArray[np.int64]
    extremes: NDArray[np.float64]


def count(scored: Sequence[ScoredRollout], options: ScoringOptions) -> Counted:
    """The numbers of scored rollouts. Sums are over what is known: an unknown value is not counted, not even as 0."""
    rollouts = [row.rollout for row in scored]
    score_clip = options.config.score_clip
    lengths = np.array([len(row.weights) for row in scored], dtype=np.int64)
    # A response that is known to have no tokens, such as padding, is not judged.
    is_response = np.array([len(row.weights) > 0 or not row.has_tokens for row in scored], dtype=bool)
    answers = np.where(is_response, [_answer(rollout, options) for rollout in rollouts], UNTOLD).astype(np.int64)
    # All tokens of all responses in a row, and which response each belongs to.
    response = np.repeat(np.arange(len(scored)), lengths)
    roles, weights, scores = (
        np.concatenate([getattr(row, name) for row in scored] or [np.zeros(0)])
        for name in ("roles", "weights", "scores")
    )
    weights, scores = weights.astype(np.float64), scores.astype(np.float64)
    has_weights = np.array([row.has_weights for row in scored], dtype=bool)
    weighed = has_weights[response]

    def total(values: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.bincount(response[where], weights=values[where], minlength=len(scored)).astype(np.float64)

    def number(where: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(response[where], minlength=len(scored))

    noise, repeated = np.zeros_like(weights), np.zeros(len(scored), dtype=bool)
    down, up, diverged = np.zeros_like(weights), np.zeros_like(weights), np.zeros(len(scored), dtype=bool)
    lost, compared = np.zeros_like(weights), {role: np.zeros(len(scored), dtype=bool) for role in ROLE_NAMES}
    for row, (start, rollout) in enumerate(zip(lengths.cumsum() - lengths, rollouts, strict=True)):
        tokens = slice(start, start + lengths[row])
        if rollout.down_divergence is not None and rollout.up_divergence is not None:
            diverged[row] = has_weights[row]  # without weights it is not known which tokens these are about
            down[tokens], up[tokens] = rollout.down_divergence, rollout.up_divergence
        if rollout.old_log_probs is not None and rollout.repeated_log_probs is not None:
            repeated[row] = True
            noise[tokens] = _difference(rollout.old_log_probs, rollout.repeated_log_probs, score_clip)
        for role, other in _second_views(rollout).items():
            if rollout.old_log_probs is not None and other is not None:
                compared[role][row] = True
                of_role = roles[tokens] == int(role)
                lost[tokens][of_role] = _difference(rollout.old_log_probs, other, score_clip)[of_role]
    # The tokens that interference is about.
    emphasized = weighed & (roles == int(Role.PERCEPTION)) & (weights > 1.0)

    columns: dict[str, NDArray[Any]] = {
        "tokens": lengths,
        "has_tokens": np.array([row.has_tokens for row in scored], dtype=bool),
        "reward": np.array([_nan(rollout.reward) for rollout in rollouts], dtype=np.float64),
        "advantage": np.array([_nan(rollout.advantage) for rollout in rollouts], dtype=np.float64),
        "answer": answers,
        "only_reward": np.array([_has_only_reward(rollout, options) for rollout in rollouts], dtype=bool),
        "perception_right": np.array([_flag(rollout.perception_correct) for rollout in rollouts], dtype=np.int64),
        "broken": np.where(is_response, [int(row.broken) for row in scored], UNKNOWN).astype(np.int64),
        "step": np.array([UNKNOWN if rollout.step is None else rollout.step for rollout in rollouts], dtype=np.int64),
        "swapped": np.array([_flag(rollout.swapped) for rollout in rollouts], dtype=np.int64),
        "recorded": np.array([rollout.weights is not None for rollout in rollouts], dtype=bool),
        "contrast": np.array([row.has_contrast for row in scored], dtype=bool),
        "repeated": repeated,
        "weighed": np.where(has_weights, lengths, 0),
        "weights": total(weights, weighed),
        "squared_weights": total(weights**2, weighed),
        "squared_scored_weights": total(weights**2, weighed & (roles > 0)),
        "diverged": diverged,
        "down_divergence": total(down, emphasized),
        "up_divergence": total(up, emphasized),
    }
    weight_counts, score_counts, change_counts, extremes = [], [], [], no_extremes()
    for index, (role, name) in enumerate(ROLE_NAMES.items()):
        where = roles == int(role)
        of_role = where & weighed
        known = where & np.array([role in row.known_scores for row in scored], dtype=bool)[response]
        changed = where & compared[role][response]
        of_weights = weights[of_role]
        columns |= {
            f"{name}/tokens": number(where),
            f"{name}/weighed": number(of_role),
            f"{name}/weights": total(weights, of_role),
            f"{name}/scored": number(known),
            f"{name}/scores": total(scores, known),
            f"{name}/squared_scores": total(scores**2, known),
            f"{name}/clipped": total((np.abs(scores) >= score_clip).astype(np.float64), known),
            f"{name}/squared_noise": total(noise**2, where),
            f"{name}/compared": number(changed),
            f"{name}/lost": total(lost, changed),
        }
        columns[f"{name}/repeated"] = np.where(repeated, columns[f"{name}/tokens"], 0)
        with np.errstate(divide="ignore"):  # a weight of 0 is counted at the low end
            bins = _bins(np.log2(of_weights) * _WEIGHT_STEPS, len(WEIGHT_GRID))
        counted = np.bincount(answers[response[of_role]] * len(WEIGHT_GRID) + bins, minlength=5 * len(WEIGHT_GRID))
        weight_counts.append(counted.reshape(5, -1))
        score_counts.append(_on_score_grid(scores[known]))
        change_counts.append(_on_score_grid(lost[changed]))
        if len(of_weights):
            extremes[index] = of_weights.min(), of_weights.max()
    tokens = [np.stack(each) for each in (weight_counts, score_counts, change_counts)]
    return Counted(columns, tokens[0], tokens[1], tokens[2], extremes)


def _second_views(rollout: Rollout) -> dict[Role, NDArray[np.float32] | None]:
    """The log-probs of the second view of each role. Where no other perception was found, none was replaced."""
    replaced = None if rollout.swapped is False else rollout.counterfactual_log_probs
    return {Role.PERCEPTION: rollout.corrupted_log_probs, Role.REASONING: replaced}


def _difference(one: NDArray[np.float32], other: NDArray[np.float32], clip: float) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # minus infinity in both passes: no difference
        return np.clip(np.nan_to_num(one.astype(np.float64) - other, nan=0.0), -clip, clip)


def _on_score_grid(values: NDArray[np.float64]) -> NDArray[np.int64]:
    bins = _bins(np.arcsinh(values / _SCORE_UNIT) * _SCORE_STEPS, len(SCORE_GRID))
    return np.bincount(bins, minlength=len(SCORE_GRID))


def right_of(rollout: Rollout, options: ScoringOptions) -> bool | None:
    """Whether an answer is right, as far as one response tells: by the rule of the options, else as recorded."""
    return rollout.is_right if options.right is None else options.right.of_reward(rollout.reward)


def _answer(rollout: Rollout, options: ScoringOptions) -> int:
    right = right_of(rollout, options)
    if right is not None:
        return RIGHT if right else WRONG
    if _has_only_reward(rollout, options) and rollout.reward in (0.0, 1.0):
        return REWARD_1 if rollout.reward else REWARD_0
    return UNTOLD


def _has_only_reward(rollout: Rollout, options: ScoringOptions) -> bool:
    """Whether only the reward can decide. Where a trainer has a rule but gave no verdict, nothing decides."""
    told = options.right is not None or rollout.correct is not None or rollout.correct_by is not None
    return rollout.reward is not None and not told


def fold(counted: Counted) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
    """Which answers are right, once all responses are counted: without a rule, rewards decide if they are all 0 or 1.

    Returns:
        For each response 0, 1 or `UNKNOWN`; the number of tokens by role, answer (wrong, right, unknown) and weight;
        and whether the rewards decided.
    """
    columns, weights = counted.columns, counted.weights
    rewards = columns["reward"][columns["only_reward"]]
    told = len(rewards) > 0 and bool(np.isin(rewards, (0.0, 1.0)).all())
    meaning = np.array([0, 1, UNKNOWN, 0, 1] if told else [0, 1, UNKNOWN, UNKNOWN, UNKNOWN])
    folded = np.stack([weights[:, meaning == answer].sum(1) for answer in (0, 1, UNKNOWN)], 1)
    return meaning[columns["answer"]], folded, told


def no_weights() -> NDArray[np.int64]:
    """Counts of weights where there are no tokens."""
    return np.zeros((len(ROLE_NAMES), 5, len(WEIGHT_GRID)), np.int64)


def no_scores() -> NDArray[np.int64]:
    """Counts of scores where there are no tokens."""
    return np.zeros((len(ROLE_NAMES), len(SCORE_GRID)), np.int64)


def no_extremes() -> NDArray[np.float64]:
    """Least and greatest weight by role where there are no tokens."""
    return np.array([[np.inf, -np.inf]] * len(ROLE_NAMES))


def quantiles(name: str, counts: NDArray[np.int64], grid: NDArray[np.float64]) -> dict[str, float]:
    """The quantiles of counted values, by their names in a metric; none where nothing was counted."""
    cumulative = counts.cumsum()
    if not cumulative[-1]:
        return {}
    return {f"{name}/{key}": _quantile(cumulative, grid, percent) for key, percent in QUANTILES.items()}


def _quantile(cumulative: NDArray[np.int64], grid: NDArray[np.float64], percent: int) -> float:
    rank = percent * (int(cumulative[-1]) - 1)
    low, high = (grid[np.searchsorted(cumulative, 1 + number)] for number in (rank // 100, -(-rank // 100)))
    return float(low + rank % 100 / 100 * (high - low))


def _bins(positions: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    return np.clip(np.rint(positions) + size // 2, 0, size - 1).astype(np.int64)


def _flag(value: bool | None) -> int:
    return UNKNOWN if value is None else int(value)


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
