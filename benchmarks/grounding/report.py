"""Results of the demo: a table, three sentences, learning curves, rollouts for the ``srpo`` command, a picture."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy.stats import t as student
from torch import Tensor

from benchmarks.grounding.arms import virtual_step
from benchmarks.grounding.digits import GRID, INKS, PATCH, cells_of
from benchmarks.grounding.model import TinyVLM
from benchmarks.grounding.train import SRPO, Batch
from benchmarks.grounding.world import EOS, FIRST_COLOR, P_CLOSE, ZERO, World, read, reward, to_words
from srpo_core.batch import record
from srpo_core.report.colors import SCALES, TEXT, Color, weight_shade
from srpo_core.rollouts import RolloutWriter, ScoredRollout

METHOD_COLORS = {"grpo": "#4b5563", "srpo": "#c2410c"}
# What the table shows: the name of a row, the split that it is measured on, and the rate.
ROWS = {
    "right answers, hint wrong": ("conflict", "answer"),
    "both digits read right, hint wrong": ("conflict", "perception"),
    "right from right readings, hint wrong": ("conflict", "grounded"),
    "answer follows the hint, hint wrong": ("conflict", "bias"),
    "right answers, hint right": ("aligned", "answer"),
    "right answers, page empty": ("blind", "answer"),
}
_ZOOM = 10  # of the images beside the rollouts
_TAGS_IN_WORDS = {"<perception>": "perception", "<think>": "reasoning", "<answer>": "answer"}

# Method, then "before" or "after" training, then split, then rate, to its values by seed.
Rates = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]]


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every rate by seed, and the mean weights, of each method before and after training."""
    summary: dict[str, Any] = {"rates": {}, "mean_weights": {}}
    for method in dict.fromkeys(result["method"] for result in results):
        runs = [result for result in results if result["method"] == method]
        summary["rates"][method] = {
            time: {
                split: {rate: [run["rates"][time][split][rate] for run in runs] for rate in rates}
                for split, rates in runs[0]["rates"][time].items()
            }
            for time in ("before", "after")
        }
        summary["mean_weights"][method] = {
            time: {
                kind: mean(run["mean_weights"][time][kind] for run in runs)
                for kind in ("digits", "filler")
                if all(kind in run["mean_weights"][time] for run in runs)
            }
            for time in ("before", "after")
        }
    return summary


def accuracy_table(rates: Rates) -> Table:
    """Percentages at the warm start and after training with each method."""
    first = next(iter(rates.values()))
    columns = {"warm start": first["before"]} | {name.upper(): by_time["after"] for name, by_time in rates.items()}
    seeds = len(first["before"]["conflict"]["answer"])
    spread = "" if seeds == 1 else " ± standard error"
    title = f"Percent on held-out handwriting, mean of {many_seeds(seeds)}{spread}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, (split, rate) in ROWS.items():
        table.add_row(name, *(with_error(by_split[split][rate]) for by_split in columns.values()))
    return table


def with_error(values: Sequence[float]) -> str:
    """Shares as a percentage, with its standard error where there are several.

    Example:
        >>> with_error([0.5]), with_error([0.4, 0.6])
        ('50.0', '50.0 ± 10.0')
    """
    error = f" ± {100 * stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{error}"


def many_seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


class Difference(NamedTuple):
    """The mean of paired differences, and its 95 % confidence interval by Student's t; NaN where it has none."""

    mean: float
    low: float
    high: float


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """How far values lie above the others of the same seeds.

    Example:
        >>> difference = paired([0.5, 0.7], [0.4, 0.4])  # differences of 0.1 and 0.3, and t is 12.706
        >>> [round(bound, 2) for bound in difference]
        [0.2, -1.07, 1.47]
    """
    differences = [value - other for value, other in zip(values, others, strict=True)]
    middle, n = mean(differences), len(differences)
    if n == 1:
        return Difference(middle, math.nan, math.nan)
    reach = float(student.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)
    return Difference(middle, middle - reach, middle + reach)


