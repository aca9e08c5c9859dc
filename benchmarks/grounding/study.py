"""Does role-aware credit help, when, and why? Every arm on every world, from the same warm starts.

    python -m benchmarks.grounding.study quick       # under ten minutes on two cores
    python -m benchmarks.grounding.study explore     # learning-rate grids, on exploration seeds
Runs go to runs/study and are found there again: a command that was stopped goes on where it was. Results are written to
benchmarks/grounding/results/, tables to the terminal and beside them.
"""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.grounding.arms import ARMS
from benchmarks.grounding.readings import Readings
from benchmarks.grounding.runs import Event, Job, Study, run_jobs
from benchmarks.grounding.train import TrainConfig
from benchmarks.grounding.warm_start import WarmStartConfig
from benchmarks.grounding.world import PriorClash, World

RESULTS = Path(__file__).parent / "results"
TRAIN = TrainConfig(steps=100, prompts=4, group_size=4, updates=1)
LEARNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
NUMBERS = {
    "conflict": "conflict, mean over training",
    "reward": "training reward",
    "grounded": "of it with a true perception",
    "mixture": "training mixture at the end",
    "aligned": "aligned at the end",
}
EXPLORATION_SEEDS = range(6)  # 100 and up are for confirmation
PRIMARY = "conflict"  # greedy accuracy where the shortcut is wrong, mean over training
EVALUATION = 256  # problems a split in exploration; the learning curve takes half
THRESHOLD = 0.6  # of the training reward, over ten steps


@dataclass(frozen=True)
class Setting:
    """A world, how its models are brought to their start, and how they are trained."""

    world: World
    warm_start: WarmStartConfig
    train: TrainConfig = TRAIN


TAUGHT = WarmStartConfig(
    misread=0.1,
    shortcut=0.5,
    shortcut_right=0.5,
    neutral=0.0,
    evidence_weight=8.0,
    stop_at_perception=None,
    max_steps=400,
    learning_rate=1e-2,
)
WORLDS = {
    "read": Setting(Readings(relevance="fixed"), TAUGHT),
    "read, asked": Setting(Readings(), replace(TAUGHT, max_steps=1500)),
    "recited": Setting(Readings(others="recited", relevance="fixed"), TAUGHT),
    "words": Setting(Readings(others="words", relevance="fixed"), TAUGHT),
    "ungrounded": Setting(Readings(relevance="fixed"), replace(TAUGHT, shortcut=0.85)),
    "clash": Setting(PriorClash(), WarmStartConfig(), TrainConfig(steps=100)),
    "read, rare": Setting(Readings(relevance="fixed", gauges=16), TAUGHT),
    "read, noisy": Setting(Readings(relevance="fixed", pixel_noise=0.25), TAUGHT),
    "read, long": Setting(Readings(relevance="fixed", filler=8), TAUGHT),
    "read, groups": Setting(Readings(relevance="fixed"), TAUGHT, replace(TRAIN, prompts=2, group_size=8)),
}
DESCRIPTIONS = {
    "read": "irrelevant readings, the same two gauges always asked for",
    "read, asked": "irrelevant readings, the question says which two count",
    "recited": "distractors that do not depend on the image",
    "words": "stray words (null control)",
    "ungrounded": "as read, from a policy that mostly repeats the hint",
    "clash": "prior clash: counting, filler words (null control)",
    "read, rare": "as read, two readings of sixteen count",
    "read, noisy": "as read, more pixel noise",
    "read, long": "as read, 16 words of filler in the reasoning",
    "read, groups": "as read, 2 prompts x 8 responses a step instead of 4 x 4",
}
# World -> arm -> the learning rate that did best in exploration.
QUICK = {
    "read": {"grpo": 5e-4, "strength 0": 5e-4, "srpo": 5e-4, "use": 1e-3, "placebo": 1e-3, "oracle, perception": 1e-3},
    "words": {
        "grpo": 5e-4,
        "strength 0": 5e-4,
        "srpo": 2.5e-4,
        "use": 5e-4,
        "placebo": 5e-4,
        "oracle, perception": 5e-4,
    },
}

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
console = Console()


def study_of(setting: Setting, out: Path, learning_rate: float) -> Study:
    return Study(
        out,
        setting.world,
        setting.warm_start,
        replace(setting.train, learning_rate=learning_rate),
        evaluation_size=EVALUATION,
        evaluate_every=10,
    )


