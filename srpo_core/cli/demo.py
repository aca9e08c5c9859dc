"""``srpo demo``: a tiny model trained with GRPO and with SRPO."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import typer

from srpo_core.cli.terminal import stop

__all__ = ["demo"]

_NEEDED = {"matplotlib": "matplotlib", "scikit-learn": "sklearn"}  # package -> module; the command itself needs others


def demo(context: typer.Context) -> None:
    """Teach a tiny model to read handwriting with GRPO and with SRPO; `srpo demo --help` lists its options."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "grounding" / "demo.py").exists():
        stop(
            "the demo is part of the source, not of the installed package: in a checkout of srpo_core run `make demo`, "
            "or `python -m benchmarks.grounding.demo`"
        )
    if missing := [package for package, module in _NEEDED.items() if find_spec(module) is None]:
        stop(f"the demo needs {' and '.join(missing)}: in the checkout run `pip install '.[demo]'`")
    # -P: the benchmarks of the checkout, not a folder of that name where the command is run.
    done = subprocess.run([sys.executable, "-P", "-m", "benchmarks.grounding.demo", *context.args], check=False)
    raise typer.Exit(done.returncode)
