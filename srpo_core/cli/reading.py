"""What the commands that read rollout files share: arguments, progress bars, and how malformed lines are named."""

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field
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

__all__ = ["DEFAULT_WORKERS", "File", "Files", "Strict", "Workers", "check_output", "finish", "name_lines"]
__all__ += ["Right", "TagCommand", "progress_bar", "read", "scoring", "summarize", "with_options", "with_tags"]
__all__ += ["written"]


def _file(path: Path) -> Path:
    """A file that exists; else the command ends with one sentence."""
    if path.is_dir():
        inside = sorted(each.name for each in path.glob("*.jsonl"))[:3]
        hint = f", such as {path / inside[0]}" if inside else ""
        raise typer.BadParameter(f"{path} is a folder; name the rollout files in it{hint}.")
    if not path.exists():
        raise typer.BadParameter(f"{path} does not exist.")
    return path


def _files(paths: list[Path]) -> list[Path]:
    return [_file(path) for path in paths]


Files = Annotated[list[Path], typer.Argument(help="Rollout files.", callback=_files)]
File = Annotated[Path, typer.Argument(help="A rollout file.", callback=_file)]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first malformed line instead of leaving it out.")]
Right = Annotated[
    str | None,
    typer.Option(help="Which answers count as right: a threshold on the reward, '>=1'. Else as recorded."),
]
Workers = Annotated[int, typer.Option(min=1, help="Number of processes that read large files.")]
DEFAULT_WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

_SHOWN_ERRORS = 20
_TAG_OPTIONS = ("--perception", "--reasoning", "--answer")
_JOINT = "\0"  # between an opening and a closing tag; no argument can hold it


class TagCommand(TyperCommand):
    """A command whose options for tags take one value or two.

    A second value is the closing tag, unless it is an option or a file, or the first value is complete without it.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The remaining arguments, after two values of one option have been joined to one."""
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
    """The opening and the closing tag in one value, with a space or dots between them; else the value, a heading."""
    parts = re.split(r"\s*(?:\.\.\.|…)\s*", value)
    if len(parts) == 2 and all(parts):
        return tuple(parts)
    parts = value.split()
    two = len(parts) == 2 and any(map(str.isalnum, parts[0])) and not parts[1][0].isalnum()
    return tuple(parts) if two else (value,)


def with_tags(command: Callable[..., None]) -> Callable[..., None]:
    """A command with options for tags, which it gets as `tags`, a :class:`~srpo_core.rollouts.Retag`."""
    kinds = get_args(Kind)

    def wrapper(*args: Any, **given: Any) -> None:
        command(*args, tags=_retag(given.pop("format"), {kind: given.pop(kind) for kind in kinds}), **given)

    options = [_option("format", "--format", "All tags: the name of a published format, or a grammar of a few lines.")]
    for kind in kinds:
        none = " Pass 'none' if answers have no tags." if kind == "answer" else ""
        help_text = f"Opening and closing tag of the {kind}, or one heading. Without it, the recorded tags.{none}"
        options.append(_option(kind, f"--{kind}", help_text, metavar="OPENING [CLOSING]"))
    signature = inspect.signature(command)
    own = [each for name, each in signature.parameters.items() if name != "tags"]
    update_wrapper(wrapper, command)
    wrapper.__signature__ = signature.replace(parameters=[*own, *options])
    return wrapper


def written(name: str) -> str:
    """The name of an option on the command line."""
    return "--" + name.replace("_", "-")


def with_options(offered: Mapping[str, tuple[Field[Any], Any]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put options into the signature of a command, where typer finds them, instead of its ``**chosen``.

    Args:
        offered: By name the field of each option in a group of :mod:`srpo_core.options`, and the type of its values.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        for name, (each, kind) in offered.items():
            notes = [str(bounds)] if (bounds := each.metadata["range"]) and str(bounds) else []
            if (read_by := each.metadata["read_by"]) is not None:
                notes.append(f"only with {written(read_by.option)} {' or '.join(read_by.values)}")
            help_text = each.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
            annotation = Annotated[kind, typer.Option(written(name), help=help_text)]
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=annotation)
            )
        command.__signature__ = signature.replace(parameters=parameters)
        return command

    return decorated


def _option(name: str, written: str, help_text: str, **kwargs: Any) -> inspect.Parameter:
    annotation = Annotated[str | None, typer.Option(written, help=help_text, **kwargs)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _retag(response_format: str | None, given: dict[str, str | None]) -> Retag:
    """The tags that a command was given instead of the recorded ones."""
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
    """A progress bar on the error stream. It is moved by the number of bytes that are done and of all bytes."""
    columns = (TextColumn(what), BarColumn(40), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def check_output(output: Path, files: list[Path]) -> None:
    """End the command with one sentence if the output is a folder or one of the files that are read."""
    if output.is_dir():
        stop(f"--output {output} is a folder; name a file, such as {output / 'report.html'}")
    if any(output.exists() and output.samefile(file) for file in files):
        stop(f"--output {output} is one of the files that are read; write to another file")


def scoring(right: str | None, tags: Retag) -> ScoringOptions:
    """The options of a command that shows what is recorded."""
    try:
        return ScoringOptions(right=None if right is None else CorrectRule.read(right), tags=tags)
    except ValueError:
        stop(
            f"--right must be a threshold on the reward, such as '>=1', got {right!r}; a rollout file does not hold "
            "the rewards of single functions"
        )


def summarize(files: list[Path], options: ScoringOptions, *, strict: bool, workers: int) -> Summary:
    """The summary of files. The command ends if they hold no readable response."""
    with progress_bar("reading") as progress:
        try:
            summary = summarize_files(files, options, strict=strict, workers=workers, progress=progress)
        except (RolloutError, OSError) as error:
            stop(str(error))
    if not len(summary):
        name_lines(summary.errors)
        stop("there are no readable responses in " + ", ".join(map(str, files)))
    return summary


def read(file: Path, errors: list[RolloutError], *, tags: Retag, strict: bool) -> Iterator[Rollout]:
    """The rollouts of a file. Malformed lines go to `errors`; if `strict`, the first one ends the command."""
    try:
        yield from map(tags, read_rollouts(file, on_error=None if strict else errors.append))
    except (RolloutError, OSError) as error:
        stop(str(error))


def finish(errors: list[RolloutError], count: int | None = None) -> None:
    """End the command. If lines were malformed, they are named and the exit status is 1."""
    count = len(errors) if count is None else count
    if not count:
        return
    err.print(Text(f"\n{count:,} malformed {'line' if count == 1 else 'lines'} left out:", style="bold red"))
    name_lines(errors, "  ")
    if count > _SHOWN_ERRORS:
        err.print(Text(f"  and {count - _SHOWN_ERRORS:,} more"))
    raise typer.Exit(1)


def name_lines(errors: list[RolloutError], indent: str = "") -> None:
    """Print where the first malformed lines are and what is wrong with them."""
    for error in errors[:_SHOWN_ERRORS]:
        err.print(safe(f"{indent}{error}"), soft_wrap=True)
