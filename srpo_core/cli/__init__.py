"""The ``srpo`` command. If packages of its own are missing, it says in one sentence how to install them."""

import sys

__all__ = ["main"]

_NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command line. Without typer and rich only ``srpo doctor`` runs."""
    try:
        from srpo_core.cli.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _NEEDED:
            raise
        from srpo_core.cli.checks import COMMAND_HINT, plain_doctor

        if sys.argv[1:] == ["doctor"]:
            sys.exit(plain_doctor(missing))
        sys.exit(
            f"The srpo command needs {missing}, which is not installed: {COMMAND_HINT}. "
            "Until then only `srpo doctor` works."
        )
    app()
