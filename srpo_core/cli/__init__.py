"""The ``srpo`` command. Where its own packages are missing, it says what to install."""

import sys

__all__ = ["main"]

_NEEDED = ("typer", "rich", "packaging")


def main() -> None:
    """Run the command line."""
    try:
        from srpo_core.cli.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _NEEDED:
            raise
        sys.exit(f"The srpo command needs {missing}, which is not installed: pip install 'srpo-core[cli]'")
    app()
