"""``srpo doctor``: what is installed, whether the loss is right on this machine, and what a format looks like."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from srpo_core.cli.checks import EXCLUSIVE, NOT_INSTALLED, Check, accelerator, checks, loss_is_right
from srpo_core.cli.terminal import out, safe, stop, table
from srpo_core.formats import PUBLISHED, read_format
from srpo_core.grammar import JSON, is_bracketed
from srpo_core.prompting import example_response
from srpo_core.tags import RoleTags, parse_response

__all__ = ["doctor"]

_COLORS = {"perception": "green", "reasoning": "cyan", "answer": "magenta", "neither": "dim"}

_Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Show a format of responses instead: the name of a published one, lines such as "
        "`perception = <see> ... </see>`, or a file with such lines.",
    ),
]


def doctor(format: _Format = None) -> None:
    """Show which frameworks are installed, which versions are supported, and what is missing."""
    if format is not None:
        _show_format(format)
        return
    rows = table("", "installed", "supported", "", left=4)
    try:
        found = checks()
    except PackageNotFoundError:
        stop(NOT_INSTALLED)
    for check in found:
        rows.add_row(check.name, check.installed, check.supported, _verdict(check))
    out.print(rows)
    out.print(Text(f"\naccelerator: {accelerator()}"))
    device, good = loss_is_right()
    loss = Check("", "", "", "ok" if good else "not supported", good)
    out.print(Text(f"the loss on {device}: ").append_text(_verdict(loss)))
    if not good:
        raise typer.Exit(1)
    out.print(Text(EXCLUSIVE))


def _verdict(check: Check) -> Text:
    return Text(check.verdict, style={True: "green", False: "red", None: "dim"}[check.good])


def _show_format(value: str) -> None:
    """Print the lines of a format, what each tag is, and how an example response is read."""
    name = value.strip().lower()
    try:
        path = Path(value)
        is_file = name not in PUBLISHED and "\n" not in value and path.is_file()
        tags = read_format(path.read_text("utf-8-sig") if is_file else value)
    except (OSError, ValueError) as error:
        stop(f"--format {error}")
    out.print(safe(tags.grammar))
    if name in PUBLISHED:
        out.print(safe(f"\nof {PUBLISHED[name].source}", style="dim"))
    out.print()
    for kind, pair in tags.pairs.items():
        out.print(Text(kind, style=_COLORS[kind]).append_text(safe(f": {_in_words(pair)}", style="default")))
    if tags.answer is None:
        out.print(Text("Answers are not tagged."))
    example = PUBLISHED[name].example if name in PUBLISHED else example_response(tags)
    out.print(Text("\nA response in this format, and how it is read:\n"))
    rows = table("", "", left=2)
    for kind, text in _parts(example, tags):
        rows.add_row(Text(kind, style=_COLORS[kind]), safe(text, style=_COLORS[kind]))
    out.print(rows)


def _in_words(pair: tuple[str, str]) -> str:
    if pair == JSON:
        return "a JSON array or object that begins a line"
    if not pair[1]:
        return f"from a line that begins with {pair[0]} to the next tag or the end"
    if is_bracketed(pair):
        return f"in the brackets of {pair[0]}{pair[1]}, the last one outside of reasoning"
    return f"between {pair[0]} and {pair[1]}"


def _parts(text: str, tags: RoleTags) -> list[tuple[str, str]]:
    """The parts of a response in their order: the kind of each, and its text."""
    parts, at = [], 0
    for kind, start, end in parse_response(text, tags).blocks:
        parts += [("neither", text[at:start]), (kind, text[start:end])]
        at = end
    return [(kind, part.strip()) for kind, part in [*parts, ("neither", text[at:])] if part.strip()]
