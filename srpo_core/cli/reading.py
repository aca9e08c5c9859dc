"""What the commands that read rollout files share: their arguments, progress bars, and malformed lines."""

import inspect
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperCommand

from srpo_core.cli.terminal import err, safe, stop
from srpo_core.formats import read_format
from srpo_core.rollouts import (
    CorrectRule,
    Rollout,
    RolloutError,
    ScoringOptions,
    Summary,
    read_rollouts,
    summarize_files,
)
from srpo_core.rollouts.retag import Retag
from srpo_core.tags import Kind, RoleTags, tag_pair

__all__ = ["DEFAULT_WORKERS", "File", "Files", "Strict", "Workers", "finish", "name_lines", "progress_bar", "read"]
__all__ += ["Right", "TagCommand", "scoring", "summarize", "with_tags"]

Files = Annotated[list[Path], typer.Argument(help="Rollout files.", exists=True, dir_okay=False, readable=True)]
File = Annotated[Path, typer.Argument(help="A rollout file.", exists=True, dir_okay=False, readable=True)]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first malformed line instead of leaving it out.")]
Right = Annotated[
    str | None,
    typer.Option(help="Which answers count as right: a threshold on the reward, '>=1'. Else as the file says."),
]
Workers = Annotated[int, typer.Option(min=1, help="Number of processes that read large files.")]
DEFAULT_WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

_SHOWN_ERRORS = 20
_TAG_OPTIONS = ("--perception", "--reasoning", "--answer")
_JOINT = "\0"  # between an opening and a closing tag; no argument can hold it


class TagCommand(TyperCommand):
    """A command whose options of tags take one value or two.

    A second value is the closing tag, unless it is an option or a file, or the first value is complete without.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments, with two values of one option as one."""
        joined: list[str] = []
        waiting = list(args)
        while waiting:
            joined.append(waiting.pop(0))
            if joined[-1] == "--":
                break
            if joined[-1] in _TAG_OPTIONS and waiting:
                joined.append(waiting.pop(0))
                if waiting and _is_open(joined[-1]) and not waiting[0].startswith("-") and not _exists(waiting[0]):
                    joined[-1] += _JOINT + waiting.pop(0)
        return super().parse_args(ctx, joined + waiting)


def _is_open(value: str) -> bool:
    """Whether a closing tag may follow as a value of its own."""
    return value != "none" and not value.startswith("#") and not value.endswith(":") and len(_split_tags(value)) == 1


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:
        return False


def _split_tags(value: str) -> tuple[str, ...]:
    """An opening and a closing tag in one value, with a space or dots between; else the value, which is a heading."""
    parts = re.split(r"\s*(?:\.\.\.|…)\s*", value)
    if len(parts) == 2 and all(parts):
        return tuple(parts)
    parts = value.split()
    two = len(parts) == 2 and any(map(str.isalnum, parts[0])) and not parts[1][0].isalnum()
    return tuple(parts) if two else (value,)


def with_tags(command: Callable[..., None]) -> Callable[..., None]:
    """A command with options for tags. It gets them as `tags`, a :class:`~srpo_core.rollouts.Retag`."""
    kinds = get_args(Kind)

    def wrapper(*args: Any, **given: Any) -> None:
        command(*args, tags=_retag(given.pop("format"), {kind: given.pop(kind) for kind in kinds}), **given)

    options = [_option("format", "--format", "All tags: the name of a published format, or a grammar of a few lines.")]
    for kind in kinds:
        none = " 'none': answers have no tags." if kind == "answer" else ""
        help_text = f"Opening and closing tag of the {kind}, or one heading; else as recorded.{none}"
        options.append(_option(kind, f"--{kind}", help_text, metavar="OPENING [CLOSING]"))
    signature = inspect.signature(command)
    own = [each for name, each in signature.parameters.items() if name != "tags"]
    update_wrapper(wrapper, command)
    wrapper.__signature__ = signature.replace(parameters=[*own, *options])
    return wrapper


def _option(name: str, written: str, help_text: str, **kwargs: Any) -> inspect.Parameter:
    annotation = Annotated[str | None, typer.Option(written, help=help_text, **kwargs)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _retag(response_format: str | None, given: dict[str, str | None]) -> Retag:
    """The tags that a command was given in place of those that rollouts were recorded with."""
    tags: RoleTags | None = None
    changed: dict[str, tuple[str, str] | None] = {}
    if response_format is not None:
        try:
            tags = read_format(response_format)
        except ValueError as error:
            stop(f"--format {error}")
    for kind, value in given.items():
        if kind == "answer" and value == "none":
            changed[kind] = None
        elif value is not None:
            try:
                changed[kind] = tag_pair(value.split(_JOINT) if _JOINT in value else _split_tags(value))
            except ValueError as error:
                stop(f"--{kind} {error}")
    return Retag(tags, tuple(changed.items()))


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the error stream, moved by the number of bytes that are done and the number of all."""
    columns = (TextColumn(what), BarColumn(40), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def scoring(right: str | None, tags: Retag) -> ScoringOptions:
    """The options of a command that shows what is recorded."""
    try:
        return ScoringOptions(right=None if right is None else CorrectRule.read(right), tags=tags)
    except ValueError:
        stop(f"--right must be a threshold on the reward, which is all that a file holds, such as '>=1', got {right!r}")


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


def read(file: Path, errors: list[RolloutError], *, tags: Retag, strict: bool) -> Iterator[Rollout]:
    """The rollouts of a file. Malformed lines go to `errors`; if `strict`, the first one ends the command."""
    try:
        yield from map(tags, read_rollouts(file, on_error=None if strict else errors.append))
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
