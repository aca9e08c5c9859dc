"""Results of the study's runs: paired comparisons, verdicts, tables and learning curves."""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

PRIMARY = "grounded"
GUARD, GUARD_MARGIN = "aligned", 0.01
ENOUGH_SEEDS = 16  # to claim anything
NUMBERS = {
    PRIMARY: "right answers from true perceptions where the shortcut is wrong (greedy), mean over training",
    "conflict": "right answers there, whatever was perceived, mean over training",
    "reward": "training reward, mean over training",
    GUARD: "right answers where the shortcut is right, at the end: the guard",
    "mixture": "right answers on the training mixture, at the end",
    "follows": "answers that follow a perception overwritten by hand, at the end",
}
THRESHOLD = 0.6  # of the training reward, over ten steps
# The Okabe-Ito colors, which differ to every kind of color vision; arms beyond them are left out of the curves.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

Run = Mapping[str, Any]
Row = dict[str, Any]


def tell(world: str, result: Run) -> dict[str, Any]:
    """The numbers of one run that the tables are made of."""
    curve, after = result["curve"], result["rates"]["after"]
    smooth = np.convolve(result["rewards"], np.ones(10) / 10, mode="valid")
    reached = np.flatnonzero(smooth >= THRESHOLD)
    return {
        "world": world,
        "arm": result["method"],
        "learning_rate": result["learning_rate"],
        "seed": result["seed"],
        "conflict": float(np.mean([point["conflict"] for point in curve[1:]])),
        "grounded": float(np.mean([point["grounded"] for point in curve[1:]])),
        "final": {split: round(rates["answer"], 4) for split, rates in after.items()},
        "final_conflict": {rate: round(value, 4) for rate, value in after["conflict"].items()},
        "reward": float(np.mean(result["rewards"])),
        "mixture": after["train"]["answer"],
        "aligned": after["aligned"]["answer"],
        "follows": after["conflict"]["follows"],
        "steps_to_threshold": int(reached[0]) + 10 if len(reached) else len(result["rewards"]),
        "steps": [point["step"] for point in curve],
        "curve": [round(point[PRIMARY], 4) for point in curve],
        "interference": result["interference"],
        "weights": {kind: round(weight, 4) for kind, weight in result["mean_weights"]["before"].items()},
        "step_seconds": round(result["step_seconds"], 4),
        "cpu_seconds": round(result["cpu_seconds"], 1),
    }


def best_rates(runs: Sequence[Run]) -> dict[tuple[str, str], float]:
    """The learning rate of the highest primary number, for each world and arm."""
    means: dict[tuple[str, str], dict[float, float]] = {}
    for run in runs:
        key = run["world"], run["arm"]
        same = [r[PRIMARY] for r in runs if (r["world"], r["arm"], r["learning_rate"]) == (*key, run["learning_rate"])]
        means.setdefault(key, {})[run["learning_rate"]] = float(np.mean(same))
    return {key: max(rates, key=lambda rate: rates[rate]) for key, rates in means.items()}


