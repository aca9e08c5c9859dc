"""The ``srpo`` command's entry: it says what to install where the command's own packages are missing."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from srpo_core.commands import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in {"typer", "rich", "packaging"}:
            raise
        sys.exit(f"The srpo command needs {error.name}, which is not installed: pip install 'srpo-core[cli]'")
    app()
