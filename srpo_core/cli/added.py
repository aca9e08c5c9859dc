"""Commands that other installed packages add: each is imported when it is run, not when `srpo` lists it."""

from importlib.metadata import EntryPoint, entry_points

import typer

from srpo_core.cli.reading import TagCommand
from srpo_core.cli.terminal import stop

__all__ = ["GROUP", "add_commands"]

#: The entry points under which a package names its commands: ``score = "srpo_hf.cli:score"``.
GROUP = "srpo.commands"

#: What the list of commands says of those that come with this distribution.
_SUMMARIES = {"score": "Score the responses of any rollout file with a model, in every view."}


def add_commands(app: typer.Typer) -> None:
    """Add the commands of other packages to those of an application."""
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        _add(app, entry)


def _add(app: typer.Typer, entry: EntryPoint) -> None:
    package = entry.module.partition(".")[0]

    def run(context: typer.Context) -> None:
        inner = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)
        try:
            inner.command(entry.name, cls=TagCommand)(entry.load())
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing == package:
                raise
            extra = package.removeprefix("srpo_")
            stop(
                f"srpo {entry.name} needs {missing}, which is not installed: pip install '.[{extra}]' in a checkout of "
                "srpo_core"
            )
        typer.main.get_command(inner)(args=context.args, prog_name=f"srpo {entry.name}")

    # What follows is for the command itself, --help too.
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    help_text = _SUMMARIES.get(entry.name, f"A command of {package}.")
    app.command(entry.name, help=help_text, context_settings=settings)(run)
