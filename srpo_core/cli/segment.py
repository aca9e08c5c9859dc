"""``srpo segment``: which responses parse, and where the others broke."""

from typing import Annotated

import typer
from rich.text import Text

from srpo_core.cli.reading import Files, Strict, finish, read, with_tags
from srpo_core.cli.terminal import out, print_caret
from srpo_core.report import REASONS, fault
from srpo_core.report.words import percent
from srpo_core.rollouts import Rollout, RolloutError
from srpo_core.rollouts.retag import Retag
from srpo_core.tags import BrokenReason

__all__ = ["segment"]


@with_tags
def segment(
    files: Files,
    examples: Annotated[int, typer.Option(min=0, help="Number of failures of each kind to show.")] = 1,
    strict: Strict = False,
    *,
    tags: Retag,
) -> None:
    """Say how many responses parse, and show where the first ones of each kind of failure broke."""
    counts = dict.fromkeys(BrokenReason, 0)
    failures: dict[BrokenReason, list[tuple[str, Rollout, int]]] = {reason: [] for reason in REASONS}
    errors: list[RolloutError] = []
    empty = 0
    for file in files:
        for index, rollout in enumerate(read(file, errors, tags=tags, strict=strict)):
            if rollout.starts is not None and not len(rollout):  # as of padding: no response
                empty += 1
                continue
            reason, position = fault(rollout)
            counts[reason] += 1
            if position is not None and len(failures[reason]) < examples:
                failures[reason].append((f"{file}, response {index}", rollout, position))
    total = sum(counts.values())
    well_formed = counts[BrokenReason.NONE]
    out.print(Text(f"{well_formed:,} of {total:,} responses parse ({percent(well_formed, total)})", style="bold"))
    if empty:
        out.print(Text(f"{empty:,} more without a single token", style="dim"))
    for reason, meaning in sorted(REASONS.items(), key=lambda item: -counts[item[0]]):
        if counts[reason]:
            line = f"\n{counts[reason]:,}  {reason.name.lower()}: {meaning} ({percent(counts[reason], total)})"
            out.print(Text(line, style="bold yellow"))
            for place, rollout, position in failures[reason]:
                print_caret(place, rollout.text, position)
    finish(errors)
