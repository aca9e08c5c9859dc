"""``srpo weights``: other options applied to recorded log-probs."""

import json
from dataclasses import Field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import numpy as np
import typer
from rich.text import Text

from srpo_core.checked import OptionError, names_of
from srpo_core.cli.reading import (
    DEFAULT_WORKERS,
    Files,
    Right,
    Strict,
    Workers,
    check_output,
    finish,
    progress_bar,
    scoring,
    summarize,
    with_options,
    with_tags,
    written,
)
from srpo_core.cli.terminal import out, safe, stop, table
from srpo_core.diagnostics import ROLE_NAMES
from srpo_core.options import ContextOptions, CreditOptions
from srpo_core.report.words import origin_of_weights, right_in_words
from srpo_core.rollouts import Rollout, RolloutError, ScoringOptions, Summary, parse_rollout, score_rollouts
from srpo_core.rollouts.lines import is_blank, lines_of, load_json, load_strictly
from srpo_core.rollouts.record import DIVERGENCES
from srpo_core.rollouts.retag import Retag, tags_as_json
from srpo_core.rollouts.scoring import SERVED, UNREAD

__all__ = ["weights"]


def _offered() -> dict[str, tuple[Field[Any], Any]]:
    """The options that can be applied to a file, by name: the field of each, and the type of its values."""
    of_credit = [each.name for each in fields(CreditOptions) if each.name not in UNREAD]
    offered = {}
    for group, names in ((CreditOptions, of_credit), (ContextOptions, ["answer_role"])):
        hints = get_type_hints(group)
        for each in fields(group):
            if each.name in names:
                choices = SERVED.get(each.name) or names_of(hints[each.name])
                offered[each.name] = each, Literal[choices] if choices else hints[each.name]
    return offered


@with_tags
@with_options(_offered())
def weights(
    files: Files,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to which the rollouts are written with these weights.")
    ] = None,
    right: Right = None,
    strict: Strict = False,
    workers: Workers = DEFAULT_WORKERS,
    tags: Retag,
    **chosen: Any,
) -> None:
    """Apply other options to the recorded log-probs and compare the weights, before training with them.

    With `--scale batch_rms` all files together are the batch.
    """
    if output is not None:
        check_output(output, files)
    answer_role, recorded = chosen.pop("answer_role"), scoring(right, tags)
    try:
        options = replace(recorded, config=CreditOptions(**chosen), answer_role=answer_role, recompute=True)
        before = summarize(files, recorded, strict=strict, workers=workers)
        after = summarize(files, options, strict=strict, workers=workers)
    except OptionError as error:
        stop(error.worded(written))
    except ValueError as error:
        stop(str(error))
    if not after.columns["weighed"].any():
        told = f"no response in {', '.join(map(str, files))} has log-probs of a second view or scores"
        stop(f"{told}, so that no weights can be computed; add them with `srpo score`")
    name = {"recorded": "recorded", "partly recorded": "recorded or default"}.get(
        origin_of_weights(before), "default options"
    )
    _print_comparison({name: before, "these options": after})
    if lacking := int((~after.columns["contrast"]).sum()):
        out.print(
            Text(
                f"\n{lacking:,} {'response has' if lacking == 1 else 'responses have'} neither log-probs of a second "
                "view nor scores, and no part in the figures."
            )
        )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        _write_weights(files, output, after.options)
        out.print(safe(f"\n{output} holds the rollouts with these weights; srpo report reads it."))
    finish(before.errors, before.malformed)


def _write_weights(files: list[Path], output: Path, options: ScoringOptions) -> None:
    with (
        output.open("w", encoding="utf-8", errors="replace", newline="\n") as target,
        progress_bar("writing") as progress,
    ):
        total, done = sum(file.stat().st_size for file in files), 0
        for file in files:
            with file.open("rb") as source:
                found = lines_of(source)
                while taken := list(islice(found, 256)):
                    lines, done = [line for line, _ in taken], done + sum(length for _, length in taken)
                    good = [(line, rollout) for line in lines if (rollout := _rollout_or_none(line)) is not None]
                    scored = score_rollouts([rollout for _, rollout in good], options)
                    for (line, _), row in zip(good, scored, strict=True):
                        values = load_strictly(line, load_json)
                        if options.tags:  # what the trainer found with its own tags is left out
                            values["tags"] = tags_as_json(row.rollout.tags)
                            for name in ("roles", "broken", "scores"):
                                values.pop(name, None)
                        values.pop("weights", None)
                        if row.has_weights and len(row.weights):
                            values["weights"] = _rounded(row.weights)
                            if len(row.known_scores) == len(ROLE_NAMES):
                                values["scores"] = _rounded(row.scores)
                        for name in DIVERGENCES:  # they belong to two steps that the old weights defined
                            values.pop(name, None)
                        target.write(json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n")
                    progress(done, total)


def _rollout_or_none(line: bytes) -> Rollout | None:
    try:
        return None if is_blank(line) else parse_rollout(line)
    except RolloutError:
        return None


def _rounded(values: np.ndarray) -> list[float]:
    return (np.round(values.astype(np.float64), 5) + 0.0).tolist()


# What follows the name of a role in a row, and in the name of a metric.
_ANSWERS = {"": "", ", right answers": "/right", ", wrong answers": "/wrong"}
_HEADINGS = {"mass": "mass", "mean": "mean", "p05": "5 %", "p50": "median", "p95": "95 %", "clipped": "clipped"}


def _print_comparison(summaries: dict[str, Summary]) -> None:
    """Print what the options change: the metrics of both summaries, one below the other."""
    metrics = {name: summary.metrics() for name, summary in summaries.items()}

    def compare(title: str, prefixes: dict[str, str], keys: list[str]) -> None:
        rows = table(title, "", *(_HEADINGS[key] for key in keys), left=2)
        for label, prefix in prefixes.items():
            for number, (name, values) in enumerate(metrics.items()):
                cells = [f"{values[at]:.3f}" if (at := f"{prefix}/{key}") in values else "-" for key in keys]
                if any(f"{prefix}/{key}" in each for key in keys for each in metrics.values()) or "," not in label:
                    rows.add_row("" if number else label, name, *cells, style="" if number else "dim")
        out.print(rows)
        out.print()

    overall = table("", *metrics)
    for label, name in (("similarity to GRPO", "advantage/cosine"), ("effective tokens", "tokens/effective_fraction")):
        overall.add_row(label, *(f"{values[name]:.4f}" if name in values else "-" for values in metrics.values()))
    out.print(overall)
    out.print(safe(f"right: {right_in_words(next(iter(summaries.values())))}", style="dim"))
    out.print()
    roles = {f"{name}{suffix}": f"{name}{path}" for name in ROLE_NAMES.values() for suffix, path in _ANSWERS.items()}
    compare("weight", {label: f"weight/{path}" for label, path in roles.items()}, ["mass", "mean", "p05", "p50", "p95"])
    compare(
        "score, nats", {name: f"score/{name}" for name in ROLE_NAMES.values()}, ["mean", "p05", "p50", "p95", "clipped"]
    )
