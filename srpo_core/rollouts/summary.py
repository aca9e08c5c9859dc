"""Rollout files to statistics, which are read a piece at a time and stay small, whatever the size of the files.

The metrics have the names of :func:`~srpo_core.diagnostics.credit_diagnostics`.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from typing import Any, BinaryIO, NamedTuple, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from srpo_core.diagnostics import ROLE_NAMES, Answer
from srpo_core.options import GroupOptions
from srpo_core.rollouts import counts
from srpo_core.rollouts.counts import SCORE_GRID, UNKNOWN, WEIGHT_GRID, quantiles
from srpo_core.rollouts.lines import is_blank, lines_of
from srpo_core.rollouts.record import Rollout, RolloutError, check_file, parse_rollout
from srpo_core.rollouts.scoring import ScoredRollout, ScoringOptions, score_rollouts
from srpo_core.tags import BrokenReason

__all__ = ["Place", "Summary", "load", "summarize_files", "summarize_rollouts"]

_WINDOW = 256  # responses that are counted together
_CHUNK_BYTES = 2**23  # of a file, for one task of a worker
_PARALLEL_BYTES = 2**26  # below this, starting workers takes longer than reading
_KEPT_ERRORS = 1000


class Place(NamedTuple):
    """Where a response was read: the file, the byte at which its line begins, and the line's number from 1."""

    file: int
    offset: int
    line: int


