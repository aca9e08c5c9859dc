"""Train a tiny vision-language model with GRPO and with SRPO, side by side, and show what each learns.

    python -m benchmarks.grounding.demo

A few minutes on two cores. Everything goes to runs/demo; finished runs are found there and not repeated.
"""

import json
import platform
import shutil
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Generator

from benchmarks.grounding.report import (
    accuracy_table,
    draw_curves,
    summarize,
    thinking_table,
    write_rollouts,
)
from benchmarks.grounding.runs import HELD_OUT, Event, Job, Study, load, result_path, run_all
from benchmarks.grounding.train import METHODS, SRPO, TrainConfig, roll_out
from srpo_core.cli.terminal import heat_text
from srpo_core.report import report_files
from srpo_core.rollouts import read_rollouts, score_rollouts, summarize_files


def main(
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds: each has its own warm start, shared by the methods.")
    ] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a run.")] = TrainConfig.steps,
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
    if fresh and out.exists():
        for part in ("warm_start", "runs"):
            shutil.rmtree(out / part, ignore_errors=True)
    study = Study(out, train=TrainConfig(steps=steps), device=device)
    chosen = {name: replace(METHODS[name], fused=fused) for name in names}
    demonstrate(study, chosen, list(range(seeds)), workers=workers if device == "cpu" else 1, console=Console())


def demonstrate(
    study: Study, methods: dict[str, SRPO], seeds: list[int], *, workers: int, console: Console
) -> dict[str, Any]:
    """Run the methods and write summary, curves, rollouts and heat maps to ``study.out``; return the summary."""
    started = time.time()
    study.out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"[bold]{len(seeds)} warm starts, then {' and '.join(name.upper() for name in methods)} from each[/bold]: "
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
            for who in ("warm start", *methods)
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

        results = run_all(study, methods, seeds, workers=workers, on_event=show)
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
    weighted = {name: method for name, method in methods.items() if not method.options.changes_nothing}
    for name, method in weighted.items():
        explain_weights(study, name, method, summary, console)
    console.print(
        f"\n{summary['seconds']['wall']:.0f} seconds. {', '.join(f'{k} {v}' for k, v in summary['versions'].items())}."
    )
    files = ["summary.json", "learning_curves.png", *(["weights.html", "rollouts.jsonl"] if weighted else [])]
    console.print(f"In {study.out}: {', '.join(files)}, and each run under runs/.")
    if weighted:
        suggest(study.out / "rollouts.jsonl", console)
    return summary


def explain_weights(study: Study, name: str, method: SRPO, summary: dict[str, Any], console: Console) -> None:
    """Print where a method puts its weight, and write rollouts of the first seed's model with their heat maps."""
    for time_, when in (("before", "at the warm start"), ("after", "after training")):
        weights = summary["mean_weights"][name][time_]
        digits, filler = weights["digits"], weights["filler"]
        console.print(
            f"{name.upper()} {when}: a perceived digit has weight {digits:.2f}, a filler word {filler:.2f}: "
            f"[bold]{digits / filler:.1f} times[/bold] as much."
        )
    seed = summary["seeds"][0]
    model = load(study, result_path(Job(study, name, method, seed)).with_suffix(".pt"))
    config = replace(study.train, prompts=4 * study.train.prompts)  # lucky answers are rare
    batch, _ = roll_out(model, study.world, config, Generator().manual_seed(HELD_OUT), step=0)
    rollouts = study.out / "rollouts.jsonl"
    specimens = write_rollouts(model, method, batch, rollouts)
    recorded = summarize_files([rollouts])
    title = f"Which words {name.upper()} gives the credit to"
    report_files(recorded, study.out / "weights.html", sample=len(recorded), title=title)
    console.print("\n[bold]Weights of three responses[/bold] (orange: above 1, blue: below)")
    for scored in islice(score_rollouts(read_rollouts(rollouts)), len(specimens)):
        rollout = scored.rollout
        console.print(f"[bold]{rollout.id}[/bold]   [dim]{rollout.prompt}  truth {rollout.reference}[/dim]")
        console.print(heat_text(rollout.pieces, scored.weights))


def suggest(rollouts: Path, console: Console) -> None:
    """Print commands that show more of these rollouts."""
    command = Path(sys.executable).with_name("srpo")
    command = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    console.print("\nTo see one response token by token, or what other options would make of the weights:")
    for arguments in (f"show {rollouts} --index 0 --table", f"weights {rollouts} --strength 0.5"):
        console.print(f"  {command} {arguments}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
