"""``srpo report``: a page of what happened to the credit."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from srpo_core.cli.reading import DEFAULT_WORKERS, Files, Strict, Workers, finish, summarize
from srpo_core.cli.terminal import out, table
from srpo_core.diagnostics import ROLE_NAMES
from srpo_core.report import interference_in_words, report_files
from srpo_core.report.words import percent
from srpo_core.rollouts import ScoringOptions, Summary

__all__ = ["report"]


def report(
    files: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the page goes.")] = Path("report.html"),
    sample: Annotated[int, typer.Option(min=0, help="Number of responses to show; all of them count.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed for drawing the responses to show.")] = 0,
    max_megabytes: Annotated[float, typer.Option(min=0.2, help="Size of the page, at most.")] = 5.0,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Credit report",
    strict: Strict = False,
    workers: Workers = DEFAULT_WORKERS,
) -> None:
    """Write one self-contained page: overview, distributions, and token heat maps of a sample of responses."""
    summary = summarize(files, ScoringOptions(), strict=strict, workers=workers)
    report_files(summary, output, sample=sample, seed=seed, max_bytes=int(max_megabytes * 1e6), title=title)
    _print_overview(summary)
    out.print(Text(f"\n{output} ({output.stat().st_size / 1e6:.1f} MB)"))
    finish(summary.errors, summary.malformed)


def _print_overview(summary: Summary) -> None:
    metrics = summary.metrics()
    facts = table("", "", left=2)
    facts.add_row("responses", f"{len(summary):,} of {int(summary.columns['tokens'].sum()):,} tokens")
    if "right/fraction" in metrics:
        facts.add_row("right answers", percent(metrics["right/fraction"]))
    facts.add_row("well-formed", percent(1 - metrics["broken/fraction"]))
    for name in ROLE_NAMES.values():
        mass, low, high = (metrics[f"weight/{name}/{key}"] for key in ("mass", "p05", "p95"))
        share = metrics[f"tokens/{name}/fraction"]
        facts.add_row(
            name,
            f"{percent(mass)} of the weight on {percent(share)} of the tokens; 90 % in {low:.2f} to {high:.2f}",
        )
    facts.add_row("effective tokens", f"{percent(metrics['tokens/effective_fraction'])} of the weighted ones")
    if "advantage/cosine" in metrics:
        facts.add_row("cosine to GRPO", f"{metrics['advantage/cosine']:.4f}")
    facts.add_row("interference", "; ".join(filter(None, interference_in_words(metrics.get("interference")))))
    out.print(facts)
