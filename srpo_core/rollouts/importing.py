"""Completion logs of other tools to a rollout file."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srpo_core.rollouts.correct import CorrectRule
from srpo_core.rollouts.foreign import ROLLOUTS, Logged, logged, tool_of
from srpo_core.rollouts.lines import TOOLS
from srpo_core.rollouts.log_files import Table, log_files, read_tables
from srpo_core.rollouts.record import RolloutError, parse_rollout
from srpo_core.rollouts.retag import tags_as_json
from srpo_core.tags import DEFAULT_TAGS, RoleTags, open_block

__all__ = ["Imported", "import_logs"]

_KEPT_ERRORS = 1000
_COUNTED = ("reward", "advantage", "reference", "image", "prompt", "open_at_start")


@dataclass(eq=False)
class Imported:
    """What was found in logs.

    Attributes:
        tools: The tool, a key of ``TOOLS``, by file.
        responses: Responses that were written.
        steps: Responses by step.
        groups: Responses by group.
        found: Number of responses that have a ``reward``, ``advantage``, ``reference``, ``image``, ``prompt``, or
            ``open_at_start``.
        functions: Weights of the reward functions that the rewards are sums of; empty where the tool logs the sum.
        named: The columns of numbers that ``right`` and ``rewards`` may name.
        right: Number of responses that are right (True), wrong (False), or not judged (None).
        correct_by: The rule by which they are judged; None: there is no rule.
        repeated: Number of responses that the tool had written before, in the same order.
        left_out: How many of the repeated responses were left out.
        dropped: Number of responses by what was left out of them.
        contradicted: Number of groups in which a higher reward has a lower advantage.
        compared: Number of groups of at least two responses whose rewards and advantages are known.
        errors: The first malformed lines.
        malformed: How many lines are malformed.
    """

    tools: dict[str, str] = field(default_factory=dict)
    responses: int = 0
    steps: Counter[int] = field(default_factory=Counter)
    groups: Counter[int] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    functions: dict[str, float] = field(default_factory=dict)
    named: dict[str, None] = field(default_factory=dict)
    right: Counter[bool | None] = field(default_factory=Counter)
    correct_by: str | None = None
    repeated: int = 0
    left_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    contradicted: int = 0
    compared: int = 0
    errors: list[RolloutError] = field(default_factory=list)
    malformed: int = 0


def import_logs(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    tool: str | None = None,
    rewards: Mapping[str, float] | None = None,
    right: CorrectRule | None = None,
    tags: RoleTags = DEFAULT_TAGS,
    group_size: int | None = None,
    drop_repeated: bool = False,
    strict: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Imported:
    """Write the responses of completion logs as a rollout file.

    Responses of one step to one prompt are a group, where the files are in one folder.

    Args:
        paths: Log files, or folders of them.
        output: The rollout file. It appears when everything has been read.
        tool: The tool that wrote the logs: ``"trl"``, ``"verl"``, ``"swift"`` or ``"openrlhf"``. None: the one that the
            columns show.
        rewards: Weight of each reward function in the whole reward, by name. None: as the tool logs the whole reward,
            or, where it does not, all functions with weight 1.
        right: Which responses are right; None: this is not known.
        tags: The tags of the responses.
        group_size: Number of responses to each prompt; needed if prompts with different images have the same text.
            None: all responses to equal prompts are one group.
        drop_repeated: Whether to leave out a table that begins with all rows of the one before, at another step: TRL
            and ms-swift write their last responses again at steps that generate none. Rows that are equal to the step
            are always left out: a table of Weights & Biases holds all rows so far.
        strict: Whether the first malformed line raises; else malformed lines are left out and kept as ``errors``.
        progress: Called with the number of bytes that are done and the number of all.

    Returns:
        What was found.

    Raises:
        RolloutError: If a file is no log, or holds rollouts already; at the first malformed line, if `strict`.
        ValueError: If `output` is one of the files, `tool` is unknown, or `rewards` or `right` name no reward function.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log, output = Path(folder) / "1.jsonl", Path(folder) / "out" / "rollouts.jsonl"
        ...     _ = log.write_text('{"input": "how many?", "output": "3", "gts": "3", "score": 1.0, "step": 1}')
        ...     found = import_logs([log], output)
        ...     print(output.read_text().strip())
        {"text":"3","reward":1.0,"group":0,"step":1,"prompt":"how many?","reference":"3"}
    """
    if tool is not None and tool not in TOOLS:
        raise ValueError(f"tool must be one of {', '.join(TOOLS)}, got {tool!r}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if rewards is not None and not all(math.isfinite(weight) for weight in rewards.values()):
        raise ValueError(f"rewards must have finite weights, got {dict(rewards)}")
    files, output = log_files([Path(path) for path in paths]), Path(output)
    if any(output.exists() and output.samefile(file) for file in files):
        raise ValueError(f"{output} is one of the files that are read; write to another")
    state = _Import(tool, rewards, right, tags, group_size, drop_repeated, strict)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(output.name + ".part")
    sizes = [file.stat().st_size for file in files]
    try:
        with part.open("w", encoding="utf-8", errors="replace", newline="\n") as target:
            for number, file in enumerate(files):
                for table in read_tables(file):
                    target.writelines(_json(line) for line in state.lines(file, table))
                    progress(sum(sizes[:number]) + table.done, sum(sizes))
        state.finish()
        if state.found.responses:
            part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    return state.found


def _json(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


class _Import:
    """What an import remembers from one table to the next."""

    def __init__(
        self,
        tool: str | None,
        rewards: Mapping[str, float] | None,
        right: CorrectRule | None,
        tags: RoleTags,
        group_size: int | None,
        drop_repeated: bool,
        strict: bool,
    ) -> None:
        self.found = Imported(correct_by=None if right is None else str(right))
        self._tool, self._rewards, self._right, self._group_size = tool, rewards, right, group_size
        self._tags, self._drop_repeated, self._strict = tags, drop_repeated, strict
        self._written_tags = None if tags == DEFAULT_TAGS else tags_as_json(tags)
        self._groups: dict[tuple[bytes, int], int] = {}
        self._seen: Counter[bytes] = Counter()  # responses by prompt
        self._previous: dict[Path, list[tuple[Any, bytes]]] = {}  # the last table of each folder
        self._numbers: list[tuple[int, float, float]] = []  # group, reward, advantage

    def _complain(self, error: RolloutError) -> None:
        """Keep the error of a malformed line, or raise it."""
        if self._strict:
            raise error
        self.found.malformed += 1
        if len(self.found.errors) < _KEPT_ERRORS:
            self.found.errors.append(error)

    def lines(self, file: Path, table: Table) -> list[dict[str, Any]]:
        """The lines of a table."""
        if not table.records:
            return []
        known = self.found.tools
        if os.fspath(file) not in known:
            first = next((record for _, record in table.records if not isinstance(record, str)), None)
            if first is not None:
                known[os.fspath(file)] = self._tool or tool_of(file, first)
        tool = known.get(os.fspath(file), "")
        if tool == ROLLOUTS:
            return [line for number, record in table.records if (line := self._rollout(file, number, record))]
        records = self._new_records(file.parent, table) if table.whole and tool != "verl" else table.records
        rows: list[Logged] = []
        for number, record in records:
            try:
                rows.append(logged(tool, _record(record)))
            except ValueError as error:
                self._complain(RolloutError(str(error), line=number, path=file))
        totals = [self._total(row) for row in rows]
        answers = self._answers(rows, totals)
        return [self._line(file, *each) for each in zip(rows, totals, answers, strict=True)]

    def _rollout(self, file: Path, number: int, record: dict[str, Any] | str) -> dict[str, Any] | None:
        """A rollout as it is recorded."""
        given = {"tags": self._written_tags} if self._written_tags else {}
        try:
            line = {name: value for name, value in (_record(record) | given).items() if value is not None}
            rollout = parse_rollout(json.dumps(line))
        except ValueError as error:
            self._complain(RolloutError(str(error), line=number, path=file))
            return None
        right = rollout.correct
        if self._right is not None:
            right = self._right.of_reward(rollout.reward)
            line |= {"correct_by": str(self._right)} | ({} if right is None else {"correct": right})
        found = self.found
        found.responses += 1
        found.steps.update([] if rollout.step is None else [rollout.step])
        found.found.update(name for name in _COUNTED if getattr(rollout, name) is not None)
        found.right[right] += 1
        return line

    def _new_records(self, folder: Path, table: Table) -> list[tuple[int, dict[str, Any] | str]]:
        """The records of a table without those that the table before had, if it begins with all of these."""
        steps = ("step", "gen_step", "global_step")
        prints = []
        for _, record in table.records:
            if isinstance(record, str):
                return table.records
            rest = [(name, value) for name, value in record.items() if name not in steps]
            prints.append(([record.get(name) for name in steps], _print(rest)))
        before, self._previous[folder] = self._previous.get(folder, []), prints
        again = prints[: len(before)]
        if not before or [row for _, row in again] != [row for _, row in before]:
            return table.records
        self.found.repeated += len(before)
        if again != before and not self._drop_repeated:
            return table.records
        self.found.left_out += len(before)
        return table.records[len(before) :]

    def _total(self, row: Logged) -> float | None:
        self.found.named |= dict.fromkeys(name for name, value in row.rewards.items() if not math.isnan(value))
        weights = self._rewards
        if weights is None:
            if not row.summed:
                return row.total
            weights = dict.fromkeys(row.rewards, 1.0)
        given = {name: weight for name, weight in weights.items() if not math.isnan(row.rewards.get(name, math.nan))}
        self.found.functions |= given
        return sum(weight * row.rewards[name] for name, weight in given.items()) if given else None

    def _answers(self, rows: Sequence[Logged], totals: Sequence[float | None]) -> list[bool | None]:
        """Which responses are right, as the rule says."""
        if self._right is None or not rows:
            return [None] * len(rows)
        names = dict.fromkeys([*self.found.named, *(name for row in rows for name in row.rewards)])
        by_function = {name: torch.tensor([row.rewards.get(name, math.nan) for row in rows]) for name in names}
        rewards = torch.tensor([math.nan if total is None else total for total in totals])
        return [None if told < 0 else bool(told) for told in self._right(rewards, by_function).tolist()]

    def _line(self, file: Path, row: Logged, total: float | None, right: bool | None) -> dict[str, Any]:
        found = self.found
        line: dict[str, Any] = {
            "text": row.text,
            "reward": total,
            "advantage": row.advantage,
            "correct": right,
            "correct_by": found.correct_by,
            "group": self._group(file, row),
            "step": row.step,
            "id": row.id,
            "prompt": row.prompt,
            "reference": row.reference,
            "image": row.image,
            "tags": self._written_tags,
            "open_at_start": open_block(row.prompt or "", self._tags) if row.whole_prompt else None,
            "extra": row.extra or None,
        }
        line = {name: value for name, value in line.items() if value is not None}
        found.responses += 1
        found.steps.update([] if row.step is None else [row.step])
        found.groups.update([line["group"]] if "group" in line else [])
        found.found.update(name for name in _COUNTED if name in line)
        found.right[right] += 1
        found.dropped.update(set(row.dropped))
        if total is not None and row.advantage is not None and "group" in line:
            self._numbers.append((line["group"], total, row.advantage))
        return line

    def _group(self, file: Path, row: Logged) -> int | None:
        """The number of the prompt. One that is not known has none."""
        if row.prompt is None and row.sample is None:
            return None
        name = (row.sample,) if row.sample is not None else (row.prompt, row.reference, row.image)
        prompt = _print(os.fspath(file.parent.resolve()), row.step, name)
        before = self._seen[prompt]
        self._seen[prompt] += 1
        return self._groups.setdefault((prompt, before // (self._group_size or before + 1)), len(self._groups))

    def finish(self) -> None:
        """Compare rewards with advantages, and refuse names that no record had."""
        found = self.found
        if unknown := [name for name in self._rewards or () if found.responses and name not in found.named]:
            known = ", ".join(map(repr, found.named)) or "none"
            raise ValueError(f"{unknown[0]!r} is none of the reward functions ({known})")
        if not self._numbers:
            return
        groups, rewards, advantages = (np.array(column) for column in zip(*self._numbers, strict=True))
        order = np.lexsort((advantages, rewards, groups))
        groups, rewards, advantages = groups[order], rewards[order], advantages[order]
        same = groups[1:] == groups[:-1]
        found.compared = len(np.unique(groups[1:][same]))
        found.contradicted = len(np.unique(groups[1:][same & _falls(rewards, advantages)]))


def _record(record: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(record, str):
        raise ValueError(record)
    return record


def _falls(rewards: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """Where the reward rises to the next one, or stays, and the advantage falls, or differs."""
    rises = np.diff(rewards) > 1e-6
    change = np.diff(advantages)
    return np.where(rises, change < -1e-4, np.abs(change) > 1e-4)


def _print(*values: Iterable[Any] | object) -> bytes:
    return hashlib.blake2b(repr(values).encode("utf-8", "surrogatepass"), digest_size=16).digest()
