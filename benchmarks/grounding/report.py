"""Results of the demo's runs: summary, tables, learning curves, and rollouts for the ``srpo`` command to show."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.grounding.arms import virtual_step
from benchmarks.grounding.model import TinyVLM
from benchmarks.grounding.train import SRPO, Batch
from benchmarks.grounding.world import EOS, SPLITS, read, reward, to_words
from srpo_core.batch import record
from srpo_core.rollouts import RolloutWriter

COLORS = {"grpo": "#4b5563", "srpo": "#c2410c"}
# Conflict accuracy over five seeds in the pilot: a sister of this world, 100 steps at a learning rate of 3e-4.
PILOT_BEFORE, PILOT = "≈ 0.25", {"grpo": "0.588 ± 0.024", "srpo": "0.588 ± 0.032"}


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The answer accuracies by method and split, and beside them every exact rate and the mean weights."""
    summary: dict[str, Any] = {"methods": {}, "rates": {}, "mean_weights": {}}
    for method in dict.fromkeys(result["method"] for result in results):
        runs = [result for result in results if result["method"] == method]
        rates = {
            split: {time: mean_of([run["rates"][time][split] for run in runs]) for time in ("before", "after")}
            for split in SPLITS
        }
        summary["rates"][method] = rates
        summary["methods"][method] = {
            split: {time: rates[split][time]["answer"] for time in ("before", "after")}
            | {"after_by_seed": [run["rates"]["after"][split]["answer"] for run in runs]}
            for split in SPLITS
        }
        summary["mean_weights"][method] = {
            time: mean_of([run["mean_weights"][time] for run in runs]) for time in ("before", "after")
        }
    return summary


def mean_of(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: mean(table[name] for table in tables) for name in tables[0]}


def accuracy_table(summary: Mapping[str, Any]) -> Table:
    """Answer accuracy on each split, before and after, and the paired difference of SRPO to GRPO."""
    methods = summary["methods"]
    seeds = len(summary["seeds"])
    table = Table(title=f"Answer accuracy, mean of {many_seeds(seeds)} ± standard error", title_justify="left")
    table.add_column("split")
    table.add_column("before", justify="right")
    for method in methods:
        table.add_column(f"{method.upper()} after", justify="right")
    paired = {"grpo", "srpo"} <= methods.keys()
    if paired:
        table.add_column("SRPO - GRPO, paired", justify="right")
    for split in SPLITS:
        by_seed = {method: methods[method][split]["after_by_seed"] for method in methods}
        row = [split, f"{next(iter(methods.values()))[split]['before']:.3f}"]
        row += [with_error(values) for values in by_seed.values()]
        if paired:
            pairs = zip(by_seed["srpo"], by_seed["grpo"], strict=True)
            row.append(with_error([srpo - grpo for srpo, grpo in pairs], sign="+"))
        table.add_row(*row, style="bold" if split == "conflict" else None)
    table.add_section()
    pilot = [PILOT.get(method, "") for method in methods]
    table.add_row("pilot: conflict", PILOT_BEFORE if any(pilot) else "", *pilot, style="dim")
    table.caption = "\n".join(f"{split}: {meaning}" for split, meaning in SPLITS.items())
    table.caption_justify = "left"
    return table


def thinking_table(summary: Mapping[str, Any]) -> Table:
    """Where right and wrong answers on conflict come from."""
    names = {
        "grounded": "grounded (both right)",
        "lucky": "lucky (answer right, perception wrong)",
        "bad_thinking": "bad thinking (perception right, answer wrong)",
        "both_wrong": "both wrong",
        "bias": "answers that follow the shortcut",
        "follows": "answers that follow counts overwritten in the perception",
    }
    rates = summary["rates"]
    table = Table(title="Conflict, by perception and answer", title_justify="left")
    table.add_column("share of responses")
    table.add_column("before", justify="right")
    for method in rates:
        table.add_column(f"{method.upper()} after", justify="right")
    for name, meaning in names.items():
        conflict = [rates[method]["conflict"] for method in rates]
        table.add_row(
            meaning, *(f"{share:.3f}" for share in [conflict[0]["before"][name], *(c["after"][name] for c in conflict)])
        )
    return table


def many_seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def with_error(values: Sequence[float], sign: str = "") -> str:
    error = f" ± {stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.3f}{error}"


def draw_curves(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write conflict accuracy and training reward over steps: each seed thin, the mean thick."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = {"conflict": "accuracy on conflict (greedy)", "reward": "training reward (last 10 steps)"}
    for axes, (quantity, title) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for method in dict.fromkeys(result["method"] for result in results):
            curves = [
                [(point["step"], point[quantity]) for point in result["curve"] if quantity in point]
                for result in results
                if result["method"] == method
            ]
            color = COLORS.get(method)
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=color, alpha=0.25, linewidth=1)
            steps = [step for step, _ in curves[0]]
            means = [mean(value for _, value in points) for points in zip(*curves, strict=True)]
            label = f"{method.upper()}, mean of {many_seeds(len(curves))}"
            marker = "o" if len(steps) == 1 else None  # a line through one point is not seen
            axes.plot(steps, means, color=color, linewidth=2.5, marker=marker, label=label)
        axes.set(title=title, xlabel="step", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)


def write_rollouts(model: TinyVLM, method: SRPO, batch: Batch, path: Path) -> list[str]:
    """Write a batch with its weights for the ``srpo`` command, and return the ids of the specimens that come first.

    Specimens are a right, a lucky and a wrong response, as far as there are any; only they have an id.
    """
    credited = method.credit_of(model, batch)
    down, up = (virtual_step(model, batch, tokens) for tokens in (credited.weights < 1, credited.weights > 1))
    problems, reading = batch.problems, read(batch.token_ids, batch.problems.colors)
    right = reading.answer == problems.answers
    seen = (reading.counts == problems.counts).all(1)
    kinds = {
        "right: perception and answer": right & seen,
        "lucky: wrong perception, right answer": right & ~seen & (reading.counts >= 0).all(1),
        "wrong": ~right & reading.well_formed,
    }
    specimens = {kind: int(found.nonzero()[0, 0]) for kind, found in kinds.items() if found.any()}
    others = [row for row in range(len(batch.token_ids)) if row not in specimens.values()]

    with RolloutWriter(path) as writer:
        for part, ids in ((list(specimens.values()), list(specimens)), (others, None)):
            rows = torch.tensor(part, dtype=torch.long, device=model.device)
            shown, token_ids, mask = problems.rows(rows), batch.token_ids[rows], batch.mask[rows]
            written = record(batch.rollout, credited, advantages=batch.advantages, rows=part)
            written["tokens"] = [spell(to_words(row[real])) for row, real in zip(token_ids, mask, strict=True)]
            sums = zip(shown.counts.tolist(), shown.answers.tolist(), strict=True)
            writer.write(
                **written,
                down_divergence=down[rows],
                up_divergence=up[rows],
                rewards=reward(token_ids, shown),
                correct=right[rows],
                perception_correct=seen[rows],
                finished=(token_ids == EOS).any(1),
                prompts=[" ".join(to_words(question)) for question in shown.questions],
                references=[f"{one} + {two} = {answer}" for (one, two), answer in sums],
                images=list(shown.images),
                ids=ids,
            )
    return list(specimens)


def spell(words: list[str]) -> list[str]:
    """The tokens of a text; a tag's has no space, which would be content of the block beside it."""
    return [word if word.startswith("<") else f" {word}" for word in words]
