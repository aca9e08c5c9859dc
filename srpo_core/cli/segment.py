"""``srpo segment``: how many responses are well-formed, and where the others are not."""

from typing import Annotated

import typer
from rich.text import Text

from srpo_core.cli.reading import Files, Strict, finish, name_lines, read, with_tags
from srpo_core.cli.terminal import out, print_caret, stop
from srpo_core.report import REASONS, fault
from srpo_core.report.words import percent
from srpo_core.rollouts import Rollout, RolloutError
from srpo_core.rollouts.retag import Retag
from srpo_core.tags import BrokenReason

__all__ = ["segment"]


@with_tags
def segment(
    files: Files,
    examples: Annotated[int, typer.Option(min=0, help="Number of malformed responses of each kind to show.")] = 1,
    strict: Strict = False,
    *,
    tags: Retag,
) -> None:
    """Count the well-formed responses, and show where the first malformed ones of each kind went wrong."""
    counts = dict.fromkeys(BrokenReason, 0)
    failures: dict[BrokenReason, list[tuple[str, Rollout, int]]] = {reason: [] for reason in REASONS}
    errors: list[RolloutError] = []
    empty = 0
    for file in files:
        for index, rollout in enumerate(read(file, errors, tags=tags, strict=strict)):
            if rollout.starts is not None and not len(rollout):  # padding, which is no response
                empty += 1
                continue
            reason, position = fault(rollout)
            counts[reason] += 1
            if position is not None and len(failures[reason]) < examples:
                failures[reason].append((f"{file}, response {index}", rollout, position))
    total = sum(counts.values())
    if not total and not empty:
        name_lines(errors)
        stop("there are no readable responses in " + ", ".join(map(str, files)))
    well_formed = counts[BrokenReason.NONE]
    responses = "response is" if total == 1 else "responses are"
    share = percent(well_formed, total)
    out.print(Text(f"{well_formed:,} of {total:,} {responses} well-formed ({share})", style="bold"))
    if empty:
        out.print(Text(f"{empty:,} more {'has' if empty == 1 else 'have'} no tokens", style="dim"))
    for reason, meaning in sorted(REASONS.items(), key=lambda item: -counts[item[0]]):
        if counts[reason]:
            line = f"\n{counts[reason]:,}  {reason.name.lower()}: {meaning} ({percent(counts[reason], total)})"
            out.print(Text(line, style="bold yellow"))
            for place, rollout, position in failures[reason]:
                print_caret(place, rollout.text, position)
    finish(errors)
