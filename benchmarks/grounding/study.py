"""Does role-aware credit help, when, and why? Every arm on every world, from the same warm starts.

    python -m benchmarks.grounding.study quick       # under ten minutes on two cores
    python -m benchmarks.grounding.study explore     # learning-rate grids, on exploration seeds
    python -m benchmarks.grounding.study confirm     # what plan.md fixed before it was run, on fresh seeds
Runs go to runs/study and are found there again: a command that was stopped goes on where it was. Results are written to
benchmarks/grounding/results/, tables to the terminal and beside them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.grounding.arms import ARMS
from benchmarks.grounding.comparison import report, tell
from benchmarks.grounding.readings import Readings
from benchmarks.grounding.runs import Event, Job, Study, run_jobs
from benchmarks.grounding.train import TrainConfig
from benchmarks.grounding.warm_start import WarmStartConfig
from benchmarks.grounding.world import PriorClash, World

RESULTS = Path(__file__).parent / "results"
TRAIN = TrainConfig(steps=100, prompts=4, group_size=4, updates=1)
LEARNING_RATES = (2.5e-4, 3.5e-4, 5e-4)
EXPLORATION_SEEDS = range(6)
CONFIRMATION_SEEDS = range(100, 116)
EVALUATION, CONFIRMATION_EVALUATION = 256, 512  # problems a split; the learning curve takes half


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
# World -> arm -> its learning rates, fixed before the confirmation (plan.md): the best of the grid in exploration, and
# for GRPO the whole grid, so that it is at its best on the confirmation's own seeds.
CONFIRMATION: dict[str, dict[str, tuple[float, ...]]] = {
    "read": {
        "grpo": LEARNING_RATES,
        "strength 0": (5e-4,),
        "srpo": (5e-4,),
        "placebo of srpo": (5e-4,),
        "srpo x use": (3.5e-4,),
        "placebo of srpo x use": (5e-4,),
        "use": (3.5e-4,),
        "placebo of use": (5e-4,),
        "span use": (3.5e-4,),
        "placebo of span use": (3.5e-4,),
        "oracle, perception": (3.5e-4,),
    },
    "recited": {
        "grpo": LEARNING_RATES,
        "strength 0": (5e-4,),
        "srpo": (5e-4,),
        "placebo of srpo": (5e-4,),
        "srpo x use": (3.5e-4,),
        "placebo of srpo x use": (3.5e-4,),
        "use": (3.5e-4,),
        "placebo of use": (3.5e-4,),
        "span use": (5e-4,),
        "placebo of span use": (5e-4,),
        "oracle, perception": (3.5e-4,),
    },
    "words": {
        "grpo": LEARNING_RATES,
        "strength 0": (5e-4,),
        "srpo": (3.5e-4,),
        "placebo of srpo": (3.5e-4,),
        "srpo x use": (5e-4,),
        "use": (5e-4,),
        "placebo of use": (2.5e-4,),
        "oracle, perception": (3.5e-4,),
    },
}
QUICK_WORLDS = ("read", "words")
QUICK_ARMS = ("grpo", "strength 0", "srpo", "use", "placebo of use", "oracle, perception")
DRAWN = ("grpo", "srpo", "use", "srpo x use", "span use", "placebo of use", "oracle, perception")

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
console = Console()


def study_of(setting: Setting, out: Path, learning_rate: float, evaluation_size: int) -> Study:
    train = replace(setting.train, learning_rate=learning_rate)
    return Study(out, setting.world, setting.warm_start, train, evaluation_size=evaluation_size, evaluate_every=10)


def run_settings(
    settings: Sequence[tuple[str, str, float]], seeds: Sequence[int], *, evaluation_size: int, out: Path, workers: int
) -> list[dict[str, Any]]:
    """What is to be told of each run of (world, arm, learning rate) and seed."""
    jobs = [
        Job(study_of(WORLDS[world], out / world.replace(", ", "-"), rate, evaluation_size), arm, ARMS[arm], seed)
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


Workers = Annotated[int, typer.Option(min=1, help="Processes side by side, one thread each.")]
Out = Annotated[Path, typer.Option(help="Where the runs go.")]
Results = Annotated[Path, typer.Option(help="Where the tables go.")]


@app.command()
def tables(name: Annotated[str, typer.Argument(help="Of the results.")], results: Results = RESULTS) -> None:
    """Print the tables of results that are there."""
    if not (runs := runs_of(name, results)):
        raise typer.BadParameter(f"there is no {results / name}.json", param_hint="name")
    tell_all(name, runs, results)


@app.command()
def explore(
    worlds: Annotated[str, typer.Option(help=f"Separated by ';', of {'; '.join(WORLDS)}; or all.")] = "all",
    arms: Annotated[str, typer.Option(help=f"Separated by ';', of {'; '.join(ARMS)}; or all.")] = "all",
    rates: Annotated[str, typer.Option(help="Learning rates, comma-separated.")] = ",".join(map(str, LEARNING_RATES)),
    seeds: Annotated[int, typer.Option(min=1, help="How many of the exploration seeds.")] = 3,
    name: Annotated[str, typer.Option(help="Of the results.")] = "exploration",
    workers: Workers = 2,
    out: Out = Path("runs/study"),
    results: Results = RESULTS,
) -> None:
    """Run a grid of worlds, arms and learning rates on exploration seeds, and add it to the results of that name."""
    chosen_worlds, chosen_arms = _choose("--worlds", worlds, list(WORLDS)), _choose("--arms", arms, list(ARMS))
    grid = [(world, arm, float(rate)) for world in chosen_worlds for arm in chosen_arms for rate in rates.split(",")]
    runs = run_settings(grid, EXPLORATION_SEEDS[:seeds], evaluation_size=EVALUATION, out=out, workers=workers)
    kept = {which(run): run for run in [*runs_of(name, results), *runs]}
    tell_all(name, sorted(kept.values(), key=lambda run: list(WORLDS).index(run["world"])), results)


@app.command()
def quick(
    seeds: Annotated[int, typer.Option(min=2, help="How many of the exploration seeds.")] = 4,
    workers: Workers = 2,
    out: Out = Path("runs/study"),
    results: Results = Path("runs/study"),
) -> None:
    """Compare the main arms where readings interfere and where nothing does."""
    grid = [(world, arm, CONFIRMATION[world][arm][-1]) for world in QUICK_WORLDS for arm in QUICK_ARMS]
    runs = run_settings(grid, EXPLORATION_SEEDS[:seeds], evaluation_size=EVALUATION, out=out, workers=workers)
    tell_all("quick", runs, results)


@app.command()
def confirm(workers: Workers = 2, out: Out = Path("runs/study"), results: Results = RESULTS) -> None:
    """Run what plan.md says, on seeds that exploration never saw."""
    grid = [(world, arm, rate) for world, arms in CONFIRMATION.items() for arm, rates in arms.items() for rate in rates]
    size = CONFIRMATION_EVALUATION
    runs = run_settings(grid, CONFIRMATION_SEEDS, evaluation_size=size, out=out / "confirmation", workers=workers)
    tell_all("confirmation", runs, results)


def runs_of(name: str, results: Path) -> list[dict[str, Any]]:
    path = results / f"{name}.json"
    return json.loads(path.read_text())["runs"] if path.exists() else []


def which(run: dict[str, Any]) -> tuple[str, str, float, int]:
    return run["world"], run["arm"], run["learning_rate"], run["seed"]


def tell_all(name: str, runs: Sequence[dict[str, Any]], results: Path) -> None:
    report(name, runs, results, descriptions=DESCRIPTIONS, drawn=DRAWN, console=console)


def _choose(option: str, given: str, known: list[str]) -> list[str]:
    names = known if given == "all" else [name.strip() for name in given.split(";")]
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {'; '.join(known)}", param_hint=option)
    return names


if __name__ == "__main__":
    app()
