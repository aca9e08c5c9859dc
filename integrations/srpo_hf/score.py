"""Anyone's rollouts, scored by a model in every view: a rollout file -> the same lines with log-probs and weights."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from srpo_core import RolloutBatch, Segmentation, SRPOConfig, credit, plan
from srpo_core.batch import OPEN_BLOCKS
from srpo_core.engine_gap import engine_gap
from srpo_core.roles import label_tokens, roles_of_blocks
from srpo_core.rollouts import Retag, Rollout, RolloutError, parse_rollout
from srpo_core.rollouts import values as of
from srpo_core.rollouts.lines import is_blank, load_json, load_strictly
from srpo_core.rollouts.record import DIVERGENCES, LOG_PROBS, check_file
from srpo_core.rollouts.retag import tags_as_json
from srpo_core.tags import open_block
from srpo_hf.part_file import PartFile
from srpo_hf.preparing import Encode, ImageReader, PromptReader, TokenReader, Tokens, Unscored
from srpo_hf.prompts import EncodedPrompt

__all__ = ["Outcome", "ScoreOptions", "score_file"]

_SHOWN = 5  # places that are kept of each reason


class _Scores(Protocol):
    """What this module needs of :class:`srpo_hf.Scorer`."""

    def score(self, prompts: Any, images: Any, batch: Any, planned: Any, *, step: int, every_token: bool) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How the lines of a file are read.

    Attributes:
        tags: Which tags to read responses with instead of the recorded ones.
        template: True puts every prompt into the chat template, False none; None decides for each prompt.
        system: The system message of prompts that are put into the template.
        max_tokens: Of a prompt with its response; a longer one is left unscored. None: no bound.
        rows: About how many responses are read, lend each other perceptions and are written together, at least 1.
    """

    tags: Retag = field(default_factory=Retag)
    template: bool | None = None
    system: str | None = None
    max_tokens: int | None = None
    rows: int = 16


@dataclass
class Outcome:
    """What became of the lines of a file.

    Attributes:
        responses: Lines that were written, scored or not.
        scored: Responses with log-probs of this model.
        without_image: Those of them whose prompt has no image, so that no token can depend on one.
        encoded: Those of them whose recorded tokens are not this tokenizer's, so that their text was encoded anew.
        unscored: How many responses were written as they were, by reason.
        places: The first lines of each reason, with what was found there.
        errors: The malformed lines, which are left out.
        resumed: Responses that an earlier run had written.
        gap: Mean absolute difference, nats, to the log-probs that the file held, over their tokens; None: it held none.
        score: Mean absolute score of perception and reasoning tokens, nats; None: there are none.
    """

    responses: int = 0
    scored: int = 0
    without_image: int = 0
    encoded: int = 0
    unscored: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    errors: list[RolloutError] = field(default_factory=list)
    resumed: int = 0
    gap: float | None = None
    score: float | None = None

    def leave(self, fault: Unscored, line: int) -> None:
        """Count a response that is written as it was."""
        self.unscored[fault.reason] = self.unscored.get(fault.reason, 0) + 1
        places = self.places.setdefault(fault.reason, [])
        if len(places) < _SHOWN:
            places.append(f"line {line}" + (f" ({fault.detail})" if fault.detail else ""))


