"""The documentation does what it says: code runs as printed, commands and their options exist, paths and links resolve.

Python blocks of a page run in order, in one namespace and in an empty folder. A ``text`` block directly below one holds
what it prints; ``...`` stands for anything, and spaces do not count. A line ``<!-- needs: trl -->`` above a block says
what it needs beyond the core: such a block is compiled here, and it runs where ``DOCS_HAVE`` names all of it, as in
``DOCS_HAVE="hf" pytest tests/test_docs.py`` inside an adapter's environment.
"""

import contextlib
import doctest
import importlib.util
import io
import json
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest
import torch
import typer
import yaml
from rollout_files import write_rollouts
from typer.testing import CliRunner

from srpo_core.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
HAVE = set(os.environ.get("DOCS_HAVE", "").split())
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
#: What is made by commands or by training, or is a reader's own.
MADE = ("runs/", "outputs/", "completions/", "geo3k/", "docs/_build/", ".venv")

each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


class Fence(NamedTuple):
    """A fenced block of code."""

    line: int  # of its first line of content, from 1
    language: str
    code: str
    needs: frozenset[str]
    follows: bool  # whether only blank lines stand between it and the block before


def fences(page):
    """The fenced blocks of a page; directives and other blocks in braces are not code."""
    found, needs, follows = [], frozenset(), False
    opening = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if opening is not None:
            mark, language, start, content, is_first = opening
            if line.strip() == mark:
                if not language.startswith("{"):
                    found.append(Fence(start, language, "\n".join(content) + "\n", needs, is_first and bool(found)))
                needs, follows, opening = frozenset(), True, None
            else:
                content.append(line)
        elif match := re.match(r"\s*(`{3,}|~{3,})\s*(\S*)", line):
            opening = (match[1], match[2], number + 1, [], follows)
        elif match := re.fullmatch(r"<!-- needs: (.+) -->", line.strip()):
            needs = frozenset(re.split(r",\s*", match[1]))
        elif line.strip():
            assert not needs, f"{page.name}:{number}: a line 'needs' stands directly above its block"
            follows = False
    assert opening is None, f"{page.name}: a block is not closed"
    return found


def blocks(*languages):
    """Parameters: each block in one of these languages."""
    found = [
        pytest.param(page, fence, id=f"{name}:{fence.line}")
        for page, name in zip(PAGES, NAMES, strict=True)
        for fence in fences(page)
        if fence.language in languages
    ]
    return pytest.mark.parametrize(("page", "fence"), found)


# Python


class Printed(doctest.OutputChecker):
    """Whether something was printed as a page says."""

    FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

    def assert_agrees(self, expected, got, where):
        example = doctest.Example("", expected)
        assert self.check_output(expected, got, self.FLAGS), (
            f"{where}\n{self.output_difference(example, got, self.FLAGS)}"
        )


WITH_PYTHON = [page for page in PAGES if any(fence.language == "python" for fence in fences(page))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=[page.relative_to(ROOT).as_posix() for page in WITH_PYTHON])
def test_python_runs_as_printed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    found = fences(page)
    with torch.random.fork_rng():
        for fence, after in zip(found, [*found[1:], None], strict=True):
            if fence.language != "python":
                continue
            where = f"{page}:{fence.line}"
            code = compile("\n" * (fence.line - 1) + fence.code, str(page), "exec")
            if not fence.needs <= HAVE:
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
            if after is not None and after.language == "text" and after.follows:
                Printed().assert_agrees(after.code, printed.getvalue(), where)


def test_the_checker_of_pages_finds_what_is_wrong(tmp_path):
    """A wrong output, an error and a comment in the wrong place are seen, and only below their own block."""
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- needs: a gpu, trl -->\n```python\n1\n```\n\n```text\n2\n```\n\nWords.\n\n```text\n3\n```\n"
        "```{note}\nno code\n```\n"
    )
    assert fences(page) == [
        Fence(3, "python", "1\n", frozenset({"a gpu", "trl"}), False),
        Fence(7, "text", "2\n", frozenset(), True),
        Fence(13, "text", "3\n", frozenset(), False),
    ]
    page.write_text("<!-- needs: trl -->\nWords.\n")
    with pytest.raises(AssertionError, match="directly above its block"):
        fences(page)
    assert is_module("srpo_core.cli") is is_module("benchmarks.nothing") is False
    assert is_module("benchmarks.grounding.demo")
    Printed().assert_agrees("1.5  ...\n", "1.5 seconds\n", "")
    with pytest.raises(AssertionError, match="page"):
        Printed().assert_agrees("1\n", "2\n", "page")


