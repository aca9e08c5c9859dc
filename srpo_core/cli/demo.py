"""``srpo demo``: a tiny model trained with GRPO and with SRPO."""

import subprocess
import sys
from pathlib import Path

import typer

from srpo_core.cli.terminal import stop

__all__ = ["demo"]


def demo(context: typer.Context) -> None:
    """Train a tiny model with GRPO and with SRPO, side by side; options go to the demo."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "grounding" / "demo.py").exists():
        stop(
            "the demo is part of the source, not of the installed package: in a checkout of srpo_core run `make demo`, "
            "or `python -m benchmarks.grounding.demo`"
        )
    # -P: the benchmarks of the checkout, not a folder of that name where the command is run.
    done = subprocess.run([sys.executable, "-P", "-m", "benchmarks.grounding.demo", *context.args], check=False)
    raise typer.Exit(done.returncode)