def conclusions(rates: Rates, *, out: Path, command: str) -> list[str]:
    """Three sentences: what was learned, whether the methods differ, and what to do next.

    Args:
        rates: Of each method, from :func:`summarize`.
        out: The folder with the files of the demo.
        command: How the ``srpo`` command is called.
    """
    return [what_was_learned(rates), whether_they_differ(rates), what_to_do_next(rates, out, command)]


def what_was_learned(rates: Rates) -> str:
    """How often answers on held-out handwriting are right, and on what right answers rest."""
    changes, grounds = [], []
    for method, by_time in rates.items():
        before, after = (mean(by_time[time]["conflict"]["answer"]) for time in ("before", "after"))
        direction = "rose" if after > before else "fell"
        change = f"stayed at {_percent(after)}"
        if after != before:
            change = f"{direction} from {_percent(before)} to {_percent(after)}"
        changes.append(f"{change} with {method.upper()}")
        if after > 0:
            share = mean(by_time["after"]["conflict"]["grounded"]) / after
            grounds.append(f"{_percent(share)} of {'those' if grounds else 'the right answers'} after {method.upper()}")
    rest = f"; {' and '.join(grounds)} rest on two right readings" if grounds else ""
    return (
        "On handwriting that was never seen in training, with a wrong hint, right answers "
        f"{' and '.join(changes)}{rest}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def whether_they_differ(rates: Rates) -> str:
    """Whether right answers after SRPO and after GRPO differ by more than the seeds do."""
    if not {"grpo", "srpo"} <= rates.keys():
        alone = " and ".join(method.upper() for method in rates)
        return f"Only {alone} was run, and nothing can be compared: `--methods grpo,srpo` runs both."
    srpo, grpo = (rates[method]["after"]["conflict"]["answer"] for method in ("srpo", "grpo"))
    difference = paired(srpo, grpo)
    gap = f"SRPO minus GRPO is {100 * difference.mean:+.1f} percentage points"
    if len(srpo) == 1:
        return f"No difference can be told from 1 seed ({gap}): `--seeds 4` trains four pairs of models."
    seeds = many_seeds(len(srpo))
    interval = f"95 % interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    if difference.low > 0 or difference.high < 0:
        more = "more" if difference.low > 0 else "fewer"
        return (
            f"Here SRPO ends with {more} right answers than GRPO ({gap}, {interval}, paired over {seeds}), "
            "which says nothing about other models or data."
        )
    return f"No difference can be told from {seeds}: {gap}, {interval}, which includes 0."


def what_to_do_next(rates: Rates, out: Path, command: str) -> str:
    """Which file to open, and which command shows more."""
    if "srpo" not in rates:
        return f"Open {out / 'learning_curves.png'} to see how fast each seed learned."
    return (
        f"Open {out / 'weights.html'} in a browser to see which words of a response got the credit, beside the page "
        f"that it read; `{command} show {out / 'rollouts.jsonl'} --index 0 --table` prints one response token by token."
    )


def draw_curves(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write right answers and training reward over steps: each seed thin, the mean thick."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = {
        "conflict": "right answers on held-out handwriting, hint wrong",
        "reward": "right answers in training, mean of 10 steps",
    }
    for axes, (quantity, title) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for method in dict.fromkeys(result["method"] for result in results):
            curves = [
                [(point["step"], point[quantity]) for point in result["curve"] if quantity in point]
                for result in results
                if result["method"] == method
            ]
            color = METHOD_COLORS.get(method)
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=color, alpha=0.25, linewidth=1)
            steps = [step for step, _ in curves[0]]
            means = [mean(value for _, value in points) for points in zip(*curves, strict=True)]
            label = f"{method.upper()}, mean of {many_seeds(len(curves))}"
            marker = "o" if len(steps) == 1 else None  # a line through one point is not seen
            axes.plot(steps, means, color=color, linewidth=2.5, marker=marker, label=label)
        axes.set(title=title, xlabel="training step", ylim=(0, 1))
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def write_rollouts(model: TinyVLM, world: World, method: SRPO, batch: Batch, path: Path) -> list[str]:
    """Write a batch with its weights for the ``srpo`` command, and return the ids of the specimens that come first.

    Specimens are typical responses, as far as there are any; only they have an id.
    """
    credited = method.credit_of(model, batch)
    down, up = (virtual_step(model, batch, tokens) for tokens in (credited.weights < 1, credited.weights > 1))
    problems, reading = batch.problems, read(batch.token_ids, batch.problems.colors)
    right, seen = reading.answer == problems.answers, (reading.counts == problems.counts).all(1)
    specimens = specimens_of(batch, credited.weights)
    others = [row for row in range(len(batch.token_ids)) if row not in specimens.values()]

    with RolloutWriter(path) as writer:
        for part, ids in ((list(specimens.values()), list(specimens)), (others, None)):
            rows = torch.tensor(part, dtype=torch.long, device=model.device)
            shown, token_ids, mask = problems.rows(rows), batch.token_ids[rows], batch.mask[rows]
            words = [to_words(row[real], world.vocabulary) for row, real in zip(token_ids, mask, strict=True)]
            written = record(batch.rollout, credited, advantages=batch.advantages, rows=part)
            written["tokens"] = [spell(response) for response in words]
            writer.write(
                **written,
                down_divergence=down[rows],
                up_divergence=up[rows],
                rewards=reward(token_ids, shown),
                correct=right[rows],
                perception_correct=seen[rows],
                finished=(token_ids == EOS).any(1),
                prompts=[" ".join(to_words(question, world.vocabulary)) for question in shown.questions],
                references=[
                    f"{world.vocabulary[FIRST_COLOR + inks[0]]} {counts[0]} + "
                    f"{world.vocabulary[FIRST_COLOR + inks[1]]} {counts[1]} = {sum(counts)}"
                    for inks, counts in zip(shown.colors.tolist(), shown.counts.tolist(), strict=True)
                ],
                images=[enlarge(image) for image in shown.images],
                ids=ids,
            )
    return list(specimens)


