"""The commands together."""

import typer

from srpo_core.cli.added import add_commands
from srpo_core.cli.demo import demo
from srpo_core.cli.doctor import doctor
from srpo_core.cli.import_ import import_
from srpo_core.cli.reading import TagCommand
from srpo_core.cli.report import report
from srpo_core.cli.segment import segment
from srpo_core.cli.show import show
from srpo_core.cli.weights import weights

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="See where the credit went, in rollouts that any trainer wrote (JSON Lines, one response per line).",
)
for command in (report, show, segment, weights, doctor):
    app.command(cls=TagCommand)(command)
app.command("import", cls=TagCommand)(import_)
# The demo has options of its own, --help among them.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(demo)
add_commands(app)