def score_file(
    source: Path,
    output: Path,
    scorer: _Scores,
    processor: Any,
    encode: Encode,
    config: SRPOConfig,
    options: ScoreOptions,
    *,
    made_with: dict[str, Any],
    strict: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Score the responses of a rollout file and write them, in their order, to another file.

    Lines go to ``<output>.part``, which becomes the output when all are written. A run that was stopped, whatever
    stopped it, goes on after the last whole line of that file, if the file beside it says that it was made with the
    same settings; the result is byte for byte that of a run that was never stopped.

    Args:
        source: The rollout file.
        output: Where the result goes; not an existing file.
        scorer: A :class:`srpo_hf.Scorer` of the model.
        processor: The model's.
        encode: Makes a prompt of a templated text and its images, as the model takes it.
        config: Which contexts, and how log-probs become weights.
        options: How lines are read.
        made_with: Whatever else the numbers depend on, such as the model and its dtype, in values that JSON has.
        strict: Whether the first malformed line raises.
        progress: Called with the number of bytes of the source that are done and of all.

    Raises:
        FileExistsError: If the output is there already.
        RolloutError: If the source is no rollout file, or `strict` and a line is malformed.
        ValueError: If the model or its chat template cannot be used.
    """
    if output.exists():
        raise FileExistsError(f"{output} is there already: remove it, or name another with -o")
    check_file(source)
    prepare = _Preparer(source, processor, encode, options)
    settings = {**made_with, "source": _digest(source), "config": repr(config), "options": repr(options)}
    part = PartFile(output, settings)
    scored, total = Outcome(resumed=part.lines), source.stat().st_size
    sums = _Sums()
    with part:
        for unit in _units(source, options, scored, strict=strict):
            rows = [prepare(line, scored) for line in unit.lines]
            todo = max(0, part.lines - scored.responses)  # of this unit, lines that an earlier run has written
            done = [] if todo >= len(rows) else _score_unit(rows, scorer, config, processor, scored, sums)
            scored.responses += len(rows)
            part.append(b"".join(done[todo:]))
            progress(unit.end, total)
    part.finish()
    scored.gap, scored.score = sums.means()
    return scored


# Reading


class _Line(NamedTuple):
    number: int
    content: bytes
    rollout: Rollout

    @property
    def prompt(self) -> tuple[Any, ...]:
        """Equal where responses answer the same prompt."""
        rollout = self.rollout
        return (rollout.step, *((rollout.prompt, rollout.image) if rollout.group is None else (str(rollout.group),)))


class _Unit(NamedTuple):
    lines: list[_Line]
    end: int  # the byte of the file after the last of them


def _units(source: Path, options: ScoreOptions, scored: Outcome, *, strict: bool) -> Iterator[_Unit]:
    """The lines of a file, some at a time: about `rows`, and more to keep the responses to a prompt together."""
    lines: list[_Line] = []
    prompts: set[Any] = set()
    end = 0
    with source.open("rb") as file:
        for number, content in enumerate(file, start=1):
            if not is_blank(content):
                try:
                    line = _Line(number, content, options.tags(parse_rollout(content)))
                except RolloutError as error:
                    located = RolloutError(error.reason, line=number, path=source)
                    if strict:
                        raise located from None
                    scored.errors.append(located)
                else:
                    is_full = len(lines) >= options.rows and line.prompt not in prompts
                    if is_full or len(lines) >= 4 * options.rows:
                        yield _Unit(lines, end)
                        lines, prompts = [], set()
                    lines.append(line)
                    prompts.add(line.prompt)
            end += len(content)
    if lines:
        yield _Unit(lines, end)


class _Row(NamedTuple):
    """A response and what is needed to score it; the reason where it cannot be."""

    line: _Line
    fault: Unscored | None = None
    tokens: Tokens | None = None
    prompt: EncodedPrompt | None = None

    @property
    def has_image(self) -> bool:
        return self.prompt is not None and self.prompt.images > 0


class _Preparer:
    def __init__(self, source: Path, processor: Any, encode: Encode, options: ScoreOptions) -> None:
        self._tokens = TokenReader(getattr(processor, "tokenizer", processor))
        self._images = ImageReader(source.parent)
        self._prompts = PromptReader(processor, encode, template=options.template, system=options.system)
        self._max_tokens = options.max_tokens

    def __call__(self, line: _Line, scored: Outcome) -> _Row:
        try:
            tokens, images = self._tokens(line.rollout), self._images(line.rollout)
            text, prompt = self._prompts(line.rollout, images)
            length = len(prompt.token_ids) + len(tokens.ids)
            if self._max_tokens is not None and length > self._max_tokens:
                raise Unscored(f"prompt and response are longer than {self._max_tokens:,} tokens", f"{length:,} tokens")
        except Unscored as fault:
            scored.leave(fault, line.number)
            return _Row(line, fault)
        opened = line.rollout.open_at_start or open_block(text, line.rollout.tags)
        starts, ends = np.array(tokens.starts, dtype=np.int64), np.array(tokens.ends, dtype=np.int64)
        rollout = replace(line.rollout, starts=starts, ends=ends, open_at_start=opened)
        scored.scored += 1
        scored.encoded += not tokens.as_recorded
        scored.without_image += not images
        return _Row(line._replace(rollout=rollout), None, tokens, prompt)


# Scoring


def _score_unit(
    rows: list[_Row], scorer: _Scores, config: SRPOConfig, processor: Any, scored: Outcome, sums: "_Sums"
) -> list[bytes]:
    """The lines of a unit as they are written."""
    written = [_ended(row.line.content) for row in rows]
    by_step: dict[int, list[int]] = {}
    for at, row in enumerate(rows):
        if row.fault is None:
            by_step.setdefault(row.line.rollout.step or 0, []).append(at)
    for step, places in by_step.items():
        batch_rows = [rows[at] for at in places]
        for at, line in zip(
            places, _score_batch(batch_rows, scorer, config, processor, step, scored, sums), strict=True
        ):
            written[at] = written[at] if line is None else line
    return written


def _score_batch(
    rows: list[_Row],
    scorer: _Scores,
    config: SRPOConfig,
    processor: Any,
    step: int,
    scored: Outcome,
    sums: "_Sums",
) -> list[bytes | None]:
    """The lines of responses of one step; None where the model gave a log-prob that is no number."""
    tokenizer = getattr(processor, "tokenizer", processor)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batch = _batch(rows, config, pad)
    planned = plan(batch, config, has_images=any(row.has_image for row in rows), pad_token_id=pad)
    made = scorer.score([row.prompt for row in rows], None, batch, planned, step=step, every_token=True)
    log_probs = {name: values.float().cpu() for name, values in made.log_probs.items()}
    old = log_probs.pop("original")
    is_wrong = (old.isnan() & batch.mask).any(1)
    for view in planned.views:
        found = log_probs[view.name]
        if view.responses is not None:
            found = view.responses.carry_back(found, original_log_probs=old)
        is_wrong |= (found.isnan() & batch.mask).any(1)
    credited = credit(
        batch,
        planned,
        {name: torch.where(is_wrong[:, None], 0.0, found) for name, found in log_probs.items()},
        config,
        old_log_probs=torch.where(is_wrong[:, None], 0.0, old),
        advantages=torch.tensor([row.line.rollout.advantage or 0.0 for row in rows]),
        step=step,
        image_counts=None if made.image_counts is None else made.image_counts.cpu(),
    )
    sums.add(rows, batch, credited)
    lines: list[bytes | None] = []
    for at, row in enumerate(rows):
        if is_wrong[at]:
            scored.leave(Unscored("the model gave a log-prob that is not a number"), row.line.number)
            scored.scored -= 1
            lines.append(None)
            continue
        real = batch.mask[at]
        per_token = {
            "old_log_probs": credited.old_log_probs,
            # Without an image no token depends on one, and nothing was measured.
            "corrupted_log_probs": credited.corrupted_log_probs if row.has_image else None,
            "counterfactual_log_probs": credited.counterfactual_log_probs,
            "scores": credited.scores,
            "weights": credited.weights,
        }
        values: dict[str, Any] = {
            name: of.numbers(name, each[at][real].numpy()) for name, each in per_token.items() if each is not None
        }
        values["roles"] = of.letters(batch.segmentation.roles[at][real].numpy())
        values["broken"] = of.reason_name(batch.segmentation.broken[at])
        if credited.donors is not None:
            values["swapped"] = of.is_donor(credited.donors[at])
        lines.append(_line(row, values))
    return lines


def _batch(rows: list[_Row], config: SRPOConfig, pad: int) -> RolloutBatch:
    """The responses as a batch, segmented as the report reads them."""
    lengths = [len(row.tokens.ids) for row in rows if row.tokens is not None]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    token_ids, roles = torch.full(mask.shape, pad), torch.zeros(mask.shape, dtype=torch.int64)
    boundary, broken = torch.zeros_like(mask), torch.zeros(len(rows), dtype=torch.int64)
    role_of = roles_of_blocks(config.answer_role)
    for at, row in enumerate(rows):
        assert row.tokens is not None
        rollout, real = row.line.rollout, mask[at]
        parsed = rollout.parsed
        row_roles, row_boundary = label_tokens(
            rollout.text, row.tokens.starts, row.tokens.ends, parsed, rollout.tags, role_of
        )
        token_ids[at, real] = torch.tensor(row.tokens.ids)
        roles[at, real], boundary[at, real] = torch.tensor(row_roles), torch.tensor(row_boundary)
        broken[at] = int(parsed.reason)
    numbers: dict[Any, int] = {}
    groups = torch.tensor([numbers.setdefault(row.line.prompt, len(numbers)) for row in rows])
    opened = torch.tensor([OPEN_BLOCKS.index(row.line.rollout.open_at_start) for row in rows])
    return RolloutBatch(token_ids, mask, Segmentation(roles, broken, boundary), groups, open_at_start=opened)


class _Sums:
    """Absolute differences to the log-probs that the file held, and absolute scores, added up over batches."""

    def __init__(self) -> None:
        self._totals = {"gap": [0.0, 0], "score": [0.0, 0]}

    def add(self, rows: list[_Row], batch: RolloutBatch, credited: Any) -> None:
        held = torch.full(batch.mask.shape, torch.nan)
        for at, row in enumerate(rows):
            recorded = row.line.rollout.old_log_probs
            if recorded is not None and row.tokens is not None and row.tokens.as_recorded:
                held[at, batch.mask[at]] = torch.from_numpy(recorded)
        roles = batch.segmentation.roles
        metrics = engine_gap(credited.old_log_probs, roles, batch.mask, scores=credited.scores, engine_log_probs=held)
        counts = {"gap": (batch.mask & ~held.isnan()).sum(), "score": (batch.mask & (roles > 0)).sum()}
        for name, mean in (("gap", metrics["engine/gap/mean"]), ("score", metrics["engine/score/mean"])):
            if count := int(counts[name]):
                total = self._totals[name]
                total[:] = [total[0] + count * float(mean), total[1] + count]

    def means(self) -> tuple[float | None, float | None]:
        gap, score = (total / count if count else None for total, count in self._totals.values())
        return gap, score


# Writing


def _line(row: _Row, values: dict[str, Any]) -> bytes:
    """A line with new values; what belonged to the old ones goes."""
    assert row.tokens is not None
    line = load_strictly(row.line.content, load_json)
    for name in (*LOG_PROBS, *DIVERGENCES, "roles", "broken", "scores", "weights", "swapped"):
        line.pop(name, None)
    rollout = row.line.rollout
    has_tokens = line.get("tokens") is not None or line.get("offsets") is not None
    if not (has_tokens and row.tokens.as_recorded):
        line.pop("tokens", None)
        spans = [list(span) for span in zip(row.tokens.starts, row.tokens.ends, strict=True)]
        line |= {"text": rollout.text, "offsets": spans}
    recorded = parse_rollout(row.line.content)
    if rollout.tags != recorded.tags:
        line["tags"] = tags_as_json(rollout.tags)
    if rollout.open_at_start is not None:
        line["open_at_start"] = rollout.open_at_start
    return (json.dumps(line | values, ensure_ascii=False, separators=(",", ":")) + "\n").encode("utf-8", "replace")


def _ended(line: bytes) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n") + b"\n"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