def specimens_of(batch: Batch, weights: Float[Tensor, "batch time"]) -> dict[str, int]:
    """For each kind of response that there is, the row whose two readings have the greatest weight."""
    problems, reading = batch.problems, read(batch.token_ids, batch.problems.colors)
    right, seen = reading.answer == problems.answers, (reading.counts == problems.counts).all(1)
    follows = reading.answer == reading.counts.sum(1)
    hinted = (reading.answer == problems.shortcut) & ~right
    perceived = (batch.token_ids == P_CLOSE).cumsum(1) == 0
    digits = perceived & (batch.token_ids >= ZERO) & (batch.token_ids < ZERO + 10)
    clean = reading.well_formed & (reading.counts >= 0).all(1) & (digits.sum(1) == 2)
    kinds = {
        "right: both digits read right": right & seen,
        "misread: wrong because of a wrong reading": ~right & ~seen & follows & ~hinted,
        "lucky: right answer despite a wrong reading": right & ~seen,
        "hint: both digits read right, but the answer follows the hint": hinted & seen,
    }
    weight = torch.where(digits, weights, 0.0).sum(1)
    return {kind: _greatest(weight, rows & clean) for kind, rows in kinds.items() if (rows & clean).any()}


def _greatest(values: Float[Tensor, " batch"], among: Bool[Tensor, " batch"]) -> int:
    return int(torch.where(among, values, -math.inf).argmax())


