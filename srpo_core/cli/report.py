"""``srpo report``: a page of what happened to the credit."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from srpo_core.cli.reading import (
    DEFAULT_WORKERS,
    Files,
    Right,
    Strict,
    Workers,
    check_output,
    finish,
    scoring,
    summarize,
    with_tags,
)
from srpo_core.cli.terminal import out, safe, stop, table
from srpo_core.diagnostics import ROLE_NAMES
from srpo_core.report import answers, interference_in_words, report_files, right_in_words
from srpo_core.report.words import percent
from srpo_core.rollouts import Summary
from srpo_core.rollouts.retag import Retag

__all__ = ["report"]


@with_tags
def report(
    files: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write; missing folders are made.")] = Path(
        "report.html"
    ),
    sample: Annotated[int, typer.Option(min=0, help="Number of responses to show; the figures are over all.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed for drawing the responses to show.")] = 0,
    max_megabytes: Annotated[float, typer.Option(min=0.2, help="Size of the page, at most.")] = 5.0,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Credit report",
    image_folder: Annotated[
        Path | None, typer.Option(help="Where images may lie beside the folders of the files; others are not shown.")
    ] = None,
    right: Right = None,
    strict: Strict = False,
    workers: Workers = DEFAULT_WORKERS,
    *,
    tags: Retag,
) -> None:
    """Write one self-contained page: answers, figures, distributions, and heat maps of a sample of the responses."""
    check_output(output, files)
    summary = summarize(files, scoring(right, tags), strict=strict, workers=workers)
    try:
        written = report_files(
            summary,
            output,
            sample=sample,
            seed=seed,
            max_bytes=int(max_megabytes * 1e6),
            title=title,
            image_folder=image_folder,
        )
    except OSError as error:
        stop(f"{output} cannot be written: {error.strerror or error}")
    _print_answers(summary)
    _print_overview(summary)
    if written.missing_images:
        out.print(safe(f"\n{written.missing_images}", style="yellow"))
    out.print(safe(f"\n{output} ({output.stat().st_size / 1e6:.1f} MB)"))
    finish(summary.errors, summary.malformed)


def _print_answers(summary: Summary) -> None:
    for answer in answers(summary):
        out.print(Text(answer.question, style="bold" if answer.measured else "bold yellow"))
        out.print(safe(answer.sentence))
        out.print()


def _print_overview(summary: Summary) -> None:
    metrics = summary.metrics()
    facts = table("", "", left=2)
    facts.add_row("responses", _size(summary))
    facts.add_row("tags", safe("; or ".join(lines.replace("\n", ", ") for lines in list(summary.formats)[:3])))
    facts.add_row("right answers", percent(metrics.get("right/fraction")))
    facts.add_row("right", safe(right_in_words(summary)))
    broken = metrics.get("broken/fraction")
    facts.add_row("well-formed", percent(None if broken is None else 1 - broken))
    for name in ROLE_NAMES.values():
        mass, share = metrics.get(f"weight/{name}/mass"), metrics.get(f"tokens/{name}/fraction")
        low, high = (_number(metrics.get(f"weight/{name}/{key}"), 2) for key in ("p05", "p95"))
        told = (
            f"{percent(mass)} of the weight on {percent(share)} of the tokens; 90 % of its weights are from {low} to "
        )
        facts.add_row(name, f"{told}{high}" if low != "-" else "-")
    effective = percent(metrics.get("tokens/effective_fraction"))
    facts.add_row("effective tokens", effective if effective == "-" else f"{effective} of the tokens with a role")
    facts.add_row("similarity to GRPO", _number(metrics.get("advantage/cosine"), 4))
    facts.add_row("interference", "; ".join(filter(None, interference_in_words(metrics.get("interference")))))
    out.print(facts)


def _size(summary: Summary) -> str:
    columns = summary.columns
    tokens = int(columns["tokens"].sum())
    known, weighed = int(columns["has_tokens"].sum()), int((columns["weighed"] > 0).sum())
    text = f"{len(summary):,}" + (f", with {tokens:,} token{'' if tokens == 1 else 's'}" if known else "")
    lacking = [f"{_have(len(summary) - known)} no tokens"] if known < len(summary) else []
    if unweighed := int((columns["tokens"] > 0).sum()) - weighed:
        lacking.append(f"{_have(unweighed)} neither weights nor scores nor the log-probs of a second view")
    return "; ".join([text, *lacking])


def _have(count: int) -> str:
    return f"{count:,} {'has' if count == 1 else 'have'}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
