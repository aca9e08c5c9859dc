"""Rollout files to statistics: streamed, scored by the core, and small enough to keep whatever the file's size.

The names are those of :func:`~srpo_core.diagnostics.credit_diagnostics`.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from typing import Any, NamedTuple, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srpo_core.contrasts import ContrastKind, perception_consistency, visual_dependency
from srpo_core.diagnostics import QUANTILES, ROLE_NAMES, Answer
from srpo_core.roles import BrokenReason, Role, label_tokens, parse_response
from srpo_core.rollouts import Rollout, RolloutError, parse_rollout
from srpo_core.srpo import SRPOConfig
from srpo_core.typechecking import choose
from srpo_core.weights import shared_baseline_weights

__all__ = [
    "CreditOptions",
    "ScoredRollout",
    "Summary",
    "load",
    "score_rollouts",
    "summarize_files",
    "summarize_rollouts",
]

_BATCH_TOKENS = 2**17  # of one call of the core: arrays that stay in the cache
_CHUNK_BYTES = 2**23  # of a file, for one task of a worker
_PARALLEL_BYTES = 2**26  # below, starting workers takes longer than reading
_KEPT_ERRORS = 1000


@dataclass(frozen=True)
class CreditOptions:
    """How recorded log-probs become weights.

    Attributes:
        config: Scores and weights, as in training.
        recompute: Whether to do so where the trainer's own weights are recorded too.
    """

    config: SRPOConfig = field(default_factory=SRPOConfig)
    recompute: bool = False

    def __post_init__(self) -> None:
        for name in ("visual_score", "consistency_score"):
            # A divergence needs full distributions: only its recorded values can be used, and these have no kind.
            choose(name, getattr(self.config, name), dict.fromkeys(get_args(ContrastKind)))
        if self.config.scale == "ema_rms":
            raise ValueError("scale='ema_rms' depends on the order of training; use 'batch_rms' or 'fixed'")


class ScoredRollout(NamedTuple):
    """A rollout, and what each of its tokens is worth.

    Attributes:
        rollout: As recorded.
        roles: :class:`~srpo_core.Role` of each token; all ``OTHER`` where the response is broken.
        broken: Why it is malformed.
        scores: Visual dependency of perception tokens, perception consistency of reasoning tokens, nats.
        weights: As recorded, or computed.
        has_contrast: Whether scores are known: without them, computed weights are 1.
    """

    rollout: Rollout
    roles: NDArray[np.int64]
    broken: BrokenReason
    scores: NDArray[np.float32]
    weights: NDArray[np.float32]
    has_contrast: bool


# Scoring


def score_rollouts(rollouts: Iterable[Rollout], options: CreditOptions | None = None) -> Iterator[ScoredRollout]:
    """Rollouts with roles, scores and weights, in order, a few at a time.

    Recorded roles, scores and weights are used where there are any. Else roles come from the text, scores from the
    log-probs and weights from the scores. To recompute means: scores from the log-probs where these are recorded, and
    weights from the scores. Without log-probs and scores, scores are 0.

    Example:
        >>> rollout = parse_rollout('{"tokens": ["<perception>", "a", "cat", "</perception>"], "old_log_probs": '
        ...                         '[-1, -1, -1, -1], "corrupted_log_probs": [-1, -3, -1, -1]}')
        >>> next(score_rollouts([rollout])).weights
        array([1.       , 1.551016 , 0.4489839, 1.       ], dtype=float32)
    """
    options = options or CreditOptions()
    rollouts = iter(rollouts)
    while window := list(islice(rollouts, 256)):
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


def _score_batch(rollouts: list[Rollout], options: CreditOptions) -> list[ScoredRollout]:
    config = options.config
    lengths = [len(rollout) for rollout in rollouts]
    segmented = [_segment(rollout, config) for rollout in rollouts]
    time = max(lengths)
    mask = torch.arange(time) < torch.tensor(lengths)[:, None]
    roles = _padded([roles for roles, _ in segmented], mask, torch.int64)
    old = _padded([rollout.old_log_probs for rollout in rollouts], mask)

    recorded = _padded([rollout.scores for rollout in rollouts], mask).clamp(-config.score_clip, config.score_clip)
    use_recorded = [
        rollout.scores is not None and not (options.recompute and _has_log_probs(rollout)) for rollout in rollouts
    ]
    scores = []
    kind: Any
    for function, kind, name in (
        (visual_dependency, config.visual_score, "corrupted_log_probs"),
        (perception_consistency, config.consistency_score, "counterfactual_log_probs"),
    ):
        others = [getattr(rollout, name) if rollout.old_log_probs is not None else None for rollout in rollouts]
        # Without the second pass both sides are equal: the contrast is 0.
        missing = torch.tensor([other is None for other in others])[:, None]
        other = torch.where(missing, old, _padded(others, mask))
        contrasted = function(old, other, roles, mask, kind=kind, clip=config.score_clip)
        scores.append(torch.where(torch.tensor(use_recorded)[:, None], recorded, contrasted))
    visual, consistency = scores
    joined = torch.where(roles == int(Role.PERCEPTION), visual, 0.0)
    joined = torch.where(roles == int(Role.REASONING), consistency, joined)

    advantages = None
    if config.sign == "advantage":
        advantages = torch.tensor([_known_advantage(rollout) for rollout in rollouts])
    computed = shared_baseline_weights(
        visual,
        consistency,
        roles,
        mask,
        strength=config.strength,
        baseline=config.baseline,
        weight_map=config.weight_map,
        renormalization=config.renormalization,
        visual_scale=config.visual_scale,
        consistency_scale=config.consistency_scale,
        bound=config.bound,
        sign=config.sign,
        advantages=advantages,
        mix=config.mix,
    )
    results = []
    for rollout, row_roles, broken, row_scores, row_weights in zip(
        rollouts, *zip(*segmented, strict=True), joined.numpy(), computed.numpy(), strict=True
    ):
        length = len(rollout)
        weights = rollout.weights if rollout.weights is not None and not options.recompute else row_weights[:length]
        has_contrast = rollout.scores is not None or _has_log_probs(rollout)
        results.append(ScoredRollout(rollout, row_roles, broken, row_scores[:length], weights, has_contrast))
    return results


def _has_log_probs(rollout: Rollout) -> bool:
    others = (rollout.corrupted_log_probs, rollout.counterfactual_log_probs)
    return rollout.old_log_probs is not None and any(other is not None for other in others)


def _known_advantage(rollout: Rollout) -> float:
    if rollout.advantage is None:
        raise ValueError("sign='advantage' needs 'advantage' in every line: pass advantages to RolloutWriter.write")
    return rollout.advantage


_ANSWER_ROLES = {"reasoning": int(Role.REASONING), "other": int(Role.OTHER)}


def _segment(rollout: Rollout, config: SRPOConfig) -> tuple[NDArray[np.int64], BrokenReason]:
    if rollout.roles is not None and rollout.broken is not None:
        return rollout.roles, rollout.broken
    tags = rollout.tags
    parsed = parse_response(rollout.text, tags, finished=rollout.finished)
    if rollout.roles is not None:
        return rollout.roles, parsed.reason
    if rollout.starts is None or rollout.ends is None:
        return np.zeros(0, np.int64), parsed.reason
    role_of = {
        "perception": int(Role.PERCEPTION),
        "reasoning": int(Role.REASONING),
        "answer": _ANSWER_ROLES[config.answer_role],
    }
    roles, _ = label_tokens(rollout.text, rollout.starts.tolist(), rollout.ends.tolist(), parsed, tags, role_of)
    return np.array(roles, dtype=np.int64), parsed.reason


def _padded(rows: Sequence[NDArray[Any] | None], mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    padded = np.zeros(mask.shape, dtype=np.int64 if dtype == torch.int64 else np.float32)
    for row, values in enumerate(rows):
        if values is not None:
            padded[row, : len(values)] = values
    return torch.from_numpy(padded)


# Summarising

# Weights are counted on a grid of equal ratios with 1 on it, scores on one of equal steps of asinh with 0 on it: a
# quantile read off either lies between two values that are exact to 0.3 %, whatever the number of tokens.
_WEIGHT_STEPS, _WEIGHT_REACH = 128, 8  # steps to a factor of 2, and factors of 2 up and down
_SCORE_STEPS, _SCORE_REACH, _SCORE_UNIT = 200, 12, 1e-3
_WEIGHT_GRID = 2.0 ** (np.arange(-_WEIGHT_REACH * _WEIGHT_STEPS, _WEIGHT_REACH * _WEIGHT_STEPS + 1) / _WEIGHT_STEPS)
_SCORE_GRID = _SCORE_UNIT * np.sinh(
    np.arange(-_SCORE_REACH * _SCORE_STEPS, _SCORE_REACH * _SCORE_STEPS + 1) / _SCORE_STEPS
)
_UNKNOWN = -1  # of what is otherwise 0, no, or 1, yes


class Place(NamedTuple):
    """Where a response was read: the file, the byte at which its line begins, and the line's number from 1."""

    file: int
    offset: int
    line: int


