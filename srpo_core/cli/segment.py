"""``srpo segment``: which responses parse, and where the others broke."""

from dataclasses import replace
from typing import Annotated

import typer
from rich.text import Text

from srpo_core.cli.reading import Files, Strict, finish, read
from srpo_core.cli.terminal import out, print_caret, stop
from srpo_core.report import REASONS, fault
from srpo_core.report.words import percent
from srpo_core.rollouts import Rollout, RolloutError
from srpo_core.tags import BrokenReason

__all__ = ["segment"]

_Tags = Annotated[tuple[str, str] | None, typer.Option(help="Opening and closing tag to try instead.")]


def segment(
    files: Files,
    examples: Annotated[int, typer.Option(min=0, help="Number of failures of each kind to show.")] = 1,
    perception: _Tags = None,
    reasoning: _Tags = None,
    answer: _Tags = None,
    strict: Strict = False,
) -> None:
    """Say how many responses parse, and show where the first ones of each kind of failure broke."""
    counts = dict.fromkeys(BrokenReason, 0)
    failures: dict[BrokenReason, list[tuple[str, Rollout, int]]] = {reason: [] for reason in REASONS}
    errors: list[RolloutError] = []
    given = {"perception": perception, "reasoning": reasoning, "answer": answer}
    changed = {name: pair for name, pair in given.items() if pair is not None}
    for file in files:
        for index, rollout in enumerate(read(file, errors, strict=strict)):
            try:
                rollout = replace(rollout, tags=replace(rollout.tags, **changed)) if changed else rollout
            except ValueError as error:
                stop(str(error))
            reason, position = fault(rollout)
            counts[reason] += 1
            if position is not None and len(failures[reason]) < examples:
                failures[reason].append((f"{file}, response {index}", rollout, position))
    total = sum(counts.values())
    well_formed = counts[BrokenReason.NONE]
    out.print(Text(f"{well_formed:,} of {total:,} responses parse ({percent(well_formed, total)})", style="bold"))
    for reason, meaning in sorted(REASONS.items(), key=lambda item: -counts[item[0]]):
        if counts[reason]:
            line = f"\n{counts[reason]:,}  {reason.name.lower()}: {meaning} ({percent(counts[reason], total)})"
            out.print(Text(line, style="bold yellow"))
            for place, rollout, position in failures[reason]:
                print_caret(place, rollout.text, position)
    finish(errors)
