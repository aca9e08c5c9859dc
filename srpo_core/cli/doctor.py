"""``srpo doctor``: what is installed, whether the loss works on this machine, and what a format of responses is."""

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated

import torch
import typer
from packaging.requirements import Requirement
from rich.text import Text

from srpo_core.cli.terminal import out, safe, stop, table
from srpo_core.formats import PUBLISHED, read_format
from srpo_core.grammar import JSON, is_bracketed
from srpo_core.prompting import example_response
from srpo_core.roles import Role
from srpo_core.srpo import srpo_loss
from srpo_core.tags import RoleTags, parse_response

__all__ = ["doctor"]

# How to install what an extra needs.
_HINTS = {
    "": "pip install srpo-core",
    "cli": "pip install 'srpo-core[cli]'",
    "trl": "for TRL",
    "verl": "for verl",
    "openrlhf": "for OpenRLHF",
    "plot": "for plots",
}


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
    """Say which frameworks are installed, which versions are supported, and what is missing."""
    if format is not None:
        _show_format(format)
        return
    rows = table("", "installed", "supported", "", left=4)
    rows.add_row("python", platform.python_version(), ">=3.11", _verdict(sys.version_info >= (3, 11)))
    extras: dict[str, list[Requirement]] = {}
    try:
        needed = [Requirement(line) for line in requires("srpo-core") or []]
    except PackageNotFoundError:
        stop("srpo-core is not installed, only imported: pip install -e . in the checkout")
    for requirement in needed:
        match = re.search(r"extra == ['\"]([\w-]+)", str(requirement.marker or ""))
        extras.setdefault(match[1] if match else "", []).append(requirement)
    for name, hint in _HINTS.items():
        for requirement in extras.get(name, []):
            rows.add_row(*_checked(requirement, hint))
    out.print(rows)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, which is fine: the CPU will do"
    out.print(Text(f"\naccelerator: {device}"))
    _check_core()
    out.print(Text("The three trainers exclude one another: use one environment for each."))


def _verdict(good: bool) -> Text:
    return Text("ok", style="green") if good else Text("not supported", style="red")


def _checked(requirement: Requirement, hint: str) -> tuple[str, str, str, Text]:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return requirement.name, "-", str(requirement.specifier), Text(f"not installed ({hint})", style="dim")
    good = requirement.specifier.contains(installed, prereleases=True)
    return requirement.name, installed, str(requirement.specifier), _verdict(good)


def _check_core() -> None:
    """Compare one step of the loss on this machine's best device with its value computed by hand."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    old = torch.tensor([[-0.1, -1.0, -0.5]], device=device)
    roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING]], device=device)
    log_probs, corrupted = old.clone().requires_grad_(), old - torch.tensor([[2.0, 0.0, 0.0]], device=device)
    mask, advantages = torch.ones_like(roles, dtype=torch.bool), torch.tensor([3.0], device=device)
    output = srpo_loss(log_probs, advantages, roles, mask, old_log_probs=old, corrupted_log_probs=corrupted)
    output.loss.backward()
    expected = torch.tensor([[-1.8585, -0.5707, -0.5707]], device=device)
    good = log_probs.grad is not None and torch.allclose(log_probs.grad, expected, atol=1e-4)
    out.print(Text(f"the loss on {device}: ").append_text(_verdict(good)))
    if not good:
        raise typer.Exit(1)


def _show_format(value: str) -> None:
    """The lines of a format, what each tag is, and an example response taken apart."""
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
    """A response from its beginning to its end: what each part is, and the part."""
    parts, at = [], 0
    for kind, start, end in parse_response(text, tags).blocks:
        parts += [("neither", text[at:start]), (kind, text[start:end])]
        at = end
    return [(kind, part.strip()) for kind, part in [*parts, ("neither", text[at:])] if part.strip()]
