"""Train a tiny vision-language model with GRPO and with SRPO, side by side, and show what each learns.

    python -m benchmarks.grounding.demo

A few minutes on two cores. Everything goes to runs/demo; finished runs are found there and not repeated.
"""

import json
import platform
import shutil
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.grounding.report import (
    accuracy_table,
    draw_curves,
    find_specimens,
    specimen_text,
    summarize,
    thinking_table,
    write_heat_map,
)
from benchmarks.grounding.runs import HELD_OUT, Event, Study, load, run_all
from benchmarks.grounding.train import METHODS, SRPO, TrainConfig


def main(
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds: each has its own warm start, shared by the methods.")
    ] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a run.")] = TrainConfig.steps,
    methods: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(METHODS)}.")] = "grpo,srpo",
    device: Annotated[str, typer.Option(help="cpu, or cuda for one run at a time on a GPU.")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side on the CPU, one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the results found there.")] = False,
) -> None:
    """Train a tiny VLM with GRPO and SRPO from one warm start a seed, on the reward of the final answer alone."""
    names = [name.strip() for name in methods.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(METHODS)}", param_hint="--methods")
    if fresh and out.exists():
        for part in ("warm_start", "runs"):
            shutil.rmtree(out / part, ignore_errors=True)
    study = Study(out, train=TrainConfig(steps=steps), device=device)
    demonstrate(study, names, list(range(seeds)), workers=workers if device == "cpu" else 1, console=Console())


def demonstrate(study: Study, names: list[str], seeds: list[int], *, workers: int, console: Console) -> dict[str, Any]:
    """Run the methods and write summary, curves and heat map to ``study.out``; return the summary."""
    started = time.time()
    study.out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"[bold]{len(seeds)} warm starts, then {' and '.join(name.upper() for name in names)} from each[/bold]: "
        f"{study.train.steps} steps of {study.train.prompts} x {study.train.group_size} responses, "
        "rewarded for the final answer only\n"
    )
    found = 0
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = {
            (who, seed): progress.add_task(f"{who}, seed {seed}", start=False, note="", total=study.train.steps)
            for seed in seeds
            for who in ("warm start", *names)
        }

        def show(event: Event) -> None:
            nonlocal found
            found += event.get("found", False)
            bar = bars[event["who"], event["seed"]]
            progress.start_task(bar)
            labels = {"perception": "perception", "reward": "reward", "conflict": "conflict accuracy"}
            notes = progress.tasks[bar].fields.setdefault("values", {}) | {k: event[k] for k in labels if k in event}
            note = "  ".join(f"{label} {notes[key]:.2f}" for key, label in labels.items() if key in notes)
            progress.update(bar, completed=event["step"], total=event["steps"], note=note, values=notes)
            if event["step"] == event["steps"]:
                progress.stop_task(bar)

        results = run_all(study, {name: METHODS[name] for name in names}, seeds, workers=workers, on_event=show)
    if found:
        console.print(f"{found} warm starts and runs were found in {study.out}; --fresh repeats them.\n")

    summary = summarize(results) | {
        "seeds": seeds,
        "steps": study.train.steps,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "srpo-core": version("srpo-core"),
        },
        "seconds": {
            "wall": time.time() - started,
            "cpu": {f"{result['method']}-seed{result['seed']}": result["cpu_seconds"] for result in results},
            "found": found,
        },
    }
    (study.out / "summary.json").write_text(json.dumps(summary, indent=1))
    draw_curves(results, study.out / "learning_curves.png")
    console.print(accuracy_table(summary), thinking_table(summary), sep="\n")
    for name in names:
        if isinstance(method := METHODS[name], SRPO) and method.strength > 0:
            explain_weights(study, name, method, summary, console)
    console.print(
        f"\n{summary['seconds']['wall']:.0f} seconds. {', '.join(f'{k} {v}' for k, v in summary['versions'].items())}."
    )
    console.print(f"In {study.out}: summary.json, learning_curves.png, weights.html, and each run under runs/.")
    return summary


def explain_weights(study: Study, name: str, method: SRPO, summary: dict[str, Any], console: Console) -> None:
    """Print where a method puts its weight, and write the heat map of the first seed's trained model."""
    for time_, when in (("before", "at the warm start"), ("after", "after training")):
        weights = summary["mean_weights"][name][time_]
        digits, filler = weights["digits"], weights["filler"]
        console.print(
            f"{name.upper()} {when}: a perceived digit weighs {digits:.2f}, a filler word {filler:.2f}: "
            f"[bold]{digits / filler:.1f} times[/bold] as much."
        )
    seed = summary["seeds"][0]
    model = load(study.out / "runs" / f"{name}-seed{seed}.pt", study.device)
    config = replace(study.train, prompts=6 * study.train.prompts)  # lucky answers are rare
    specimens = find_specimens(model, study.world, method, config, seed=HELD_OUT)
    write_heat_map(specimens, study.out / "weights.html")
    console.print("\n[bold]Weights of three responses[/bold] (orange: above 1, blue: below)")
    for specimen in specimens:
        console.print(specimen_text(specimen), soft_wrap=False)


if __name__ == "__main__":
    typer.run(main)