def run_settings(
    settings: Sequence[tuple[str, str, float]], seeds: Sequence[int], *, out: Path, workers: int
) -> list[dict[str, Any]]:
    """Return what is to be told of each run of (world, arm, learning rate) and seed."""
    jobs = [
        Job(study_of(WORLDS[world], out / world.replace(", ", "-"), rate), arm, ARMS[arm], seed)
        for world, arm, rate in settings
        for seed in seeds
    ]
    places = [world for world, _, _ in settings for _ in seeds]
    columns = (TextColumn("{task.description}"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("runs", total=len(jobs))

        def show(event: Event) -> None:
            if event["who"] != "warm start" and event["step"] == event["steps"]:
                progress.advance(bar)

        results = run_jobs(jobs, workers=workers, on_event=show)
    return [tell(place, result) for place, result in zip(places, results, strict=True)]


def tell(world: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of one run that the tables are made of."""
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
        "final": {split: after[split]["answer"] for split in after},
        "final_rates": after["conflict"],
        "before": {split: rate["answer"] for split, rate in result["rates"]["before"].items()},
        "reward": float(np.mean(result["rewards"])),
        "mixture": after["train"]["answer"],
        "aligned": after["aligned"]["answer"],
        "steps_to_threshold": int(reached[0]) + 10 if len(reached) else len(result["rewards"]),
        "curve": [point["conflict"] for point in curve],
        "interference": result["interference"],
        "weights": result["mean_weights"],
        "step_seconds": round(result["step_seconds"], 4),
        "cpu_seconds": round(result["cpu_seconds"], 1),
    }


def best_rates(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Return the learning rate of the highest primary number, for each world and arm."""
    means: dict[tuple[str, str], dict[float, float]] = {}
    for run in runs:
        key = run["world"], run["arm"]
        same = [r[PRIMARY] for r in runs if (r["world"], r["arm"], r["learning_rate"]) == (*key, run["learning_rate"])]
        means.setdefault(key, {})[run["learning_rate"]] = float(np.mean(same))
    return {key: max(rates, key=lambda rate: rates[rate]) for key, rates in means.items()}


def interval(differences: Sequence[float], *, draws: int = 10_000) -> tuple[float, float]:
    """Return the 95 % interval of a mean by resampling the pairs."""
    values = np.asarray(differences)
    rows = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[rows].mean(1), [0.025, 0.975])
    return float(low), float(high)


def compare(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each world and arm at its best learning rate, against GRPO and the placebo at theirs."""
    best = best_rates(runs)
    by_seed: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {key: {} for key in best}
    for run in runs:
        if run["learning_rate"] == best[run["world"], run["arm"]]:
            by_seed[run["world"], run["arm"]][run["seed"]] = run
    rows = []
    for (world, arm), mine in by_seed.items():
        row: dict[str, Any] = {
            "world": world,
            "arm": arm,
            "learning_rate": best[world, arm],
            "seeds": len(mine),
            "steps_to_threshold": float(np.median([run["steps_to_threshold"] for run in mine.values()])),
            "weights": [_mean_of(kind, mine.values()) for kind in ("asked", "not asked")],
        }
        row |= {number: float(np.mean([run[number] for run in mine.values()])) for number in NUMBERS}
        for rival in ("grpo", "placebo"):
            theirs = by_seed.get((world, rival), {})
            seeds = sorted(mine.keys() & theirs.keys())
            if arm != rival and len(seeds) > 1:
                differences = {n: [mine[seed][n] - theirs[seed][n] for seed in seeds] for n in NUMBERS}
                row[f"against {rival}"] = {n: (float(np.mean(d)), *interval(d)) for n, d in differences.items()}
        rows.append(row)
    return rows


def _mean_of(kind: str, runs: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the mean weight of a kind of token at the warm start, where the arm and the world have one."""
    weights = [run["weights"]["before"].get(kind) for run in runs]
    return None if None in weights else float(np.mean(weights))


def table_of(world: str, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the cells of one world's table, best arm first."""
    cells = [
        ["arm", "rate", "seeds", "conflict", *(f"{title}: against GRPO (95 %)" for title in NUMBERS.values()),
         "conflict: against the placebo", f"steps to {THRESHOLD}", "weight asked / not"]
    ]  # fmt: skip
    for row in sorted(rows, key=lambda row: -row[PRIMARY]):
        if row["world"] == world:
            against = [row.get("against grpo", {}).get(number) for number in NUMBERS]
            against.append(row.get("against placebo", {}).get(PRIMARY))
            cells.append(
                [row["arm"], f"{row['learning_rate']:g}", str(row["seeds"]), f"{row[PRIMARY]:.3f}"]
                + ["" if x is None else f"{x[0]:+.3f} ({x[1]:+.3f}, {x[2]:+.3f})" for x in against]
                + [f"{row['steps_to_threshold']:.0f}"]
                + [" / ".join("-" if weight is None else f"{weight:.2f}" for weight in row["weights"])]
            )
    return cells


def report(name: str, runs: Sequence[Mapping[str, Any]], results: Path) -> None:
    """Print the tables, and write them and the runs to `results`."""
    rows, parts = compare(runs), []
    for world in dict.fromkeys(run["world"] for run in runs):
        cells = table_of(world, rows)
        felt = float(np.mean([run["interference"] for run in runs if run["world"] == world]))
        title = f"{world}: {DESCRIPTIONS[world]}; interference {felt:.2g}"
        table = Table(title=title, title_justify="left")
        shown = [0, 1, 3, 4, 9, 10]  # what a terminal has room for
        for index in shown:
            table.add_column(cells[0][index], justify="right" if index else "left", no_wrap=index == 0)
        for line in cells[1:]:
            table.add_row(*(line[index] for index in shown), style="bold" if line[0] == "grpo" else None)
        console.print(table)
        lines = ["| " + " | ".join(line) + " |" for line in cells]
        parts.append(f"### {title}\n\n" + "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]))
    results.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    (results / f"{name}.json").write_text(json.dumps({"versions": versions, "rows": rows, "runs": list(runs)}) + "\n")
    (results / f"{name}.md").write_text("\n\n".join(parts) + "\n")
    console.print(f"Every number: {results / name}.md and .json")


@app.command()
def tables(name: Annotated[str, typer.Argument(help="Of the results.")], results: Path = RESULTS) -> None:
    """Print the tables of results that are there."""
    report(name, json.loads((results / f"{name}.json").read_text())["runs"], results)


@app.command()
def explore(
    worlds: Annotated[str, typer.Option(help=f"Separated by ';', of {'; '.join(WORLDS)}; or all.")] = "all",
    arms: Annotated[str, typer.Option(help=f"Separated by ';', of {'; '.join(ARMS)}; or all.")] = "all",
    rates: Annotated[str, typer.Option(help="Learning rates, comma-separated.")] = ",".join(map(str, LEARNING_RATES)),
    seeds: Annotated[int, typer.Option(min=1, help="How many of the exploration seeds.")] = 4,
    name: Annotated[str, typer.Option(help="Of the results.")] = "exploration",
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side, one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/study"),
    results: Annotated[Path, typer.Option(help="Where the tables go.")] = RESULTS,
) -> None:
    """Run a grid of worlds, arms and learning rates on exploration seeds."""
    chosen_worlds, chosen_arms = _choose("--worlds", worlds, list(WORLDS)), _choose("--arms", arms, list(ARMS))
    grid = [(world, arm, float(rate)) for world in chosen_worlds for arm in chosen_arms for rate in rates.split(",")]
    report(name, run_settings(grid, EXPLORATION_SEEDS[:seeds], out=out, workers=workers), results)


@app.command()
def quick(
    seeds: Annotated[int, typer.Option(min=2, help="How many of the exploration seeds.")] = 4,
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side, one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/study"),
    results: Annotated[Path, typer.Option(help="Where the tables go.")] = Path("runs/study"),
) -> None:
    """Compare the main arms where readings interfere and where nothing does."""
    grid = [(world, arm, rate) for world, rates in QUICK.items() for arm, rate in rates.items()]
    report("quick", run_settings(grid, EXPLORATION_SEEDS[:seeds], out=out, workers=workers), results)


def _choose(option: str, given: str, known: list[str]) -> list[str]:
    names = known if given == "all" else [name.strip() for name in given.split(";")]
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {'; '.join(known)}", param_hint=option)
    return names


if __name__ == "__main__":
    app()
