"""What the commands that read rollout files share: their arguments, progress bars, and malformed lines."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from srpo_core.cli.terminal import err, safe, stop
from srpo_core.rollouts import Rollout, RolloutError, ScoringOptions, Summary, read_rollouts, summarize_files

__all__ = ["DEFAULT_WORKERS", "File", "Files", "Strict", "Workers", "finish", "name_lines", "progress_bar", "read"]
__all__ += ["summarize"]

Files = Annotated[list[Path], typer.Argument(help="Rollout files.", exists=True, dir_okay=False, readable=True)]
File = Annotated[Path, typer.Argument(help="A rollout file.", exists=True, dir_okay=False, readable=True)]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first malformed line instead of leaving it out.")]
Workers = Annotated[int, typer.Option(min=1, help="Number of processes that read large files.")]
DEFAULT_WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

_SHOWN_ERRORS = 20


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the error stream, moved by the number of bytes that are done and the number of all."""
    columns = (TextColumn(what), BarColumn(40), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def summarize(files: list[Path], options: ScoringOptions, *, strict: bool, workers: int) -> Summary:
    """The summary of files; without a single readable response the command ends."""
    with progress_bar("reading") as progress:
        try:
            summary = summarize_files(files, options, strict=strict, workers=workers, progress=progress)
        except RolloutError as error:
            stop(str(error))
    if not len(summary):
        name_lines(summary.errors)
        stop("there are no readable responses in " + ", ".join(map(str, files)))
    return summary


def read(file: Path, errors: list[RolloutError], *, strict: bool) -> Iterator[Rollout]:
    """The rollouts of a file. Malformed lines go to `errors`; if `strict`, the first one ends the command."""
    try:
        yield from read_rollouts(file, on_error=None if strict else errors.append)
    except RolloutError as error:
        stop(str(error))


def finish(errors: list[RolloutError], count: int | None = None) -> None:
    """End the command. If lines were malformed, they are named and the exit status is 1, though the rest was served."""
    count = len(errors) if count is None else count
    if not count:
        return
    err.print(Text(f"\n{count:,} malformed {'line' if count == 1 else 'lines'} left out:", style="bold red"))
    name_lines(errors, "  ")
    if count > _SHOWN_ERRORS:
        err.print(Text(f"  and {count - _SHOWN_ERRORS:,} more"))
    raise typer.Exit(1)


def name_lines(errors: list[RolloutError], indent: str = "") -> None:
    """Say where the first malformed lines are and what is wrong with them."""
    for error in errors[:_SHOWN_ERRORS]:
        err.print(safe(f"{indent}{error}"), soft_wrap=True)