@dataclass(eq=False)
class Summary:
    """What is kept of rollouts: one row of numbers a response, and counts of weights and scores.

    Attributes:
        options: How weights were had.
        files: What was read; empty for rollouts in memory.
        columns: Arrays with one entry a response.
        groups: Which prompt each response answers, None where that is not recorded.
        places: Where each response was read.
        weight_counts: Tokens by role, answer (wrong, right, unknown) and weight.
        score_counts: Tokens by role and score.
        extremes: Least and greatest weight by role.
        errors: The first malformed lines.
        malformed: How many there are.
        lines: Lines read.
    """

    options: CreditOptions
    files: tuple[str, ...] = ()
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    groups: list[tuple[int, str] | None] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    weight_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, 3, len(_WEIGHT_GRID)), np.int64))
    score_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, len(_SCORE_GRID)), np.int64))
    extremes: NDArray[np.float64] = field(default_factory=lambda: np.array([[np.inf, -np.inf]] * 2))
    errors: list[RolloutError] = field(default_factory=list)
    malformed: int = 0
    lines: int = 0

    def __len__(self) -> int:
        """Responses."""
        return len(self.groups)

    @classmethod
    def joined(cls, parts: Sequence["Summary"], options: CreditOptions) -> Self:
        """The summary of all that the parts summarise, in order."""
        joined = cls(options)
        for part in parts:
            joined.groups += part.groups
            joined.places += [place._replace(line=place.line + joined.lines) for place in part.places]
            joined.weight_counts += part.weight_counts
            joined.score_counts += part.score_counts
            joined.extremes[:, 0] = np.minimum(joined.extremes[:, 0], part.extremes[:, 0])
            joined.extremes[:, 1] = np.maximum(joined.extremes[:, 1], part.extremes[:, 1])
            for error in part.errors[: _KEPT_ERRORS - len(joined.errors)]:
                line = None if error.line is None else error.line + joined.lines
                joined.errors.append(RolloutError(error.reason, line=line, path=error.path))
            joined.malformed += part.malformed
            joined.lines += part.lines
        filled = [part.columns for part in parts if part.columns] or [_columns([], options)[0]]
        joined.columns = {name: np.concatenate([columns[name] for columns in filled]) for name in filled[0]}
        return joined

    @property
    def weight_grid(self) -> NDArray[np.float64]:
        """The weights that are counted; others to the nearest of these."""
        return _WEIGHT_GRID

    @property
    def score_grid(self) -> NDArray[np.float64]:
        """The scores that are counted, nats."""
        return _SCORE_GRID

    @property
    def advantages(self) -> NDArray[np.float64]:
        """Of each response: recorded, else from the rewards of its group; NaN where neither is known."""
        recorded, rewards = self.columns["advantage"], self.columns["reward"]
        numbers = {group: number for number, group in enumerate(dict.fromkeys(self.groups))}
        known = np.array([group is not None for group in self.groups], dtype=bool) & ~np.isnan(rewards)
        if not known.any():
            return recorded
        group = np.array([numbers[group] for group in self.groups])[known]
        size = np.bincount(group, minlength=len(numbers))[group]
        centred = rewards[known] - np.bincount(group, weights=rewards[known])[group] / size
        # The spread of equal rewards is 0 but for rounding.
        centred[np.abs(centred) < 1e-9 * (1 + np.abs(rewards[known]))] = 0.0
        spread = np.sqrt(np.bincount(group, weights=centred**2)[group] / np.maximum(size - 1, 1))
        computed = np.full(len(self), np.nan)
        computed[known] = centred / (spread + self.options.config.epsilon)
        return np.where(np.isnan(recorded), computed, recorded)

    def metrics(self) -> dict[str, float]:
        """The statistics of :func:`~srpo_core.diagnostics.credit_diagnostics`, under its names, as far as is known.

        Quantiles, and what is counted beyond the noise, are exact to 0.3 % of the value. ``interference`` is that of
        :func:`~srpo_core.diagnostics.interference` over the responses that have both divergences, with the weights as
        recorded: recomputed ones would part the tokens otherwise than the two steps did.
        """
        columns = self.columns
        real = columns["tokens"] > 0
        tokens, total = columns["tokens"].sum(), columns["weights"].sum()
        metrics: dict[str, float] = {}
        for index, name in enumerate(ROLE_NAMES.values()):
            count, weight = columns[f"{name}/tokens"].sum(), columns[f"{name}/weights"].sum()
            low, high = self.extremes[index] if count else (1.0, 1.0)
            mean = _ratio(columns[f"{name}/scores"].sum(), count)
            square = _ratio(columns[f"{name}/squared_scores"].sum(), count)
            metrics |= {
                f"weight/{name}/mean": _ratio(weight, count, 1.0),
                f"weight/{name}/min": float(low),
                f"weight/{name}/max": float(high),
                f"weight/{name}/mass": _ratio(weight, total),
                f"tokens/{name}/fraction": _ratio(count, tokens),
                f"score/{name}/mean": mean,
                f"score/{name}/std": math.sqrt(max(square - mean**2, 0.0)),
                f"score/{name}/clipped": _ratio(columns[f"{name}/clipped"].sum(), count),
            }
            metrics |= _named(f"weight/{name}", self.weight_counts[index].sum(0), _WEIGHT_GRID, 1.0)
            metrics |= _named(f"score/{name}", self.score_counts[index], _SCORE_GRID, 0.0)
            if (columns["right"] != _UNKNOWN).any():
                for answer in get_args(Answer):
                    rows = columns["right"] == (answer == "right")
                    of_rows = columns[f"{name}/tokens"][rows].sum()
                    metrics[f"weight/{name}/{answer}/mean"] = _ratio(
                        columns[f"{name}/weights"][rows].sum(), of_rows, 1.0
                    )
                    counts = self.weight_counts[index, int(answer == "right")]
                    metrics |= _named(f"weight/{name}/{answer}", counts, _WEIGHT_GRID, 1.0)
            if columns["repeated"].any():
                rms = math.sqrt(_ratio(columns[f"{name}/squared_noise"].sum(), columns[f"{name}/repeated"].sum()))
                above = self.score_counts[index][np.abs(_SCORE_GRID) > 2 * rms].sum()
                metrics |= {f"noise/{name}/rms": rms, f"noise/{name}/above": _ratio(above, count)}
        scored = sum(columns[f"{name}/tokens"].sum() for name in ROLE_NAMES.values())
        scored_weight = sum(columns[f"{name}/weights"].sum() for name in ROLE_NAMES.values())
        square = scored * columns["squared_scored_weights"].sum()
        metrics["tokens/effective_fraction"] = _ratio(scored_weight**2, square, 1.0)
        structured = np.logical_or.reduce([columns[f"{name}/tokens"] > 0 for name in ROLE_NAMES.values()])
        metrics["structured/fraction"] = _mean(structured[real])
        metrics["broken/fraction"] = _mean(columns["broken"][real] != int(BrokenReason.NONE))
        for reason in BrokenReason:
            if reason is not BrokenReason.NONE:
                metrics[f"broken/{reason.name.lower()}"] = _mean(columns["broken"][real] == int(reason))
        right = columns["right"][real]
        if (columns["right"] != _UNKNOWN).any():
            metrics["right/fraction"] = _mean(right[right != _UNKNOWN] == 1)
        squared = np.nan_to_num(self.advantages) ** 2
        if not np.isnan(self.advantages).all():
            plain, weighted = (squared * columns["tokens"]).sum(), (squared * columns["squared_weights"]).sum()
            both = (squared * columns["weights"]).sum()
            metrics["advantage/cosine"] = _ratio(both, math.sqrt(plain * weighted), 1.0)
        both_roles = np.logical_and.reduce([columns[f"{name}/tokens"] > 0 for name in ROLE_NAMES.values()])
        swapped = columns["swapped"][both_roles]
        if (columns["swapped"] != _UNKNOWN).any():
            metrics["swap/coverage"] = _mean(swapped[swapped != _UNKNOWN] == 1)
        if columns["diverged"].any() and not self.options.recompute:
            down, up = (float(columns[name].sum()) for name in ("down_divergence", "up_divergence"))
            metrics["interference"] = 0.0 if down == 0 else down / up if up > 0 else math.inf
        return metrics

    def sample(self, size: int, *, per_kind: int = 8, seed: int = 0) -> NDArray[np.int64]:
        """Which responses to show: `per_kind` of each kind, drawn at random, then others at random up to `size`.

        A kind is a reason to be broken, or one of the combinations of right and wrong answer and perception. The
        order is that of preference: a shorter sample is the beginning of a longer one.
        """
        draw = np.random.default_rng(seed).permutation(len(self))
        if len(draw) <= size:
            return draw
        kinds = np.stack([self.columns[name][draw] for name in ("broken", "right", "perception_right")])
        _, kind = np.unique(kinds, axis=1, return_inverse=True)
        order = np.argsort(kind, kind="stable")
        first = np.searchsorted(kind[order], kind)
        nth = np.empty(len(draw), np.int64)  # of its kind
        nth[order] = np.arange(len(draw)) - first[order]
        preferred = np.concatenate([draw[nth < per_kind], draw[nth >= per_kind]])
        return preferred[:size]