@dataclass(eq=False)
class Summary:
    """What is kept of rollouts: one row of numbers per response, and counts of weights and scores.

    Attributes:
        options: How scores and weights were made.
        files: The files that were read; empty for rollouts in memory.
        columns: Arrays with one entry per response.
        groups: Which prompt each response answers; None where that is not recorded.
        places: Where each response was read.
        weight_counts: Number of tokens by role, answer (wrong, right, unknown) and weight, where weights are known.
        score_counts: Number of tokens by role and score, where scores are known.
        change_counts: Number of tokens by role and by the nats that they lose in their second view, where known.
        extremes: Least and greatest weight by role.
        formats: Number of responses by the tags that they were read with, in the notation of ``RoleTags.grammar``.
        correct_by: The rules by which answers were recorded as right or wrong; ``""`` where the rule was not recorded.
        rewards_tell: Whether answers count as right by their reward, because no rule is known and rewards are 0 or 1.
        errors: The first malformed lines.
        malformed: How many lines are malformed.
        lines: How many lines were read.
    """

    options: ScoringOptions
    files: tuple[str, ...] = ()
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    groups: list[tuple[int, str] | None] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    weight_counts: NDArray[np.int64] = field(default_factory=counts.no_weights)
    score_counts: NDArray[np.int64] = field(default_factory=counts.no_scores)
    change_counts: NDArray[np.int64] = field(default_factory=counts.no_scores)
    extremes: NDArray[np.float64] = field(default_factory=counts.no_extremes)
    formats: Counter[str] = field(default_factory=Counter)
    correct_by: set[str] = field(default_factory=set)
    rewards_tell: bool = False
    errors: list[RolloutError] = field(default_factory=list)
    malformed: int = 0
    lines: int = 0

    def __len__(self) -> int:
        """Number of responses."""
        return len(self.groups)

    @classmethod
    def of(cls, scored: Sequence[ScoredRollout], options: ScoringOptions) -> Self:
        """The summary of a few scored rollouts. Which answers are right is only known after :meth:`settled`."""
        counted = counts.count(scored, options)
        rollouts = [row.rollout for row in scored]
        steps = [UNKNOWN if rollout.step is None else rollout.step for rollout in rollouts]
        groups = [
            None if rollout.group is None else (step, str(rollout.group))
            for step, rollout in zip(steps, rollouts, strict=True)
        ]
        return cls(
            options,
            columns=counted.columns,
            groups=groups,
            weight_counts=counted.weights,
            score_counts=counted.scores,
            change_counts=counted.changes,
            extremes=counted.extremes,
            formats=Counter({tags.grammar: number for tags, number in Counter(r.tags for r in rollouts).items()}),
            correct_by={rollout.correct_by or "" for rollout in rollouts if rollout.correct is not None},
        )

    @classmethod
    def joined(cls, parts: Sequence["Summary"], options: ScoringOptions) -> Self:
        """The summary of all that the parts summarize, in their order."""
        joined = cls(options)
        for part in parts:
            joined.groups += part.groups
            joined.places += [place._replace(line=place.line + joined.lines) for place in part.places]
            joined.weight_counts += part.weight_counts
            joined.score_counts += part.score_counts
            joined.change_counts += part.change_counts
            joined.extremes[:, 0] = np.minimum(joined.extremes[:, 0], part.extremes[:, 0])
            joined.extremes[:, 1] = np.maximum(joined.extremes[:, 1], part.extremes[:, 1])
            joined.formats += part.formats
            joined.correct_by |= part.correct_by
            for error in part.errors[: _KEPT_ERRORS - len(joined.errors)]:
                line = None if error.line is None else error.line + joined.lines
                joined.errors.append(RolloutError(error.reason, line=line, path=error.path))
            joined.malformed += part.malformed
            joined.lines += part.lines
        filled = [part.columns for part in parts if part.columns] or [cls.of([], options).columns]
        joined.columns = {name: np.concatenate([columns[name] for columns in filled]) for name in filled[0]}
        return joined

    def settled(self) -> Self:
        """The summary of all joined parts, which alone show whether the rewards say which answers are right."""
        counted = counts.Counted(self.columns, self.weight_counts, self.score_counts, self.change_counts, self.extremes)
        right, weight_counts, told = counts.fold(counted)
        columns = self.columns | {"right": right}
        return replace(self, columns=columns, weight_counts=weight_counts, rewards_tell=told)

    @property
    def weight_grid(self) -> NDArray[np.float64]:
        """The weights that are counted; others count as the nearest of them."""
        return WEIGHT_GRID

    @property
    def score_grid(self) -> NDArray[np.float64]:
        """The scores that are counted, nats; others count as the nearest of them."""
        return SCORE_GRID

    @property
    def advantages(self) -> NDArray[np.float64]:
        """Advantage of each response, NaN where it is not known.

        As recorded; else from the rewards of its group, as :func:`~srpo_core.group_advantages` computes it by default.
        """
        recorded, rewards = self.columns["advantage"], self.columns["reward"]
        numbers = {group: number for number, group in enumerate(dict.fromkeys(self.groups))}
        known = np.array([group is not None for group in self.groups], dtype=bool) & ~np.isnan(rewards)
        if not known.any():
            return recorded
        group = np.array([numbers[group] for group in self.groups])[known]
        size = np.bincount(group, minlength=len(numbers))[group]
        centered = rewards[known] - np.bincount(group, weights=rewards[known])[group] / size
        # Rounding must not give equal rewards a spread.
        centered[np.abs(centered) < 1e-9 * (1 + np.abs(rewards[known]))] = 0.0
        spread = np.sqrt(np.bincount(group, weights=centered**2)[group] / np.maximum(size - 1, 1))
        computed = np.full(len(self), np.nan)
        computed[known] = centered / (spread + GroupOptions().epsilon)
        return np.where(np.isnan(recorded), computed, recorded)

    def metrics(self) -> dict[str, float]:
        """The metrics of :func:`~srpo_core.diagnostics.credit_diagnostics`, under its names.

        Each metric is over the responses, or the tokens, for which the files hold what it needs; without any, the
        metric is absent. Quantiles, and the shares of scores above the noise, are exact to 0.3 % of the value.
        ``interference`` is :func:`~srpo_core.diagnostics.interference` over the responses that have both divergences
        and weights, with the recorded weights. With recomputed weights it is absent, because the two gradient steps
        divided the tokens by the recorded weights.
        """
        columns = self.columns
        metrics: dict[str, float | None] = {}
        for index, name in enumerate(ROLE_NAMES.values()):
            metrics |= self._role_metrics(index, name)
        tokens = sum(columns[f"{name}/weighed"].sum() for name in ROLE_NAMES.values())
        weight = sum(columns[f"{name}/weights"].sum() for name in ROLE_NAMES.values())
        metrics["tokens/effective_fraction"] = _ratio(weight**2, tokens * columns["squared_scored_weights"].sum())

        structured, both_roles = (
            combined.reduce([columns[f"{name}/tokens"] > 0 for name in ROLE_NAMES.values()])
            for combined in (np.logical_or, np.logical_and)
        )
        metrics["structured/fraction"] = _mean(structured[columns["tokens"] > 0])
        broken = columns["broken"][columns["broken"] != UNKNOWN]
        metrics["broken/fraction"] = _mean(broken != int(BrokenReason.NONE))
        for reason in BrokenReason:
            if reason is not BrokenReason.NONE:
                metrics[f"broken/{reason.name.lower()}"] = _mean(broken == int(reason))
        metrics["right/fraction"] = _mean(columns["right"][columns["right"] != UNKNOWN] == 1)
        known = ~np.isnan(self.advantages) & (columns["weighed"] > 0)
        squared = self.advantages[known] ** 2
        plain, weighted, both = (
            (squared * columns[name][known]).sum() for name in ("weighed", "squared_weights", "weights")
        )
        metrics["advantage/cosine"] = _ratio(both, math.sqrt(plain * weighted))
        swapped = columns["swapped"][both_roles]
        metrics["swap/coverage"] = _mean(swapped[swapped != UNKNOWN] == 1)
        if columns["diverged"].any() and not self.options.recompute:
            down, up = (float(columns[name].sum()) for name in ("down_divergence", "up_divergence"))
            metrics["interference"] = 0.0 if down == 0 else down / up if up > 0 else math.inf
        return {name: value for name, value in metrics.items() if value is not None}

    def _role_metrics(self, index: int, name: str) -> dict[str, float | None]:
        """The metrics of the tokens of one role; None where a metric is not known."""
        columns = self.columns
        scored, weighed = columns[f"{name}/scored"].sum(), columns[f"{name}/weighed"].sum()
        weight = columns[f"{name}/weights"].sum()
        low, high = self.extremes[index] if weighed else (None, None)
        mean, square = (_ratio(columns[f"{name}/{part}"].sum(), scored) for part in ("scores", "squared_scores"))
        metrics: dict[str, float | None] = {
            f"weight/{name}/mean": _ratio(weight, weighed),
            f"weight/{name}/min": None if low is None else float(low),
            f"weight/{name}/max": None if high is None else float(high),
            f"weight/{name}/mass": _ratio(weight, columns["weights"].sum()),
            f"tokens/{name}/fraction": _ratio(columns[f"{name}/tokens"].sum(), columns["tokens"].sum()),
            f"score/{name}/mean": mean,
            f"score/{name}/std": None if mean is None or square is None else math.sqrt(max(square - mean**2, 0.0)),
            f"score/{name}/clipped": _ratio(columns[f"{name}/clipped"].sum(), scored),
        }
        metrics |= quantiles(f"weight/{name}", self.weight_counts[index].sum(0), WEIGHT_GRID)
        metrics |= quantiles(f"score/{name}", self.score_counts[index], SCORE_GRID)
        for answer in get_args(Answer):
            rows = columns["right"] == (answer == "right")
            of_rows = columns[f"{name}/weighed"][rows].sum()
            metrics[f"weight/{name}/{answer}/mean"] = _ratio(columns[f"{name}/weights"][rows].sum(), of_rows)
            of_answer = self.weight_counts[index, int(answer == "right")]
            metrics |= quantiles(f"weight/{name}/{answer}", of_answer, WEIGHT_GRID)
        noise = _ratio(columns[f"{name}/squared_noise"].sum(), columns[f"{name}/repeated"].sum())
        if noise is not None:
            above = self.score_counts[index][np.abs(SCORE_GRID) > 2 * math.sqrt(noise)].sum()
            metrics |= {f"noise/{name}/rms": math.sqrt(noise), f"noise/{name}/above": _ratio(above, scored)}
        return metrics

    def sample(self, size: int, *, per_kind: int = 8, seed: int = 0) -> NDArray[np.int64]:
        """The responses to show: `per_kind` of each kind, drawn at random, then others at random, up to `size`.

        A kind is a reason why responses are malformed, or a combination of right and wrong answer and perception. The
        first of each kind come first, so that a shorter sample is the beginning of a longer one.
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


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def summarize_rollouts(scored: Iterable[ScoredRollout], options: ScoringOptions | None = None) -> Summary:
    """The summary of scored rollouts, which may be an iterator, because they are not kept.

    Args:
        scored: From :func:`~srpo_core.rollouts.score_rollouts`.
        options: The options with which they were scored; None for the defaults.

    Example:
        >>> from srpo_core.rollouts import parse_rollout, score_rollouts
        >>> rollout = parse_rollout('{"tokens": ["<perception>", "a", "cat", "</perception>"], "reward": 1}')
        >>> summarize_rollouts(score_rollouts([rollout])).metrics()["tokens/perception/fraction"]
        0.5
    """
    options = options or ScoringOptions()
    return _part(scored, options).settled()


def _part(scored: Iterable[ScoredRollout], options: ScoringOptions) -> Summary:
    scored = iter(scored)
    parts = []
    while window := list(islice(scored, _WINDOW)):
        parts.append(Summary.of(window, options))
    return Summary.joined(parts, options)


def summarize_files(
    paths: Sequence[str | os.PathLike[str]],
    options: ScoringOptions | None = None,
    *,
    strict: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """The summary of rollout files of any size, which are read once, a piece at a time.

    With ``scale="batch_rms"`` the files are read twice, and all of them together are the batch.

    Args:
        paths: The files.
        options: How log-probs become weights; None for the defaults.
        strict: Whether the first malformed line raises an error; else malformed lines are left out and kept as
            ``errors``.
        workers: Number of processes that read; only large files use more than one. The processes are spawned, so a
            script that asks for them needs ``if __name__ == "__main__"``.
        progress: Called with the number of bytes that have been read and the number of all bytes.

    Raises:
        RolloutError: At the first malformed line, if `strict`; also if a file as a whole is no rollout file.
        OSError: If a file cannot be read.
    """
    options = options or ScoringOptions()
    if options.config.scale == "batch_rms":
        # Scores do not depend on the scale: the first pass over the files measures it, the second one uses it.
        fixed = replace(options, config=replace(options.config, scale="fixed"))
        measured = summarize_files(paths, fixed, strict=strict, workers=workers, progress=progress)
        options = replace(options, config=replace(fixed.config, **_measured_scales(measured)))
    files = tuple(os.fspath(path) for path in paths)
    for path in files:
        check_file(path)
    size = sum(os.path.getsize(path) for path in files)
    tasks = [
        (path, number, start, end, options, strict) for number, path in enumerate(files) for start, end in _pieces(path)
    ]
    done, by_file = 0, [[] for _ in files]
    progress(0, size)
    for (_, number, start, end, *_), part in zip(tasks, _run(tasks, size, workers), strict=True):
        if strict and part.errors:
            before = sum(earlier.lines for earlier in by_file[number])
            error = part.errors[0]
            raise RolloutError(error.reason, line=(error.line or 0) + before, path=error.path)
        by_file[number].append(part)
        done += end - start
        progress(done, size)
    joined = [Summary.joined(parts, options) for parts in by_file]
    for part in joined:
        part.lines = 0  # line numbers start again in each file
    summary = Summary.joined(joined, options)
    summary.files = files
    return summary.settled()


def _measured_scales(summary: Summary) -> dict[str, float]:
    """The scales of `batch_rms`, as :func:`~srpo_core.weights.role_scales` measures them."""
    config = summary.options.config
    scales = {"visual_scale": config.visual_scale, "consistency_scale": config.consistency_scale}
    for key, name in zip(scales, ROLE_NAMES.values(), strict=True):
        count = summary.columns[f"{name}/scored"].sum()
        square = _ratio(summary.columns[f"{name}/squared_scores"].sum(), count)
        scales[key] *= 1.0 if square is None else max(math.sqrt(square), 0.05)
    return scales


def _pieces(path: str) -> Iterator[tuple[int, int]]:
    """Byte ranges of whole lines."""
    with open(path, "rb") as file:
        end, size = 0, os.fstat(file.fileno()).st_size
        while end < size:
            start = end
            file.seek(min(start + _CHUNK_BYTES, size) - 1)
            next(lines_of(file))  # to the end of the line, however long it is
            end = file.tell()
            yield start, end


def _run(tasks: Sequence[tuple[Any, ...]], size: int, workers: int) -> Iterator[Summary]:
    if workers <= 1 or size < _PARALLEL_BYTES:
        yield from map(_summarize_piece, tasks)
        return
    # To fork a process in which torch has run threads may hang.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        try:
            yield from pool.map(_summarize_piece, tasks)
        finally:
            pool.shutdown(cancel_futures=True)


def _summarize_piece(task: tuple[str, int, int, int, ScoringOptions, bool]) -> Summary:
    path, number, start, end, options, strict = task
    lines = 0
    places: list[Place] = []
    errors: list[RolloutError] = []
    malformed = 0

    def rollouts(file: BinaryIO) -> Iterator[Rollout]:
        nonlocal malformed, lines
        offset = start
        for lines, (line, length) in enumerate(lines_of(file, end), start=1):
            place, offset = Place(number, offset, lines), offset + length
            if is_blank(line):
                continue
            try:
                rollout = parse_rollout(line)
            except RolloutError as error:
                malformed += 1
                if len(errors) < _KEPT_ERRORS:
                    errors.append(RolloutError(error.reason, line=lines, path=path))
                if strict:
                    return
            else:
                places.append(place)
                yield rollout

    with open(path, "rb") as file:
        file.seek(start)
        summary = _part(score_rollouts(rollouts(file), options), options)
    summary.places, summary.errors, summary.malformed, summary.lines = places, errors, malformed, lines
    return summary


def load(summary: Summary, rows: Iterable[int]) -> Iterator[ScoredRollout]:
    """Some of the responses of summarized files, which are read again from the files.

    Args:
        summary: From :func:`summarize_files`.
        rows: The indices of the responses.
    """

    def rollouts() -> Iterator[Rollout]:
        for row in rows:
            place = summary.places[row]
            with open(summary.files[place.file], "rb") as file:
                file.seek(place.offset)
                yield parse_rollout(file.readline())

    return score_rollouts(rollouts(), summary.options)