# Commands


def commands(code):
    """The commands of a block of shell, split into words; comments and continued lines are understood."""
    joined = re.sub(r"\\\n\s*", " ", code)
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def options_of(command):
    """The options of a command of ``srpo`` and of those that any command has."""
    found = typer.main.get_command(app).commands[command]
    return {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What commands of the pages read: rollouts, those of the demo and of TRL's example, and a log of TRL."""
    made = tmp_path_factory.mktemp("docs")
    write_rollouts(made / "rollouts.jsonl", steps=2, groups=2, hostile=False, interference=0.2)
    for run in ("demo", "trl-example"):
        (made / "runs" / run).mkdir(parents=True)
        write_rollouts(made / "runs" / run / "rollouts.jsonl", steps=1, hostile=False)
    (made / "outputs/completions").mkdir(parents=True)
    completion = "<perception>two</perception><think>2</think><answer>2</answer>"
    columns = {
        "step": [1, 1],
        "prompt": ["How many?"] * 2,
        "completion": [completion, "2"],
        "accuracy_reward": [1.0, 0.0],
        "format_reward": [1.0, 0.0],
        "advantage": [0.7, -0.7],
    }
    (made / "outputs/completions/completions_00001.jsonl").write_text(
        "".join(json.dumps({name: values[row] for name, values in columns.items()}) + "\n" for row in range(2))
    )
    return made


def check_srpo(words, folder, monkeypatch):
    """Run a command of ``srpo`` in the folder; return what it printed, or None where it is only looked up."""
    command, *arguments = words
    if command == "demo":  # runs for minutes; its options are those of the demo
        module = importlib.import_module("benchmarks.grounding.demo")
        help_text = CliRunner().invoke(_as_app(module.main), ["--help"], env={"COLUMNS": "200"}).output
        assert all(word in help_text for word in arguments if word.startswith("--")), arguments
        return None
    assert command in typer.main.get_command(app).commands
    assert all(word.partition("=")[0] in options_of(command) for word in arguments if re.match(r"--?[a-z]", word))
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, words, env={"COLUMNS": "120"})
    assert result.exit_code == 0, (words, result.output, result.exception)
    return result.output


def _as_app(function):
    made = typer.Typer()
    made.command()(function)
    return made


def is_module(name):
    """Whether ``python -m name`` finds something to run; nothing is imported, because a trainer may be missing."""
    top, *rest = name.split(".")
    found = importlib.util.find_spec(top)
    if found is None or not rest:
        return found is not None
    paths = [Path(place, *rest) for place in found.submodule_search_locations or ()]
    return any(path.with_suffix(".py").is_file() or (path / "__main__.py").is_file() for path in paths)


def check_command(words, folder, monkeypatch):
    """Whether what a line names exists: its program, module, target, extra or file."""
    first, *rest = words
    if first == "srpo":
        return check_srpo(rest, folder, monkeypatch)
    if first == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(target in targets for target in rest if "=" not in target), words
    elif first == "pip":
        check_pip(rest)
    elif first == "python" and rest[:1] == ["-m"]:
        assert is_module(rest[1]), words
    elif first in ("python", "bash", "sh"):
        assert (ROOT / rest[0]).is_file(), words
    else:
        assert re.fullmatch(r"cd|git|source|export|ls|\w+=.*|\.venv\S*/bin/\S+", first), f"unknown command {words}"
    return None


def check_pip(words):
    """The package is on no index: it is installed from a checkout, with extras that there are."""
    assert words[0] in ("install", "show"), words
    if words[0] == "show":
        return
    for word in words[1:]:
        assert not word.startswith(("srpo-core", "srpo_core")), f"not on a package index: {word}"
        if match := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(match[1].split(",")) <= set(EXTRAS), word


