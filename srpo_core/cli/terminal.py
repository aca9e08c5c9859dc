"""What several commands print: texts of a model made safe, heat maps, tables and errors."""

import os
from typing import Literal, NoReturn

import numpy as np
import typer
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from srpo_core.report.colors import REACH, SCALES, TEXT, Color, Theme, score_shade, weight_shade
from srpo_core.report.escapes import escaped

__all__ = ["By", "err", "heat_text", "legend", "out", "print_caret", "safe", "stop", "table"]

#: What the colors of a heat map mean.
By = Literal["weight", "score"]

out, err = Console(highlight=False), Console(stderr=True, highlight=False)


def safe(text: str, style: str = "") -> Text:
    """A text that a model may have written: hidden characters are shown as escapes, markup is shown as it is."""
    return Text(escaped(text), style=style)


def stop(message: str) -> NoReturn:
    """End the command with an error."""
    err.print(safe(f"Error: {message}", style="red"), soft_wrap=True)
    raise typer.Exit(1)


def table(*headings: str, left: int = 1) -> Table:
    """An empty table without lines; the first `left` columns are aligned to the left, the others to the right."""
    empty = Table(box=None, pad_edge=False, show_header=any(headings), header_style="dim", padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        empty.add_column(heading, justify="left" if number < left else "right")
    return empty


def heat_text(tokens: list[str], values: np.ndarray, *, by: By = "weight", theme: Theme | None = None) -> Text:
    """Tokens on the colors of their weights, or of their scores, as a text that ``rich`` prints.

    Args:
        tokens: The texts of the tokens.
        values: Weights, or scores in nats.
        by: Which of the two the values are.
        theme: The theme of the terminal; None: what the environment variable ``COLORFGBG`` says, else dark.

    Example:
        >>> heat_text([" red", " 3"], np.array([1.0, 4.0]), theme="dark").spans
        [Span(4, 6, Style(color=Color('rgb(240,242,245)', ...
    """
    theme = theme or _theme()
    shades = (weight_shade if by == "weight" else score_shade)(values)
    text = Text()
    for token, shade in zip(tokens, shades.tolist(), strict=True):
        style = _style(shade, theme)
        text.append_text(Text(safe(token.replace("\n", "↵\n")).plain, style=style if style else ""))
    return text


def legend(by: By) -> Text:
    """What the colors of a heat map mean, in one line."""
    values = [0.25, 0.5, 1.0, 2.0, 4.0] if by == "weight" else [-5.0, -1.0, 0.0, 1.0, 5.0]
    labels = [f" {value:g} " for value in values]
    return Text(f"{by}  ").append_text(heat_text(labels, np.array(values), by=by))


def print_caret(place: str | None, text: str, position: int) -> None:
    """Print the part of a text around a character, and a caret below the character."""
    room = max(20, min(out.width, 120) - 8)
    start = max(0, min(position - room * 2 // 3, len(text) - room))
    before, after = "…" if start else "", "…" if start + room < len(text) else ""
    # The caret stands below the character although an escape before it takes more room.
    left, right = (
        escaped(part.replace("\n", "↵"), keep="") for part in (text[start:position], text[position : start + room])
    )
    if place is not None:
        out.print(safe(f"  {place}, character {position}", style="dim"))
    out.print(Text(f"  {before}{left}{right}{after}"), no_wrap=True, overflow="ellipsis")
    out.print(Text(" " * (2 + cell_len(before + left)) + "^", style="bold red"), no_wrap=True)


def _theme() -> Theme:
    background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return "light" if background in {"7", "15"} else "dark"


def _style(shade: int, theme: Theme) -> Style:
    # Neutral tokens keep the terminal's own colors.
    if shade == REACH:
        return Style()
    return Style(color=_rgb(TEXT[theme]), bgcolor=_rgb(SCALES[theme][shade]))


def _rgb(color: Color) -> str:
    return "rgb({},{},{})".format(*color)