def enlarge(image: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 zoomed_height zoomed_width"]:
    return image.repeat_interleave(_ZOOM, 1).repeat_interleave(_ZOOM, 2)


def spell(words: list[str]) -> list[str]:
    """The tokens of a text; a tag's has no space, which would be content of the block beside it."""
    return [word if word.startswith("<") else f" {word}" for word in words]


def draw_example(scored: ScoredRollout, folder: Path) -> None:
    """Draw a page of the digits world, and below it the response with each token in the color of its weight.

    Args:
        scored: A response that :func:`write_rollouts` wrote.
        folder: Where its file is, and where example.png goes.
    """
    rollout = scored.rollout
    pixels = torch.tensor(imread(folder / str(rollout.image)))
    image = pixels[::_ZOOM, ::_ZOOM, :3].permute(2, 0, 1)
    words = [piece.strip() for piece in rollout.pieces]
    weights = scored.weights.tolist()
    figure = Figure(figsize=(9, 6.2), facecolor="white")
    page = figure.add_axes((0.03, 0.36, 0.385, 0.56))
    page.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    page.set(xticks=[], yticks=[])
    figure.text(0.03, 0.955, f"{rollout.prompt}", fontsize=14, family="monospace", va="center")

    asked = (rollout.prompt or "").split()[1:4:2]
    cells = cells_of(image, torch.tensor([INKS.index(ink) for ink in asked])).tolist()
    notes = []
    for ink, cell in zip(asked, cells, strict=True):
        down, right = divmod(cell, GRID)
        x, y = right * PATCH - 0.5, down * PATCH - 0.5
        page.add_patch(Rectangle((x, y), PATCH, PATCH, fill=False, edgecolor="black", linewidth=2, clip_on=False))
        if ink not in words[:-1]:
            notes.append(f"The {ink} digit was not read.")
            continue
        at = words.index(ink) + 1
        label = {"facecolor": _hex(_shade(weights[at])), "edgecolor": "black", "boxstyle": "square,pad=0.2"}
        text = f"{words[at]} × {weights[at]:.1f}"
        page.text(x + PATCH / 2, y, text, fontsize=9, ha="center", va="center", bbox=label, family="monospace")
        notes.append(f"The {ink} digit was read as {words[at]}; this token has weight {weights[at]:.1f}.")
    judged = "right" if rollout.correct else "wrong"
    direction = "likelier" if rollout.advantage is None or rollout.advantage > 0 else "less likely"
    notes = [
        *notes,
        f"The answer is {judged} ({rollout.reference}),\nso training makes the response {direction}.",
        "GRPO would push every token alike.\nSRPO multiplies the push by the token's weight:",
    ]
    figure.text(0.45, 0.91, "\n\n".join(notes), va="top", fontsize=11, linespacing=1.35)
    _draw_scale(figure.add_axes((0.45, 0.56, 0.4, 0.035)))
    figure.text(
        0.45,
        0.485,
        "A word of the perception weighs more if it becomes\nunlikely when the page is hidden; a word of the\n"
        "reasoning, when another perception comes before it.",
        va="top",
        fontsize=11,
        linespacing=1.35,
    )
    _draw_tokens(figure.add_axes((0.03, 0.01, 0.94, 0.30)), words, weights)
    figure.savefig(folder / "example.png", dpi=150)


def _draw_scale(axes: Axes) -> None:
    """The colors of weights from 1/4 to 4."""
    axes.imshow(np.array([SCALES["light"]], dtype=np.uint8), aspect="auto")
    places = weight_shade(np.array([0.25, 0.5, 1.0, 2.0, 4.0]))  # a weight stands where its color is
    axes.set(yticks=[], xticks=places.tolist(), xticklabels=["¼", "½", "1", "2", "4"])
    axes.tick_params(length=0, labelsize=9)


def _draw_tokens(axes: Axes, words: Sequence[str], weights: Sequence[float]) -> None:
    """Tokens in boxes of the color of their weight, one line for each block; characters are one unit wide."""
    axes.set(xlim=(0, 72), ylim=(-6.6, 0.4))
    axes.axis("off")
    for line, (name, places) in enumerate(_blocks(words)):
        x, y = 12.0, -2.2 * line
        axes.text(0, y - 0.45, name, fontsize=10, color="dimgray", va="center")
        for place in places:
            wide = len(words[place]) + 1.0
            color = _hex(_shade(weights[place]))
            axes.add_patch(Rectangle((x, y - 0.95), wide, 1.0, facecolor=color, edgecolor="lightgray", linewidth=0.6))
            middle = x + wide / 2
            axes.text(middle, y - 0.45, words[place], ha="center", va="center", family="monospace", color=_hex(_TEXT))
            axes.text(middle, y - 1.35, f"{weights[place]:.1f}", ha="center", va="center", fontsize=8, color="dimgray")
            x += wide + 0.4


def _blocks(words: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    starts = [place for place, word in enumerate(words) if word in _TAGS_IN_WORDS]
    for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
        yield _TAGS_IN_WORDS[words[start]], list(range(start, end))


_TEXT = TEXT["light"]


def _shade(weight: float) -> Color:
    return SCALES["light"][int(weight_shade(np.array(weight)))]


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
