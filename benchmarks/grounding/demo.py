"""Teach a tiny vision-language model to read handwriting with GRPO and with SRPO, and show what each learns.

    python -m benchmarks.grounding.demo

A few minutes on two cores. Everything goes to runs/demo; finished runs are found there and not repeated.
"""

import json
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Generator

from benchmarks.grounding.digits import Digits, scans
from benchmarks.grounding.report import (
    accuracy_table,
    conclusions,
    draw_curves,
    draw_example,
    many_seeds,
    summarize,
    write_rollouts,
)
from benchmarks.grounding.runs import HELD_OUT, Event, Job, Study, load, result_path, run_all
from benchmarks.grounding.train import METHODS, SRPO, TrainConfig, roll_out
from benchmarks.grounding.warm_start import WarmStartConfig
from srpo_core.cli.terminal import heat_text, stop
from srpo_core.report import report_files
from srpo_core.rollouts import read_rollouts, score_rollouts, summarize_files

# Stopped when six of ten training pages are read right, so that reading is among the things left to learn. With a
# greater share of shortcuts (0.4) one seed of three that were tried never stopped following the hint.
WARM_START = WarmStartConfig(
    misread=0.2,
    shortcut=0.3,
    shortcut_right=0.6,
    neutral=0.0,
    evidence_weight=4.0,
    stop_at_perception=0.6,
    watched="train",
    max_steps=400,
    learning_rate=5e-3,
)
# GRPO's best rate of 1e-4, 2e-4, 4e-4 and 8e-4 on seeds that the demo does not use; SRPO has the same.
TRAIN = TrainConfig(steps=80, learning_rate=4e-4)


def main(
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds: each has its own warm start, shared by the methods.")
    ] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a run.")] = TRAIN.steps,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Learning rate of every method.")] = TRAIN.learning_rate,
    methods: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(METHODS)}.")] = "grpo,srpo",
    device: Annotated[str, typer.Option(help="cpu, or cuda for one run at a time on a GPU.")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side on the CPU, one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    fused: Annotated[
        bool, typer.Option("--fused", help="Take the loss straight from the hidden states, in one pass.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the results found there.")] = False,
) -> None:
    """Train a tiny VLM with GRPO and SRPO from one warm start per seed, on the reward of the final answer alone."""
    names = [name.strip() for name in methods.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(METHODS)}", param_hint="--methods")
    try:
        scans()
    except ModuleNotFoundError as error:
        stop(str(error))
    if fresh and out.exists():
        for part in ("warm_start", "runs"):
            shutil.rmtree(out / part, ignore_errors=True)
    train = replace(TRAIN, steps=steps, learning_rate=learning_rate)
    study = Study(out, Digits(), WARM_START, train, device=device)
    chosen = {name: replace(METHODS[name], fused=fused, share_prefixes=True) for name in names}
    demonstrate(study, chosen, list(range(seeds)), workers=workers if device == "cpu" else 1, console=Console())


def demonstrate(
    study: Study, methods: dict[str, SRPO], seeds: list[int], *, workers: int, console: Console
) -> dict[str, Any]:
    """Run the methods and write summary, curves, rollouts, heat maps and a picture to ``study.out``.

    Returns:
        The summary, as it is in summary.json.
    """
    started = time.time()
    study.out.mkdir(parents=True, exist_ok=True)
    config = study.train
    console.print(
        "A page holds nine handwritten digits. The question asks for the sum of two, given by their colors, and hints "
        "at a sum that is mostly wrong.\n"
        f"[bold]{many_seeds(len(seeds))}: each has a warm start, then {' and '.join(name.upper() for name in methods)} "
        f"from it[/bold], {config.steps} steps of {config.prompts} x {config.group_size} responses, rewarded for the "
        "final answer only.\n",
        highlight=False,
    )
    results, found = run_with_bars(study, methods, seeds, workers=workers, console=console)
    if found:
        console.print(f"{found} warm starts and runs were found in {study.out}; --fresh repeats them.\n")

    summary = summarize(results)
    draw_curves(results, study.out / "learning_curves.png")
    console.print(accuracy_table(summary["rates"]))
    files = ["summary.json", "learning_curves.png"]
    for name, method in methods.items():
        if not method.options.changes_nothing:
            explain_weights(study, name, method, seeds[0], summary["mean_weights"][name], console)
            made = ("weights.html", "rollouts.jsonl", "example.png")
            files += [file for file in made if (study.out / file).exists()]
    summary |= {
        "conclusions": conclusions(summary["rates"], out=study.out, command=_command("srpo")),
        "seeds": seeds,
        "steps": config.steps,
        "learning_rate": config.learning_rate,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "scikit-learn", "srpo-core")},
        "seconds": {
            "wall": time.time() - started,
            "cpu": {f"{result['method']}-seed{result['seed']}": result["cpu_seconds"] for result in results},
            "found": found,
        },
    }
    (study.out / "summary.json").write_text(json.dumps(summary, indent=1))
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    console.print(f"\n{summary['seconds']['wall']:.0f} seconds. {versions}.", highlight=False)
    console.print(f"In {study.out}: {', '.join(files)}, and each run under runs/.\n", highlight=False)
    for number, sentence in enumerate(summary["conclusions"], 1):
        console.print(f"{number}. {sentence}", markup=False, highlight=False)
    return summary