@blocks("sh", "bash", "console")
def test_commands_exist_and_run(page, fence, folder, monkeypatch):
    lines = commands(fence.code)
    assert lines
    if fence.needs:
        return
    outputs = [check_command(words, folder, monkeypatch) for words in lines]
    below = next((other for other in fences(page) if other.line > fence.line), None)
    if below is not None and below.language == "text" and below.follows and all(out is not None for out in outputs):
        Printed().assert_agrees(below.code, "".join(outputs), f"{page}:{fence.line}")


@each_page
def test_commands_in_the_text_exist(page):
    """Those between backticks: targets of make, scripts, modules, and commands of srpo with their options."""
    for code in spans(page):
        words = code.split()
        if code.startswith("srpo ") and words[1] not in ("demo", "score"):
            named = re.match(r"[a-z]{3,}$", words[1])
            assert named is None or words[1] in typer.main.get_command(app).commands, code
            if named is not None:
                assert all(word in options_of(words[1]) for word in words[2:] if word.startswith("--")), code
        elif words[:1] == ["make"] and len(words) > 1:
            assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), code
        elif words[:2] == ["pip", "install"]:
            check_pip(shlex.split(code)[1:])
        elif words[:2] == ["python", "-m"] and words[2].startswith(("benchmarks", "srpo_")):
            assert is_module(words[2]), code


# Data, paths and links


@each_page
def test_data_parses(page):
    readers = {"yaml": yaml.safe_load, "json": json.loads, "toml": tomllib.loads}
    for fence in fences(page):
        if fence.language in readers:
            readers[fence.language](fence.code)


@pytest.mark.parametrize("path", sorted((ROOT / "docs/examples").glob("*.y*ml")), ids=lambda path: path.name)
def test_example_configurations_parse(path):
    assert yaml.safe_load(path.read_text())


def prose(page):
    """The page without fenced blocks."""
    return re.sub(r"^(`{3,}|~{3,}).*?^\1\s*$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def spans(page):
    """What stands between backticks, roles aside."""
    return re.findall(r"(?<![}`])`([^`\n]+)`(?!`)", prose(page))


@each_page
def test_paths_that_are_named_exist(page):
    """Of files of this repository: those whose first folder is one of its own."""
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for code in spans(page):
        for word in code.split():
            path = word.strip("\"'(),;").removeprefix("$PWD/")
            is_own = re.fullmatch(r"[\w./-]+", path) and "/" in path and path.split("/")[0] in folders
            if is_own and not path.startswith(MADE):
                assert (ROOT / path).exists(), path


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    titles = [re.sub(r"[`*]", "", title) for title in re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)]
    named = re.findall(r"^\((\S+)\)=$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles} | set(named)


@each_page
def test_links_resolve(page):
    """Relative ones, images included, to files and to the headings in them."""
    text = re.sub(r"(?<!`)`[^`\n]+`", "", prose(page))
    for target in re.findall(r"\]\(<?([^)\s>]+)>?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), target


def test_the_readme_shows_numbers_that_were_measured():
    """Each row of its table of benchmarks is a row of the results, with the columns that it names."""

    def rows(text, first):
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            head, _, *lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table.splitlines()]
            if head[0].startswith(first):
                yield from ({"size": line[0]} | dict(zip(head[1:], line[1:], strict=True)) for line in lines)

    measured = list(rows((ROOT / "benchmarks/results/fused_loss.md").read_text(), "size"))
    shown = list(rows((ROOT / "README.md").read_text(), "size"))
    assert len(shown) >= 3
    for row in shown:
        assert any(row.items() <= other.items() for other in measured), row


def test_every_page_is_reached():
    """From the table of contents of some other page."""
    listed = set()
    for page in PAGES[1:]:
        for body in re.findall(r"^`{3}\{toctree\}\n(.*?)^`{3}", page.read_text(), re.DOTALL | re.MULTILINE):
            names = [line.strip() for line in body.splitlines() if line.strip() and not line.startswith(":")]
            names = [re.sub(r".*<(.*)>", r"\1", name) for name in names]
            listed |= {(page.parent / name).with_suffix(".md").resolve() for name in names}
    assert all(path.exists() for path in listed), [path for path in listed if not path.exists()]
    reached = {ROOT / "README.md", ROOT / "docs/index.md"} | listed
    assert [page for page in PAGES if page not in reached] == []
