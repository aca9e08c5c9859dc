"""Commands of other packages: found by their entry point, imported when they are run, and missed in one sentence."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import typer
from typer.testing import CliRunner

from srpo_core.cli import added
from srpo_core.cli.added import GROUP, add_commands


def group_of(monkeypatch, **entries):
    """An application with commands of these entry points."""
    points = [EntryPoint(name, value, GROUP) for name, value in entries.items()]
    monkeypatch.setattr(added, "entry_points", lambda group: points if group == GROUP else [])
    app = typer.Typer(add_completion=False)
    app.command()(plain)
    add_commands(app)
    return app


def plain() -> None:
    """A command of its own."""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a command, which says when it is imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, body):
        (tmp_path / f"{name}.py").write_text(body)
        return f"{name}:command"

    yield make
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


COMMAND = """
import typer

def command(file: str, *, perception: str | None = None, loud: bool = typer.Option(False, "--loud", help="Shout.")):
    "Say which file."
    print(file, perception, loud)
"""


def test_add_commands_imports_a_command_only_where_it_is_run(package, monkeypatch):
    app = group_of(monkeypatch, say=package("srpo_saying", COMMAND))
    listed = CliRunner().invoke(app, ["--help"])
    assert listed.exit_code == 0
    assert "say" in listed.output
    assert "A command of srpo_saying." in listed.output
    assert "srpo_saying" not in sys.modules
    said = CliRunner().invoke(app, ["say", "a.jsonl", "--loud", "--perception", "<see>", "</see>"])
    assert (said.exit_code, said.output) == (0, "a.jsonl <see>\0</see> True\n")
    own = CliRunner().invoke(app, ["say", "--help"])
    assert own.exit_code == 0
    assert "Shout." in own.output
    assert CliRunner().invoke(app, ["say"]).exit_code == 2  # the file is missing
    assert CliRunner().invoke(app, ["plain"]).exit_code == 0


def test_a_command_whose_package_is_missing_is_one_sentence(package, monkeypatch):
    value = package("srpo_needy", "import a_package_that_nobody_has.of_models\n")
    result = CliRunner().invoke(group_of(monkeypatch, score=value), ["score", "x"], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert " ".join(result.output.split()) == (
        "Error: srpo score needs a_package_that_nobody_has, which is not installed: pip install '.[needy]' in a "
        "checkout of srpo_core"
    )
    # Something that is wrong inside the package is not the user's to install.
    broken = package("srpo_broken", "import srpo_broken.inner\n")
    result = CliRunner().invoke(group_of(monkeypatch, score=broken), ["score", "x"])
    assert isinstance(result.exception, ModuleNotFoundError)


def test_srpo_score_is_listed_and_needs_transformers():
    code = (
        "import sys; from srpo_core.cli import main; sys.argv[1:] = ['--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('transformers' in sys.modules, 'srpo_hf' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Score the responses of any rollout file" in out
    assert out.splitlines()[-1] == "False False"
