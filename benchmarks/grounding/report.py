"""What came of the runs: summary, tables, learning curves, and the weights of three responses as a heat map."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib.image
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text
from torch import Generator, Tensor

from benchmarks.grounding.model import TinyVLM
from benchmarks.grounding.train import SRPO, TrainConfig, roll_out
from benchmarks.grounding.world import SPLITS, PriorClash, read, to_words

COLOURS = {"grpo": "#4b5563", "srpo": "#c2410c"}
# Conflict accuracy over five seeds in the pilot: a sister of this world, 100 steps at a learning rate of 3e-4.
PILOT_BEFORE, PILOT = "≈ 0.25", {"grpo": "0.588 ± 0.024", "srpo": "0.588 ± 0.032"}


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the answer accuracies by method and split, and beside them every exact rate and the mean weights."""
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
    table = Table(title=f"Answer accuracy, mean of {seeds} seeds ± standard error", title_justify="left")
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
            colour = COLOURS.get(method)
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=colour, alpha=0.25, linewidth=1)
            steps = [step for step, _ in curves[0]]
            means = [mean(value for _, value in points) for points in zip(*curves, strict=True)]
            axes.plot(steps, means, color=colour, linewidth=2.5, label=f"{method.upper()}, mean of {len(curves)} seeds")
        axes.set(title=title, xlabel="step", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)


class Specimen(NamedTuple):
    """One response, word by word, with the weight of each word."""

    kind: str
    image: Tensor
    question: str
    truth: str
    words: list[str]
    weights: list[float]


def find_specimens(
    model: TinyVLM, world: PriorClash, method: SRPO, config: TrainConfig, *, seed: int
) -> list[Specimen]:
    """Return one response of each kind that the model gives to a step's prompts: right, lucky, wrong."""
    batch, _ = roll_out(model, world, config, Generator().manual_seed(seed), step=0)
    weights = method.credit(model, batch).weights
    reading = read(batch.token_ids, batch.problems.colours)
    right = reading.answer == batch.problems.answers
    seen = (reading.counts == batch.problems.counts).all(1)
    kinds = {
        "right: perception and answer": right & seen,
        "lucky: wrong perception, right answer": right & ~seen & (reading.counts >= 0).all(1),
        "wrong": ~right & reading.well_formed,
    }
    specimens = []
    for kind, found in kinds.items():
        for row in found.nonzero()[:1, 0].tolist():
            real = batch.mask[row]
            (one, two), answer = batch.problems.counts[row].tolist(), batch.problems.answers[row].item()
            specimens.append(
                Specimen(
                    kind,
                    batch.problems.images[row].cpu(),
                    " ".join(to_words(batch.problems.questions[row])),
                    f"{one} + {two} = {answer}",
                    to_words(batch.token_ids[row][real]),
                    weights[row][real].tolist(),
                )
            )
    return specimens


def tint(weight: float) -> str:
    """Orange above 1, white at 1, blue below, full at 4 and 1/4: weights are ratios, so the scale is logarithmic."""
    share = min(abs(math.log2(max(weight, 1e-6))) / 2, 1.0)
    end = (240, 110, 30) if weight > 1 else (70, 130, 230)
    return "#" + "".join(f"{round(255 + share * (channel - 255)):02x}" for channel in end)


def specimen_text(specimen: Specimen) -> Text:
    """A specimen for the terminal."""
    text = Text(f"{specimen.kind}   ", style="bold")
    text.append(f"{specimen.question}  truth {specimen.truth}\n", style="not bold dim")
    for word, weight in zip(specimen.words, specimen.weights, strict=True):
        text.append(f" {word} ", style=f"not bold black on {tint(weight)}")
    return text


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Token weights of SRPO</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937; }}
article {{ display: flex; gap: 1.5rem; margin: 2rem 0; align-items: flex-start; }}
img {{ width: 192px; height: 192px; image-rendering: pixelated; border-radius: 6px; flex: none; }}
h2 {{ font-size: 1.1rem; margin: 0; }}  p {{ margin: .3rem 0 .8rem; color: #4b5563; }}
.word {{ display: inline-block; padding: 1px 6px; margin: 2px 1px; border-radius: 4px; text-align: center; }}
.word small {{ display: block; font-size: .65rem; line-height: 1; color: #374151; padding-bottom: 2px; }}
</style></head><body>
<h1>Which words SRPO gives the credit to</h1>
<p>The number under a word is its weight: <span class="word" style="background:{high}">4</span> counts four times,
<span class="word" style="background:{one}">1</span> as in GRPO, <span class="word" style="background:{low}">¼</span> a
quarter. Tags always weigh 1. A right answer's advantage is positive and a wrong one's negative: the weight says how
much of it a word gets.</p>
{articles}
</body></html>
"""


def write_heat_map(specimens: Sequence[Specimen], path: Path) -> None:
    """Write one page that needs no other file: the image of each specimen beside its words, tinted by weight."""
    articles = []
    for specimen in specimens:
        picture = io.BytesIO()
        matplotlib.image.imsave(picture, specimen.image.permute(1, 2, 0).numpy(), format="png")
        word = '<span class="word" style="background:{}">{}<small>{:.2f}</small></span>'
        words = "".join(
            word.format(tint(weight), html.escape(text), weight)
            for text, weight in zip(specimen.words, specimen.weights, strict=True)
        )
        articles.append(
            f'<article><img alt="" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"><div>'
            f"<h2>{html.escape(specimen.kind)}</h2>"
            f"<p>{html.escape(specimen.question)} truth: {specimen.truth}</p>{words}</div></article>"
        )
    page = PAGE.format(high=tint(4), one=tint(1), low=tint(0.25), articles="\n".join(articles))
    path.write_text(page, encoding="utf-8")
