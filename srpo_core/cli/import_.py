"""``srpo import``: the completion logs of other tools as a rollout file."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from srpo_core.cli.reading import Strict, finish, name_lines, progress_bar, with_tags
from srpo_core.cli.terminal import out, safe, stop, table
from srpo_core.report.words import percent
from srpo_core.rollouts import CorrectRule
from srpo_core.rollouts.importing import Imported, import_logs
from srpo_core.rollouts.lines import TOOLS
from srpo_core.rollouts.retag import Retag
from srpo_core.tags import DEFAULT_TAGS

__all__ = ["import_"]


@with_tags
def import_(
    files: Annotated[
        list[Path], typer.Argument(help="Completion logs, or folders of them.", exists=True, readable=True)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The rollout file to write; missing folders are made.")
    ] = Path("rollouts.jsonl"),
    tool: Annotated[
        Literal["trl", "verl", "swift", "openrlhf"] | None,
        typer.Option("--from", help="The tool that wrote the logs. Without it, their columns decide."),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="A reward function that is part of the reward, NAME or NAME=WEIGHT; once for each."),
    ] = None,
    right: Annotated[
        str | None,
        typer.Option(
            help="Which answers are right: accuracy_reward, accuracy_reward>=0.5, or >=1 for the whole reward."
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Responses to each prompt, if prompts with different images have equal texts.",
        ),
    ] = None,
    drop_repeated: Annotated[
        bool,
        typer.Option("--drop-repeated", help="Leave out tables that the tool wrote again at a later step."),
    ] = False,
    strict: Strict = False,
    *,
    tags: Retag,
) -> None:
    """Turn completion logs of TRL, verl, ms-swift or OpenRLHF into a rollout file for the other commands."""
    if output.is_dir():
        stop(f"--output {output} is a folder; name a file, such as {output / 'rollouts.jsonl'}")
    try:
        rule = None if right is None else CorrectRule.read(right)
    except ValueError as error:
        stop(f"--right: {error}")
    with progress_bar("importing") as progress:
        try:
            found = import_logs(
                files,
                output,
                tool=tool,
                rewards=_weights(reward),
                right=rule,
                tags=tags.of(DEFAULT_TAGS),
                group_size=group_size,
                drop_repeated=drop_repeated,
                strict=strict,
                progress=progress,
            )
        except (ValueError, OSError) as error:
            stop(str(error))
    if not found.responses:
        name_lines(found.errors)
        stop("there are no responses in " + ", ".join(map(str, files)))
    _print_found(found)
    responses = f"{found.responses:,} response{'' if found.responses == 1 else 's'}"
    out.print(safe(f"\n{output} holds {responses}; srpo report reads it."))
    finish(found.errors, found.malformed)


def _weights(reward: list[str] | None) -> dict[str, float] | None:
    """The weights of the reward functions, as the option gives them."""
    weights: dict[str, float] = {}
    for item in reward or ():
        name, weight = item.rsplit("=", 1) if "=" in item else (item, "1")
        try:
            weights[name] = float(weight)
        except ValueError:
            stop(f"--reward must be NAME or NAME=WEIGHT, such as format_reward=0.5, got {item!r}")
    return weights or None


def _print_found(found: Imported) -> None:
    facts = table("", "", left=2)
    tools = dict.fromkeys(found.tools.values())
    for tool in tools:
        of_tool = [file for file, its in found.tools.items() if its == tool]
        files = of_tool[0] if len(of_tool) == 1 else f"{len(of_tool):,} files, {of_tool[0]} to {of_tool[-1]}"
        facts.add_row("log of", safe(f"{TOOLS.get(tool, tool)}: {files}"))
    facts.add_row("responses", f"{found.responses:,}")
    facts.add_row("steps", f"{len(found.steps):,}: {_ends(sorted(found.steps))}" if found.steps else "-")
    sizes = sorted(found.groups.values())
    facts.add_row("groups", f"{len(sizes):,} of {_ends(sizes)} responses" if sizes else "-")
    facts.add_row("reward", safe(_reward(found)))
    facts.add_row("right", safe(_right(found)))
    for name in ("advantage", "prompt", "reference", "image"):
        facts.add_row(name, _share(found.found[name], found.responses))
    if found.found["open_at_start"]:
        facts.add_row("begin in a block", _share(found.found["open_at_start"], found.responses))
    if set(tools) & TOOLS.keys():
        facts.add_row("not in the log", "tokens, log-probs, weights, and whether a response was cut off")
    out.print(facts)
    if found.repeated:
        repeated = f"\n{found.repeated:,} responses were logged twice"
        out.print(
            Text(
                f"{repeated}; their second record is left out."
                if found.left_out
                else f"{repeated}, at two steps. Pass --drop-repeated to leave their second record out."
            )
        )
    for what, count in sorted(found.dropped.items()):
        out.print(safe(f"\n{what} of {count:,} responses: left out"))
    if found.contradicted:
        out.print(
            Text(
                f"\nIn {found.contradicted:,} of {found.compared:,} groups the advantages do not follow the rewards. "
                "Name the reward functions and their weights (--reward accuracy_reward=1 --reward format_reward=0.5) "
                "or, where prompts of different images read the same, the size of a group (--group-size 8).",
                style="yellow",
            )
        )


def _ends(numbers: list[int]) -> str:
    """The least and the greatest of sorted numbers."""
    return f"{numbers[0]:,}" if numbers[0] == numbers[-1] else f"{numbers[0]:,} to {numbers[-1]:,}"


def _share(count: int, whole: int) -> str:
    return "-" if not count else "all" if count == whole else f"{count:,} of {whole:,}"


def _reward(found: Imported) -> str:
    parts = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in found.functions.items())
    return _share(found.found["reward"], found.responses) + (f", {parts}" if parts else "")


def _right(found: Imported) -> str:
    if found.correct_by is not None:
        right, known = found.right[True], found.right[True] + found.right[False]
        return f"{percent(right, known) if known else '-'} of {known:,}, by {found.correct_by}"
    names = ", ".join(found.named)
    return "not known: pass --right" + (f" with one of {names}" if names else ", such as '>=1'")