def run_with_bars(
    study: Study, methods: Mapping[str, SRPO], seeds: list[int], *, workers: int, console: Console
) -> tuple[list[dict[str, Any]], int]:
    """The results of all runs, with a progress bar for each, and how many were found from an earlier call."""
    found = 0
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    labels = {"perception": "read right", "reward": "reward", "conflict": "right answers"}
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = {
            (who, seed): progress.add_task(f"{who}, seed {seed}", start=False, note="", total=study.train.steps)
            for seed in seeds
            for who in ("warm start", *methods)
        }

        def show(event: Event) -> None:
            nonlocal found
            found += event.get("found", False)
            bar = bars[event["who"], event["seed"]]
            progress.start_task(bar)
            notes = progress.tasks[bar].fields.setdefault("values", {}) | {k: event[k] for k in labels if k in event}
            note = "  ".join(f"{label} {notes[key]:.2f}" for key, label in labels.items() if key in notes)
            progress.update(bar, completed=event["step"], total=event["steps"], note=note, values=notes)
            if event["step"] == event["steps"]:
                progress.stop_task(bar)

        return run_all(study, methods, seeds, workers=workers, on_event=show), found


def explain_weights(
    study: Study, name: str, method: SRPO, seed: int, weights: Mapping[str, Mapping[str, float]], console: Console
) -> None:
    """Print where a method puts its weight, and write responses of a seed's trained model to held-out pages."""
    times = {
        when: weights[key]["digits"] / weights[key]["filler"]
        for key, when in (("before", "at the warm start"), ("after", "after training"))
        if {"digits", "filler"} <= weights[key].keys()
    }
    if times:
        factors = " and ".join(f"[bold]{factor:.1f} times[/bold] {when}" for when, factor in times.items())
        console.print(
            f"{name.upper()} gives a digit that was read more weight than the words around it: {factors}.",
            highlight=False,
        )
    model = load(study, result_path(Job(study, name, method, seed)).with_suffix(".pt"))
    config = replace(study.train, prompts=4 * study.train.prompts)  # lucky answers are rare
    generator = Generator().manual_seed(HELD_OUT)
    batch, _ = roll_out(model, study.world, config, generator, step=0, split="conflict")
    rollouts = study.out / "rollouts.jsonl"
    specimens = write_rollouts(model, study.world, method, batch, rollouts)
    recorded = summarize_files([rollouts])
    # As in training, groups whose answers are all right or all wrong are not in it.
    title = f"Which words {name.upper()} gives the credit to, where some answers of a group are right and some wrong"
    report_files(recorded, study.out / "weights.html", sample=len(recorded), title=title)
    scored = list(islice(score_rollouts(read_rollouts(rollouts)), max(len(specimens), 1)))
    if scored:
        draw_example(scored[0], study.out)
    console.print("\n[bold]Typical responses and their weights[/bold] (orange: above 1, blue: below)")
    for each in scored[: len(specimens)]:
        rollout = each.rollout
        console.print(f"[bold]{rollout.id}[/bold]   [dim]{rollout.prompt}  truth: {rollout.reference}[/dim]")
        console.print(heat_text(rollout.pieces, each.weights))


def _command(name: str) -> str:
    """How a command of this environment is called from here."""
    command = Path(sys.executable).with_name(name)
    return str(command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command)


if __name__ == "__main__":
    typer.run(main)