def _ratio(part: float, whole: float, empty: float = 0.0) -> float:
    return float(part / whole) if whole > 0 else empty


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _named(name: str, counts: NDArray[np.int64], grid: NDArray[np.float64], empty: float) -> dict[str, float]:
    return {f"{name}/{key}": _quantile(counts, grid, percent, empty) for key, percent in QUANTILES.items()}


def _quantile(counts: NDArray[np.int64], grid: NDArray[np.float64], percent: int, empty: float) -> float:
    cumulative = counts.cumsum()
    if not cumulative[-1]:
        return empty
    rank = percent * (int(cumulative[-1]) - 1)
    low, high = (grid[np.searchsorted(cumulative, 1 + number)] for number in (rank // 100, -(-rank // 100)))
    return float(low + rank % 100 / 100 * (high - low))


def _flag(value: bool | None) -> int:
    return _UNKNOWN if value is None else int(value)


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _columns(
    scored: Sequence[ScoredRollout], options: CreditOptions
) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """The columns of a summary, counts of weights and of scores, and extremes."""
    rollouts = [row.rollout for row in scored]
    lengths = np.array([len(row.weights) for row in scored], dtype=np.int64)
    right = np.array([_flag(rollout.is_right) for rollout in rollouts], dtype=np.int64)
    response = np.repeat(np.arange(len(scored)), lengths)
    roles, weights, scores = (
        np.concatenate([getattr(row, name) for row in scored] or [np.zeros(0)])
        for name in ("roles", "weights", "scores")
    )
    weights, scores = weights.astype(np.float64), scores.astype(np.float64)

    def total(values: NDArray[np.float64], where: NDArray[np.bool_] | slice = slice(None)) -> NDArray[np.float64]:
        return np.bincount(response[where], weights=values[where], minlength=len(scored)).astype(np.float64)

    clip = options.config.score_clip
    noise, repeated = np.zeros_like(weights), np.zeros(len(scored), dtype=bool)
    down, up, diverged = np.zeros_like(weights), np.zeros_like(weights), np.zeros(len(scored), dtype=bool)
    for row, (start, rollout) in enumerate(zip(lengths.cumsum() - lengths, rollouts, strict=True)):
        if rollout.down_divergence is not None and rollout.up_divergence is not None:
            diverged[row] = True
            down[start : start + lengths[row]] = rollout.down_divergence
            up[start : start + lengths[row]] = rollout.up_divergence
        if rollout.old_log_probs is not None and rollout.repeated_log_probs is not None:
            repeated[row] = True
            with np.errstate(invalid="ignore"):  # minus infinity twice is no noise
                difference = np.nan_to_num(rollout.old_log_probs - rollout.repeated_log_probs, nan=0.0)
            noise[start : start + lengths[row]] = np.clip(difference, -clip, clip)

    weighty = (roles == int(Role.PERCEPTION)) & (weights > 1.0)  # whose divergences make the interference

    columns: dict[str, NDArray[Any]] = {
        "tokens": lengths,
        "reward": np.array([_nan(rollout.reward) for rollout in rollouts], dtype=np.float64),
        "advantage": np.array([_nan(rollout.advantage) for rollout in rollouts], dtype=np.float64),
        "right": right,
        "perception_right": np.array([_flag(rollout.perception_correct) for rollout in rollouts], dtype=np.int64),
        "broken": np.array([int(row.broken) for row in scored], dtype=np.int64),
        "step": np.array([_UNKNOWN if rollout.step is None else rollout.step for rollout in rollouts], dtype=np.int64),
        "swapped": np.array([_flag(rollout.swapped) for rollout in rollouts], dtype=np.int64),
        "recorded": np.array([rollout.weights is not None for rollout in rollouts], dtype=bool),
        "contrast": np.array([row.has_contrast for row in scored], dtype=bool),
        "repeated": repeated,
        "weights": total(weights),
        "squared_weights": total(weights**2),
        "squared_scored_weights": total(weights**2, roles > 0),
        "diverged": diverged,
        "down_divergence": total(down, weighty),
        "up_divergence": total(up, weighty),
    }
    weight_counts, score_counts, extremes = [], [], np.array([[np.inf, -np.inf]] * 2)
    for index, (role, name) in enumerate(ROLE_NAMES.items()):
        where = roles == int(role)
        of_weights, of_scores = weights[where], scores[where]
        columns |= {
            f"{name}/tokens": np.bincount(response[where], minlength=len(scored)),
            f"{name}/weights": total(weights, where),
            f"{name}/scores": total(scores, where),
            f"{name}/squared_scores": total(scores**2, where),
            f"{name}/clipped": total((np.abs(scores) >= clip).astype(np.float64), where),
            f"{name}/squared_noise": total(noise**2, where),
        }
        columns[f"{name}/repeated"] = np.where(repeated, columns[f"{name}/tokens"], 0)
        with np.errstate(divide="ignore"):  # a weight of 0 is counted at the low end
            bins = _bins(np.log2(of_weights) * _WEIGHT_STEPS, len(_WEIGHT_GRID))
        answer = right[response[where]] % 3  # unknown last
        counted = np.bincount(answer * len(_WEIGHT_GRID) + bins, minlength=3 * len(_WEIGHT_GRID))
        weight_counts.append(counted.reshape(3, -1))
        bins = _bins(np.arcsinh(of_scores / _SCORE_UNIT) * _SCORE_STEPS, len(_SCORE_GRID))
        score_counts.append(np.bincount(bins, minlength=len(_SCORE_GRID)))
        if len(of_weights):
            extremes[index] = of_weights.min(), of_weights.max()
    return columns, np.stack(weight_counts), np.stack(score_counts), extremes


def _bins(positions: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    return np.clip(np.rint(positions) + size // 2, 0, size - 1).astype(np.int64)


def _summarized(scored: Sequence[ScoredRollout], options: CreditOptions) -> Summary:
    columns, weight_counts, score_counts, extremes = _columns(scored, options)
    groups = [None if row.rollout.group is None else (row.rollout.step or 0, str(row.rollout.group)) for row in scored]
    return Summary(
        options,
        columns=columns,
        groups=groups,
        weight_counts=weight_counts,
        score_counts=score_counts,
        extremes=extremes,
    )


def summarize_rollouts(scored: Iterable[ScoredRollout], options: CreditOptions | None = None) -> Summary:
    """Summary of scored rollouts in memory, or on their way through it.

    Example:
        >>> rollout = parse_rollout('{"tokens": ["<perception>", "a", "cat", "</perception>"], "reward": 1}')
        >>> summarize_rollouts(score_rollouts([rollout])).metrics()["tokens/perception/fraction"]
        0.5
    """
    options = options or CreditOptions()
    scored = iter(scored)
    parts = []
    while window := list(islice(scored, 256)):
        parts.append(_summarized(window, options))
    return Summary.joined(parts, options)


def summarize_files(
    paths: Sequence[str | os.PathLike[str]],
    options: CreditOptions | None = None,
    *,
    strict: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Summary of rollout files of any size, read once, a piece at a time.

    With ``scale="batch_rms"`` the files are read twice, and all of them are the batch.

    Args:
        paths: The files.
        options: How log-probs become weights.
        strict: Whether the first malformed line raises; else such lines are left out and kept as ``errors``.
        workers: Processes that read; more than one only where the files are large. Those are spawned, so a script
            that asks for them needs ``if __name__ == "__main__"``.
        progress: Told how many bytes are done, and of how many.

    Raises:
        RolloutError: At the first malformed line, if `strict`.
        OSError: If a file cannot be read.
    """
    options = options or CreditOptions()
    config = options.config
    if config.scale == "batch_rms":
        # Scores do not depend on the scale: a first reading measures it, the second one uses it.
        fixed = replace(options, config=replace(config, scale="fixed"))
        measured = summarize_files(paths, fixed, strict=strict, workers=workers, progress=progress)
        scales = {"visual_scale": config.visual_scale, "consistency_scale": config.consistency_scale}
        for key, name in zip(scales, ROLE_NAMES.values(), strict=True):
            count = measured.columns[f"{name}/tokens"].sum()
            # As role_scales: its floor, and 1 where there is nothing to measure.
            rms = math.sqrt(_ratio(measured.columns[f"{name}/squared_scores"].sum(), count))
            scales[key] *= max(rms, 0.05) if count else 1.0
        options = replace(options, config=replace(config, scale="fixed", **scales))
    files = tuple(os.fspath(path) for path in paths)
    sizes = [os.path.getsize(path) for path in files]
    tasks = [
        (path, number, start, end, options, strict) for number, path in enumerate(files) for start, end in _pieces(path)
    ]
    done, by_file = 0, [[] for _ in files]
    progress(0, sum(sizes))
    for (_, number, start, end, *_), part in zip(tasks, _run(tasks, sum(sizes), workers), strict=True):
        if strict and part.errors:
            before = sum(earlier.lines for earlier in by_file[number])
            error = part.errors[0]
            raise RolloutError(error.reason, line=(error.line or 0) + before, path=error.path)
        by_file[number].append(part)
        done += end - start
        progress(done, sum(sizes))
    # Line numbers begin anew in each file.
    joined = [Summary.joined(parts, options) for parts in by_file]
    for part in joined:
        part.lines = 0
    summary = Summary.joined(joined, options)
    summary.files = files
    return summary


def _pieces(path: str) -> Iterator[tuple[int, int]]:
    """Byte ranges of whole lines."""
    with open(path, "rb") as file:
        end, size = 0, os.fstat(file.fileno()).st_size
        while end < size:
            start = end
            file.seek(min(start + _CHUNK_BYTES, size) - 1)
            file.readline()
            end = file.tell()
            yield start, end


def _run(tasks: Sequence[tuple[Any, ...]], size: int, workers: int) -> Iterator[Summary]:
    if workers <= 1 or size < _PARALLEL_BYTES:
        yield from map(_summarize_piece, tasks)
        return
    # Forking a process in which torch has run threads may hang.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        try:
            yield from pool.map(_summarize_piece, tasks)
        finally:
            pool.shutdown(cancel_futures=True)


def _summarize_piece(task: tuple[str, int, int, int, CreditOptions, bool]) -> Summary:
    path, number, start, end, options, strict = task
    with open(path, "rb") as file:
        file.seek(start)
        lines = file.read(end - start).split(b"\n")
    if not lines[-1]:
        lines.pop()
    places: list[Place] = []
    errors: list[RolloutError] = []
    malformed = 0

    def rollouts() -> Iterator[Rollout]:
        nonlocal malformed
        offset = start
        for count, line in enumerate(lines, start=1):
            place, offset = Place(number, offset, count), offset + len(line) + 1
            if not line or line.isspace():
                continue
            try:
                rollout = parse_rollout(line)
            except RolloutError as error:
                malformed += 1
                if len(errors) < _KEPT_ERRORS:
                    errors.append(RolloutError(error.reason, line=count, path=path))
                if strict:
                    return
            else:
                places.append(place)
                yield rollout

    summary = summarize_rollouts(score_rollouts(rollouts(), options), options)
    summary.places, summary.errors, summary.malformed, summary.lines = places, errors, malformed, len(lines)
    return summary


def load(summary: Summary, rows: Iterable[int]) -> Iterator[ScoredRollout]:
    """Some of the responses of summarised files, read again where they lie."""

    def rollouts() -> Iterator[Rollout]:
        for row in rows:
            place = summary.places[row]
            with open(summary.files[place.file], "rb") as file:
                file.seek(place.offset)
                yield parse_rollout(file.readline())

    return score_rollouts(rollouts(), summary.options)
