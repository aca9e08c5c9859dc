"""The ``srpo`` command: report, show, segment, weights, doctor, demo."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import numpy as np
import torch
import typer
from packaging.requirements import Requirement
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from srpo_core.contrasts import ContrastKind
from srpo_core.diagnostics import ROLE_NAMES
from srpo_core.report import REASONS, fault, interference_in_words, report_files
from srpo_core.report.colors import REACH, SCALES, TEXT, Color, Theme, score_shade, weight_shade
from srpo_core.roles import BrokenReason, Role
from srpo_core.rollouts import Rollout, RolloutError, parse_rollout, read_rollouts
from srpo_core.srpo import SRPOConfig, srpo_loss
from srpo_core.summaries import CreditOptions, ScoredRollout, Summary, score_rollouts, summarize_files
from srpo_core.weights import Baseline, Renormalization, Sign, WeightMap

__all__ = ["app", "heat_text"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="See where the credit went, in rollouts that any trainer wrote (JSON Lines, one response a line).",
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

Files = Annotated[list[Path], typer.Argument(help="Rollout files.", exists=True, dir_okay=False, readable=True)]
File = Annotated[Path, typer.Argument(help="A rollout file.", exists=True, dir_okay=False, readable=True)]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first malformed line instead of leaving it out.")]
_default_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
Workers = Annotated[int, typer.Option(min=1, help="Processes that read large files.")]
_SHOWN_ERRORS = 20
_DEFAULT = SRPOConfig()


@app.command()
def report(
    files: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    sample: Annotated[int, typer.Option(min=0, help="Responses to show, at most; figures are over all.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the draw of the sample.")] = 0,
    max_megabytes: Annotated[float, typer.Option(min=0.2, help="Size of the page, at most.")] = 5.0,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Credit report",
    strict: Strict = False,
    workers: Workers = _default_workers,
) -> None:
    """Write one self-contained page: overview, distributions, and token heat maps of a sample of responses."""
    summary = _summarize(files, CreditOptions(), strict=strict, workers=workers)
    report_files(summary, output, sample=sample, seed=seed, max_bytes=int(max_megabytes * 1e6), title=title)
    _print_overview(summary)
    out.print(Text(f"\n{output} ({output.stat().st_size / 1e6:.1f} MB)"))
    _finish(summary.errors, summary.malformed)


@app.command()
def show(
    file: File,
    index: Annotated[int, typer.Option(min=0, help="Which response, from 0, malformed lines not counted.")] = 0,
    by: Annotated[Literal["weight", "score"], typer.Option(help="What the colours mean.")] = "weight",
    table: Annotated[bool, typer.Option("--table", help="List every token with its numbers.")] = False,
    strict: Strict = False,
) -> None:
    """Show one response as a heat map in the terminal."""
    errors: list[RolloutError] = []
    found = next(islice(_read(file, errors, strict=strict), index, None), None)
    if found is None:
        _name(errors)
        _stop(f"{file} has fewer than {index + 1} readable responses")
    scored = next(score_rollouts([found]))
    _print_response(scored, index, by=by, table=table or out.color_system is None)
    _finish(errors)


@app.command()
def segment(
    files: Files,
    examples: Annotated[int, typer.Option(min=0, help="Failures of each kind to show.")] = 1,
    perception: Annotated[tuple[str, str] | None, typer.Option(help="Opening and closing tag, if others.")] = None,
    reasoning: Annotated[tuple[str, str] | None, typer.Option(help="Opening and closing tag, if others.")] = None,
    answer: Annotated[tuple[str, str] | None, typer.Option(help="Opening and closing tag, if others.")] = None,
    strict: Strict = False,
) -> None:
    """Say how many responses parse, and show where the first ones of each kind of failure broke."""
    counts = dict.fromkeys(BrokenReason, 0)
    failures: dict[BrokenReason, list[tuple[str, Rollout, int]]] = {reason: [] for reason in REASONS}
    errors: list[RolloutError] = []
    given = {"perception": perception, "reasoning": reasoning, "answer": answer}
    changed = {name: pair for name, pair in given.items() if pair is not None}
    for file in files:
        for index, rollout in enumerate(_read(file, errors, strict=strict)):
            try:
                rollout = replace(rollout, tags=replace(rollout.tags, **changed)) if changed else rollout
            except ValueError as error:
                _stop(str(error))
            reason, position = fault(rollout)
            counts[reason] += 1
            if position is not None and len(failures[reason]) < examples:
                failures[reason].append((f"{file}, response {index}", rollout, position))
    total = sum(counts.values())
    well_formed = counts[BrokenReason.NONE]
    out.print(Text(f"{well_formed:,} of {total:,} responses parse ({_percent(well_formed, total)})", style="bold"))
    for reason, meaning in sorted(REASONS.items(), key=lambda item: -counts[item[0]]):
        if counts[reason]:
            line = f"\n{counts[reason]:,}  {reason.name.lower()}: {meaning} ({_percent(counts[reason], total)})"
            out.print(Text(line, style="bold yellow"))
            for place, rollout, position in failures[reason]:
                _print_caret(place, rollout.text, position)
    _finish(errors)


@app.command()
def weights(
    files: Files,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the rollouts with these weights.")
    ] = None,
    strength: Annotated[float, typer.Option(min=0, help="0 is GRPO.")] = _DEFAULT.strength,
    visual_score: Annotated[ContrastKind, typer.Option()] = "log_ratio",
    consistency_score: Annotated[ContrastKind, typer.Option()] = "log_ratio",
    score_clip: Annotated[float, typer.Option(help="Nats.")] = _DEFAULT.score_clip,
    baseline: Annotated[Baseline, typer.Option()] = _DEFAULT.baseline,
    weight_map: Annotated[WeightMap, typer.Option()] = _DEFAULT.weight_map,
    renormalization: Annotated[Renormalization, typer.Option()] = _DEFAULT.renormalization,
    scale: Annotated[Literal["fixed", "batch_rms"], typer.Option(help="batch_rms: of all the files.")] = "fixed",
    visual_scale: Annotated[float, typer.Option(help="Nats, or multiples of the RMS.")] = _DEFAULT.visual_scale,
    consistency_scale: Annotated[float, typer.Option(help="Likewise.")] = _DEFAULT.consistency_scale,
    bound: Annotated[float, typer.Option(help="Nats.")] = _DEFAULT.bound,
    sign: Annotated[Sign, typer.Option()] = _DEFAULT.sign,
    mix: Annotated[float, typer.Option()] = _DEFAULT.mix,
    answer_role: Annotated[Literal["reasoning", "other"], typer.Option()] = _DEFAULT.answer_role,
    strict: Strict = False,
    workers: Workers = _default_workers,
) -> None:
    """Apply options to the recorded log-probs and compare the weights: try settings before training with them."""
    names = set(weights.__annotations__) & set(SRPOConfig.__dataclass_fields__)
    given = locals()
    try:
        options = CreditOptions(SRPOConfig(**{name: given[name] for name in names}), recompute=True)
        before = _summarize(files, CreditOptions(), strict=strict, workers=workers)
        after = _summarize(files, options, strict=strict, workers=workers)
    except ValueError as error:
        _stop(str(error))
    recorded = int(before.columns["recorded"].sum())
    name = "recorded" if recorded == len(before) else "recorded or default" if recorded else "default options"
    _print_comparison({name: before, "these options": after})
    if not after.columns["contrast"].all():
        lacking = int((~after.columns["contrast"]).sum())
        out.print(Text(f"\n{lacking:,} responses have neither log-probs of a second view nor scores: weights 1."))
    if output is not None:
        if any(output.exists() and output.samefile(file) for file in files):
            _stop(f"{output} is one of the files that are read; write to another")
        _write_weights(files, output, after.options)
        out.print(Text(f"\n{output} holds the rollouts with these weights; srpo report reads it."))
    _finish(before.errors, before.malformed)


@app.command()
def doctor() -> None:
    """Say which frameworks are installed, which versions are supported, and what is missing."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "installed", "supported", ""):
        table.add_column(column)
    table.add_row("python", platform.python_version(), ">=3.11", _verdict(sys.version_info >= (3, 11)))
    extras: dict[str, list[Requirement]] = {}
    try:
        needed = [Requirement(line) for line in requires("srpo-core") or []]
    except PackageNotFoundError:
        _stop("srpo-core is not installed, only imported: pip install -e . in the checkout")
    for requirement in needed:
        match = re.search(r"extra == ['\"]([\w-]+)", str(requirement.marker or ""))
        extras.setdefault(match[1] if match else "", []).append(requirement)
    for name, hint in (
        ("", "pip install srpo-core"),
        ("cli", "pip install 'srpo-core[cli]'"),
        ("trl", "for TRL"),
        ("verl", "for verl"),
        ("openrlhf", "for OpenRLHF"),
        ("plot", "for plots"),
    ):
        for requirement in extras.get(name, []):
            table.add_row(*_checked(requirement, hint))
    out.print(table)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, which is fine: the CPU will do"
    out.print(Text(f"\naccelerator: {device}"))
    _check_core()
    out.print(Text("The three trainers exclude one another: one environment each."))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def demo(context: typer.Context) -> None:
    """Train a tiny model with GRPO and with SRPO, side by side; options go to the demo."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "grounding" / "demo.py").exists():
        _stop(
            "the demo is part of the source, not of the installed package: in a checkout of srpo_core run `make demo`, "
            "or `python -m benchmarks.grounding.demo`"
        )
    # -P: of the checkout, not of a folder called benchmarks where the command is run.
    done = subprocess.run([sys.executable, "-P", "-m", "benchmarks.grounding.demo", *context.args], check=False)
    raise typer.Exit(done.returncode)


# Reading


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(what), BarColumn(40), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _summarize(files: list[Path], options: CreditOptions, *, strict: bool, workers: int) -> Summary:
    with _progress("reading") as progress:
        try:
            summary = summarize_files(files, options, strict=strict, workers=workers, progress=progress)
        except RolloutError as error:
            _stop(str(error))
    if not len(summary):
        _name(summary.errors)
        _stop("there are no readable responses in " + ", ".join(map(str, files)))
    return summary


def _read(file: Path, errors: list[RolloutError], *, strict: bool) -> Iterator[Rollout]:
    try:
        yield from read_rollouts(file, on_error=None if strict else errors.append)
    except RolloutError as error:
        _stop(str(error))


def _finish(errors: list[RolloutError], count: int | None = None) -> None:
    """Name the malformed lines; the good ones have been served, but the exit status says that some were not."""
    count = len(errors) if count is None else count
    if not count:
        return
    err.print(Text(f"\n{count:,} malformed {'line' if count == 1 else 'lines'} left out:", style="bold red"))
    _name(errors, "  ")
    if count > _SHOWN_ERRORS:
        err.print(Text(f"  and {count - _SHOWN_ERRORS:,} more"))
    raise typer.Exit(1)


def _name(errors: list[RolloutError], indent: str = "") -> None:
    for error in errors[:_SHOWN_ERRORS]:
        err.print(_safe(f"{indent}{error}"), soft_wrap=True)


def _stop(message: str) -> NoReturn:
    err.print(_safe(f"Error: {message}", style="red"), soft_wrap=True)
    raise typer.Exit(1)


def _write_weights(files: list[Path], output: Path, options: CreditOptions) -> None:
    with output.open("w", encoding="utf-8", errors="replace", newline="\n") as target, _progress("writing") as progress:
        total, done = sum(file.stat().st_size for file in files), 0
        for file in files:
            with file.open("rb") as source:
                while lines := list(islice(source, 256)):
                    done += sum(map(len, lines))
                    good = [(line, rollout) for line in lines if (rollout := _rollout_or_none(line)) is not None]
                    scored = score_rollouts([rollout for _, rollout in good], options)
                    for (line, _), row in zip(good, scored, strict=True):
                        fields = json.loads(line)
                        if len(row.weights):
                            fields |= {"weights": _rounded(row.weights), "scores": _rounded(row.scores)}
                        for name in ("down_divergence", "up_divergence"):  # of steps that the old weights parted
                            fields.pop(name, None)
                        target.write(json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n")
                    progress(done, total)


def _rollout_or_none(line: bytes) -> Rollout | None:
    try:
        return None if line.isspace() else parse_rollout(line)
    except RolloutError:
        return None


def _rounded(values: np.ndarray) -> list[float]:
    return (np.round(values.astype(np.float64), 5) + 0.0).tolist()


# Printing

# What a model writes must not steer the terminal: control characters and those that reorder text are shown, one
# character for one.
_SHOWN_CONTROLS = {code: 0x2400 + code for code in range(32)} | {127: 0x2421}
_SHOWN_CONTROLS |= dict.fromkeys([*range(0x80, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F)], 0xFFFD)
_SHOWN_CONTROLS |= dict.fromkeys([*range(0x2066, 0x206A), 0x061C, 0x2028, 0x2029], 0xFFFD)


def _safe(text: str, style: str = "") -> Text:
    return Text(text.translate({**_SHOWN_CONTROLS, 10: 10}), style=style)


def _theme() -> Theme:
    background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return "light" if background in {"7", "15"} else "dark"


def _rgb(color: Color) -> str:
    return "rgb({},{},{})".format(*color)


def _style(shade: int, theme: Theme) -> Style:
    # Neutral tokens keep the terminal's own colours.
    if shade == REACH:
        return Style()
    return Style(color=_rgb(TEXT[theme]), bgcolor=_rgb(SCALES[theme][shade]))


def heat_text(
    tokens: list[str], values: np.ndarray, *, by: Literal["weight", "score"] = "weight", theme: Theme | None = None
) -> Text:
    """Tokens on the colours of their weights, or of their scores, for ``rich`` to print.

    Args:
        tokens: Texts.
        values: Weights, or scores in nats.
        by: Which of the two.
        theme: Of the terminal; None: from its environment, else dark.

    Example:
        >>> heat_text([" red", " 3"], np.array([1.0, 4.0]), theme="dark").spans
        [Span(4, 6, Style(color=Color('rgb(240,242,245)', ...
    """
    theme = theme or _theme()
    shades = (weight_shade if by == "weight" else score_shade)(values)
    text = Text()
    for token, shade in zip(tokens, shades.tolist(), strict=True):
        style = _style(shade, theme)
        text.append_text(Text(_safe(token.replace("\n", "↵\n")).plain, style=style if style else ""))
    return text


def _legend(by: Literal["weight", "score"]) -> Text:
    values = [0.25, 0.5, 1.0, 2.0, 4.0] if by == "weight" else [-5.0, -1.0, 0.0, 1.0, 5.0]
    labels = [f" {value:g} " for value in values]
    return Text(f"{by}  ").append_text(heat_text(labels, np.array(values), by=by))


def _print_response(scored: ScoredRollout, index: int, *, by: Literal["weight", "score"], table: bool) -> None:
    rollout = scored.rollout
    facts = [f"#{index}"] + ([rollout.id] if rollout.id is not None else [])
    for name in ("step", "group", "reward", "advantage", "reference", "image"):
        if (value := getattr(rollout, name)) is not None:
            facts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    for name, value in (("answer", rollout.is_right), ("perception", rollout.perception_correct)):
        if value is not None:
            facts.append(f"{name} {'right' if value else 'wrong'}")
    out.print(_safe("  ".join(facts), style="bold"))
    if rollout.prompt is not None:
        out.print(_safe(rollout.prompt, style="italic"))
    out.print()
    if len(rollout):
        out.print(
            heat_text(rollout.pieces, scored.weights if by == "weight" else scored.scores, by=by), soft_wrap=False
        )
        out.print(Text("\n").append_text(_legend(by)))
        out.print(_role_table(scored))
    else:
        out.print(_safe(rollout.text))
    reason, position = fault(rollout)
    if scored.broken != BrokenReason.NONE and position is not None and reason != BrokenReason.NONE:
        out.print(Text(f"\nmalformed: {REASONS[reason]}", style="yellow"))
        _print_caret(None, rollout.text, position)
    if table and len(rollout):
        out.print(_token_table(scored))


def _role_table(scored: ScoredRollout) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("", "tokens", "mean weight", "range", "mean score"):
        table.add_column(column, justify="left" if not column else "right")
    for role, name in ROLE_NAMES.items():
        where = scored.roles == int(role)
        if where.any():
            of, scores = scored.weights[where], scored.scores[where]
            spread = f"{of.min():.2f} to {of.max():.2f}"
            table.add_row(name, str(where.sum()), f"{of.mean():.3f}", spread, f"{scores.mean():+.3f} nats")
    return table


def _token_table(scored: ScoredRollout) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("token", "role", "weight", "score"):
        table.add_column(column, justify="left" if column in ("token", "role") else "right")
    for piece, role, weight, score in zip(
        scored.rollout.pieces, scored.roles, scored.weights, scored.scores, strict=True
    ):
        table.add_row(_safe(repr(piece)), Role(role).name.lower(), f"{weight:.3f}", f"{score:+.3f}" if role else "")
    return table


def _print_caret(place: str | None, text: str, position: int) -> None:
    """The line of the text around a character, and a caret below it."""
    room = max(20, min(out.width, 120) - 8)
    start = max(0, min(position - room * 2 // 3, len(text) - room))
    shown = text[start : start + room].translate({**_SHOWN_CONTROLS, 10: ord("↵")})
    before, after = "…" if start else "", "…" if start + room < len(text) else ""
    if place is not None:
        out.print(_safe(f"  {place}, character {position}", style="dim"))
    out.print(Text(f"  {before}{shown}{after}"), no_wrap=True, overflow="ellipsis")
    out.print(Text(" " * (2 + cell_len(before + shown[: position - start])) + "^", style="bold red"), no_wrap=True)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _print_overview(summary: Summary) -> None:
    metrics = summary.metrics()
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("responses", f"{len(summary):,} of {int(summary.columns['tokens'].sum()):,} tokens")
    if "right/fraction" in metrics:
        table.add_row("right answers", _percent(metrics["right/fraction"], 1))
    table.add_row("well-formed", _percent(1 - metrics["broken/fraction"], 1))
    for name in ROLE_NAMES.values():
        of = [metrics[f"weight/{name}/{key}"] for key in ("mass", "mean", "p05", "p95")]
        share = metrics[f"tokens/{name}/fraction"]
        table.add_row(
            name,
            f"{_percent(of[0], 1)} of the weight on {_percent(share, 1)} of the tokens; "
            f"90 % in {of[2]:.2f} to {of[3]:.2f}",
        )
    table.add_row("effective tokens", f"{_percent(metrics['tokens/effective_fraction'], 1)} of the weighted ones")
    if "advantage/cosine" in metrics:
        table.add_row("cosine to GRPO", f"{metrics['advantage/cosine']:.4f}")
    table.add_row("interference", "; ".join(filter(None, interference_in_words(metrics.get("interference")))))
    out.print(table)


def _print_comparison(summaries: dict[str, Summary]) -> None:
    """What the options change; the names are as everywhere, broken up into rows and columns."""
    metrics = {name: summary.metrics() for name, summary in summaries.items()}
    columns = {"mass": "mass", "mean": "mean", "p05": "5 %", "p50": "median", "p95": "95 %", "clipped": "clipped"}

    def table(title: str, prefixes: dict[str, str], keys: list[str]) -> None:
        drawn = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for heading in (title, "", *(columns[key] for key in keys)):
            drawn.add_column(heading, justify="left" if heading in (title, "") else "right")
        for label, prefix in prefixes.items():
            for number, (name, values) in enumerate(metrics.items()):
                cells = [f"{values[at]:.3f}" if (at := f"{prefix}/{key}") in values else "" for key in keys]
                if any(cells):
                    drawn.add_row("" if number else label, name, *cells, style="" if number else "dim")
        out.print(drawn)
        out.print()

    overall = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("", *metrics):
        overall.add_column(heading, justify="right" if heading else "left")
    for label, name in (("cosine to GRPO", "advantage/cosine"), ("effective tokens", "tokens/effective_fraction")):
        overall.add_row(label, *(f"{values[name]:.4f}" if name in values else "" for values in metrics.values()))
    out.print(overall)
    out.print()
    roles = {f"{name}{suffix}": f"{name}{path}" for name in ROLE_NAMES.values() for suffix, path in _ANSWERS.items()}
    table("weight", {label: f"weight/{path}" for label, path in roles.items()}, ["mass", "mean", "p05", "p50", "p95"])
    scores = {name: f"score/{name}" for name in ROLE_NAMES.values()}
    table("score, nats", scores, ["mean", "p05", "p50", "p95", "clipped"])


_ANSWERS = {"": "", ", right answers": "/right", ", wrong answers": "/wrong"}


# Doctor


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
    """One step of the loss on this machine's best device, compared with its value by hand."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    old = torch.tensor([[-0.1, -1.0, -0.5]], device=device)
    roles = torch.tensor([[Role.PERCEPTION, Role.PERCEPTION, Role.REASONING]], device=device)
    log_probs, corrupted = old.clone().requires_grad_(), old - torch.tensor([[2.0, 0.0, 0.0]], device=device)
    mask = torch.ones_like(roles, dtype=torch.bool)
    srpo_loss(log_probs, old, corrupted, None, roles, torch.tensor([3.0], device=device), mask).loss.backward()
    expected = torch.tensor([[-1.8585, -0.5707, -0.5707]], device=device)
    good = log_probs.grad is not None and torch.allclose(log_probs.grad, expected, atol=1e-4)
    out.print(Text(f"the loss on {device}: ").append_text(_verdict(good)))
    if not good:
        raise typer.Exit(1)