def interval(differences: Sequence[float], *, draws: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of a mean by resampling the pairs."""
    values = np.asarray(differences)
    rows = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[rows].mean(1), [0.025, 0.975])
    return float(low), float(high)


def placebo_of(arm: str) -> str:
    return f"placebo of {arm}"


def compare(runs: Sequence[Run]) -> list[Row]:
    """A row for each world and arm at its best learning rate, against GRPO and its own placebo at theirs."""
    best = best_rates(runs)
    by_seed: dict[tuple[str, str], dict[int, Run]] = {key: {} for key in best}
    for run in runs:
        if run["learning_rate"] == best[run["world"], run["arm"]]:
            by_seed[run["world"], run["arm"]][run["seed"]] = run
    rows = []
    for (world, arm), mine in by_seed.items():
        row: Row = {
            "world": world,
            "arm": arm,
            "learning_rate": best[world, arm],
            "seeds": len(mine),
            "steps_to_threshold": float(np.median([run["steps_to_threshold"] for run in mine.values()])),
            "step_seconds": float(np.median([run["step_seconds"] for run in mine.values()])),
            "weights": [_mean_of(kind, mine.values()) for kind in ("asked", "not asked")],
        }
        row |= {number: float(np.mean([run[number] for run in mine.values()])) for number in NUMBERS}
        for name, rival in (("grpo", "grpo"), ("placebo", placebo_of(arm))):
            theirs = by_seed.get((world, rival), {})
            seeds = sorted(mine.keys() & theirs.keys())
            if arm != rival and len(seeds) > 1:
                differences = {n: [mine[seed][n] - theirs[seed][n] for seed in seeds] for n in NUMBERS}
                row[f"against {name}"] = {n: (float(np.mean(d)), *interval(d)) for n, d in differences.items()}
        rows.append(row)
    return rows


def _mean_of(kind: str, runs: Iterable[Run]) -> float | None:
    """The mean weight of a kind of token at the warm start, where the arm and the world have one."""
    weights = [run["weights"].get(kind) for run in runs]
    return None if None in weights else float(np.mean(weights))


def verdict(row: Row) -> str:
    """What the plan's rule says of an arm: a gain needs GRPO and the placebo beaten, and the guard held."""
    grpo, placebo = row.get("against grpo"), row.get("against placebo")
    if grpo is None:
        return ""
    if row["seeds"] < ENOUGH_SEEDS:
        return "explored only"
    if grpo[PRIMARY][2] < 0:
        return "worse than GRPO"
    if grpo[PRIMARY][1] <= 0:
        return "no gain"
    if grpo[GUARD][0] < -GUARD_MARGIN:
        return "no gain (guard)"
    if placebo is None:
        return "above GRPO; no placebo"
    return "gain" if placebo[PRIMARY][1] > 0 else "no gain (placebo)"


def table_of(world: str, rows: Sequence[Row]) -> list[list[str]]:
    """The cells of one world's table, best arm first; differences are paired by seed, with 95 % intervals."""
    cells = [
        ["arm", "rate", PRIMARY, "to GRPO", "to its placebo", "verdict", f"{GUARD} to GRPO",
         *(number for number in NUMBERS if number != PRIMARY), f"steps to {THRESHOLD}", "ms a step",
         "weight asked / not"]
    ]  # fmt: skip
    for row in sorted(rows, key=lambda row: -row[PRIMARY]):
        if row["world"] == world:
            grpo, placebo = row.get("against grpo", {}), row.get("against placebo", {})
            cells.append(
                [row["arm"], f"{row['learning_rate']:g}", f"{row[PRIMARY]:.3f}", _signed(grpo.get(PRIMARY)),
                 _signed(placebo.get(PRIMARY)), verdict(row), _signed(grpo.get(GUARD)),
                 *(f"{row[number]:.3f}" for number in NUMBERS if number != PRIMARY),
                 f"{row['steps_to_threshold']:.0f}", f"{1000 * row['step_seconds']:.0f}",
                 " / ".join("-" if weight is None else f"{weight:.2f}" for weight in row["weights"])]
            )  # fmt: skip
    return cells


def _signed(difference: tuple[float, float, float] | None) -> str:
    return "" if difference is None else "{:+.3f} ({:+.3f}, {:+.3f})".format(*difference)


def draw_curves(runs: Sequence[Run], rows: Sequence[Row], arms: Sequence[str], path: Path) -> None:
    """Write the learning curves of some arms, one panel per world: means over seeds and their 95 % intervals."""
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    columns = min(len(worlds), 3)
    lines = -(-len(worlds) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes, world in zip(panels, worlds, strict=False):
        rates = {row["arm"]: row["learning_rate"] for row in rows if row["world"] == world}
        for arm, color in zip(arms, COLORS, strict=False):
            if arm not in rates:
                continue
            mine = [run for run in runs if (run["world"], run["arm"], run["learning_rate"]) == (world, arm, rates[arm])]
            steps, curves = mine[0]["steps"], np.array([run["curve"] for run in mine])
            low, high = np.transpose([interval(point) for point in curves.T])
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(steps, curves.mean(0), color=color, linewidth=2, label=arm)
        axes.set(title=world, xlabel="step", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(worlds) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("grounded accuracy on conflict")
    if panels[0].lines:
        panels[0].legend(frameon=False, fontsize=8)  # the first world has every arm
    figure.savefig(path, dpi=130)


def report(
    name: str,
    runs: Sequence[Run],
    results: Path,
    *,
    descriptions: Mapping[str, str],
    drawn: Sequence[str],
    console: Console,
) -> None:
    """Print the tables; write them, every run's numbers and the learning curves of some arms to `results`."""
    rows, parts = compare(runs), []
    for world in dict.fromkeys(run["world"] for run in runs):
        cells = table_of(world, rows)
        seeds = len({run["seed"] for run in runs if run["world"] == world})
        felt = float(np.mean([run["interference"] for run in runs if run["world"] == world]))
        title = f"{world}: {descriptions[world]}; {seeds} seeds, interference {felt:.2g}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        shown = ("arm", PRIMARY, "to GRPO", "verdict")  # what a terminal has room for
        indices = [cells[0].index(heading) for heading in shown]
        for heading in shown:
            table.add_column(heading, justify="left" if heading in ("arm", "verdict") else "right", no_wrap=True)
        for line in cells[1:]:
            table.add_row(*(line[index] for index in indices), style="bold" if line[0] == "grpo" else None)
        console.print(table)
        lines = ["| " + " | ".join(line) + " |" for line in cells]
        parts.append(f"### {title}\n\n" + "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]))
    results.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    kept = {"versions": versions, "rows": rows, "runs": list(runs)}
    (results / f"{name}.json").write_text(json.dumps(kept, separators=(",", ":")) + "\n")
    (results / f"{name}.md").write_text("\n\n".join(parts) + "\n")
    draw_curves(runs, rows, drawn, results / f"{name}.png")
    console.print(f"Every number: {results / name}.json; tables: .md; learning curves: .png")
