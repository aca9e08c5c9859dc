"""Every command on a good file and on a malformed one; what a model writes steers neither page nor terminal."""

import html.parser
import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from helpers import another_value
from rollout_files import COMMANDS, HOSTILE, add_malformed, srpo, write_rollouts

from srpo_core import ContextOptions, CreditOptions
from srpo_core.cli import checks as checks_module
from srpo_core.cli import demo, terminal
from srpo_core.cli import weights as weights_module
from srpo_core.cli.app import app
from srpo_core.cli.checks import checks, loss_is_right, plain_doctor
from srpo_core.cli.terminal import heat_text
from srpo_core.formats import PUBLISHED
from srpo_core.report import answers, report_rollouts
from srpo_core.report.colors import REACH, SCALES, TEXT
from srpo_core.rollouts import Rollout, RolloutWriter, ScoringOptions, read_rollouts, summarize_files
from srpo_core.rollouts.scoring import UNREAD


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """Lines are not wrapped."""
    monkeypatch.setattr(terminal.out, "width", 200)
    monkeypatch.setattr(terminal.err, "width", 200)


@pytest.fixture
def file(tmp_path):
    return write_rollouts(tmp_path / "rollouts.jsonl")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_good_file_is_served(command, file):
    result = srpo(*COMMANDS[command](file))
    assert result.stdout
    assert "malformed line" not in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_malformed_lines_are_named_and_the_others_served(command, file):
    first, last = add_malformed(file)
    result = srpo(*COMMANDS[command](file), code=1)
    assert f"{file}, line {first}: not JSON:" in result.stderr
    if command == "show":  # reads no further than what it shows, and so meets the first one only
        assert "1 malformed line left out" in result.stderr
    else:
        assert f"{file}, line {last}: 'log_probs' is not a field of a rollout" in result.stderr
        assert "2 malformed lines left out" in result.stderr
    # The output is that of a file without the malformed lines.
    lines = file.read_text(encoding="utf-8").split("\n")
    file.write_text("\n".join(line for number, line in enumerate(lines, 1) if number not in (first, last)), "utf-8")
    assert without_size(srpo(*COMMANDS[command](file)).stdout) == without_size(result.stdout)


def without_size(output):
    """A page that names malformed lines is a little larger."""
    return [line for line in output.split("\n") if not line.endswith(" MB)")]


@pytest.mark.parametrize("command", COMMANDS)
def test_strict_stops_at_the_first_one(command, file):
    first, _ = add_malformed(file)
    result = srpo(*COMMANDS[command](file), "--strict", code=1)
    assert f"Error: {file}, line {first}: not JSON:" in result.stderr
    assert result.stdout == ""
    assert not file.with_suffix(".html").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_with_nothing_to_read_is_an_error(command, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert f"there are no readable responses in {empty}" in srpo(*COMMANDS[command](empty), code=1).stderr
    empty.write_text('{"token": []}')
    assert f"{empty}, line 1: 'token' is not a field" in srpo(*COMMANDS[command](empty), code=1).stderr
    missing = tmp_path / "missing.jsonl"
    assert "does not exist" in srpo(*COMMANDS[command](missing), code=2).output
    assert "is a folder; name the rollout files in it" in srpo(*COMMANDS[command](tmp_path), code=2).output
    empty.write_text('[{"tokens": ["a"]}]')
    stderr = srpo(*COMMANDS[command](empty), code=1).stderr
    assert f"this is one JSON array, and a rollout file has one object a line; srpo import {empty}" in stderr
    srpo("import", empty, "-o", tmp_path / "new.jsonl")  # the remedy that it names
    assert [rollout.text for rollout in read_rollouts(tmp_path / "new.jsonl")] == ["a"]


@pytest.mark.parametrize("command", ["report", "weights"])
def test_a_folder_is_made_and_no_file_that_is_read_is_written_over(command, file):
    before = file.read_bytes()
    output = file.parent / "missing" / "folder" / "output"
    srpo(command, file, "-o", output)
    assert output.stat().st_size > 1000
    for wrong, words in ((file, "is one of the files that are read"), (file.parent, "is a folder; name a file")):
        stderr = srpo(command, file, "-o", wrong, code=1).stderr
        assert stderr.startswith(f"Error: --output {wrong} {words}")
        assert stderr.count("\n") == 1
    assert file.read_bytes() == before
    (file.parent / "plain").write_text("")
    assert "cannot be written" in srpo("report", file, "-o", file.parent / "plain" / "r.html", code=1).stderr


def test_the_report_says_what_it_shows(file):
    page = file.with_suffix(".html")
    output = srpo("report", file, "-o", page, "--sample", "10", "--title", "Run <7>").stdout
    tokens = sum(len(rollout) for rollout in read_rollouts(file))
    assert f"46, with {tokens} tokens; 2 have neither weights nor scores nor the log-probs of a second view" in output
    assert "of the tokens with a role" in output
    assert "perception = <perception> ... </perception>, reasoning = <think> ... </think>, answer = " in output
    for answer in answers(summarize_files([file])):
        assert answer.question in output
        assert answer.sentence in " ".join(output.split())  # lines are wrapped
    assert "of 11 images were not found: " in srpo("report", file, "-o", page).stdout
    srpo("report", file, "-o", page, "--sample", "10", "--title", "Run <7>")
    data = data_of(page)
    assert data["counts"]["responses"] == 46
    assert data["sample"]["shown"] == len(data["rows"]) == 10
    assert "<title>Run &lt;7&gt;</title>" in page.read_text()
    assert data["metrics"]["weight/perception/mean"] > 0


@pytest.mark.parametrize(
    ("interference", "words"),
    [
        (None, "not measured: srpo_core.diagnostics.interference says how"),
        (0.0, "0; below 0.1, stay with GRPO: "),
        (0.0004, "< 0.001; below 0.1, stay with GRPO: "),
        (0.1001, "0.1; weights may matter here: "),
        (2.0, "2; weights may matter here: "),
    ],
)
def test_the_report_says_whether_weights_can_matter(tmp_path, interference, words):
    file = write_rollouts(tmp_path / "rollouts.jsonl", interference=interference)
    output = srpo("report", file, "-o", tmp_path / "report.html").stdout
    line = next(line for line in output.split("\n") if line.startswith("interference"))
    assert line.removeprefix("interference").strip().startswith(words)
    data = data_of(tmp_path / "report.html")
    figure, _, advice = words.rpartition("; ")
    assert data["interference"]["figure"] == figure
    assert data["interference"]["advice"].startswith(advice)
    assert data["interference"]["responses"] == (0 if interference is None else 36)


def test_an_endless_interference_is_shown(tmp_path):
    line = {
        "tokens": ["a"],
        "roles": "P",
        "broken": "none",
        "weights": [2],
        "down_divergence": [1],
        "up_divergence": [0],
    }
    (tmp_path / "r.jsonl").write_text(json.dumps(line))
    output = srpo("report", tmp_path / "r.jsonl", "-o", tmp_path / "r.html").stdout
    assert "∞; weights may matter here" in output
    assert data_of(tmp_path / "r.html")["interference"]["figure"] == "∞"


def data_of(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


class Elements(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_report_rollouts_lets_no_response_inject_markup(tmp_path):
    """With hostile text in every field the page has the same elements as without."""

    def elements(texts):
        tags = ("<perception>", "</perception>")
        rollouts = [
            Rollout(
                text=tags[0] + text + tags[1],
                starts=np.array([0, 12, 12 + len(text)]),
                ends=np.array([12, 12 + len(text), 25 + len(text)]),
                **dict.fromkeys(("prompt", "reference", "image", "id", "group"), text),
                extra={text: text},
            )
            for text in texts
        ]
        report_rollouts(rollouts, tmp_path / "page.html")
        parser = Elements()
        parser.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
        return [(tag, attributes) for tag, attributes in parser.found], data_of(tmp_path / "page.html")

    plain, _ = elements(["cat"] * len(HOSTILE))
    hostile, data = elements([*HOSTILE[:-1], "\ud800"])
    assert hostile == plain
    assert [tag for tag, _ in hostile].count("script") == 2
    assert not [a for _, attributes in hostile for a in attributes if a.startswith("on") or a in ("src", "href")]
    assert [row["tokens"][1] for row in data["rows"]] == [*HOSTILE[:-1], "?"]


def test_report_files_stays_small_and_says_so(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        for row in pixels:
            writer.write([["word "] * 900], images=[Image.fromarray(row)])
    srpo("report", tmp_path / "r.jsonl", "-o", tmp_path / "r.html", "--max-megabytes", "0.5")
    assert 250_000 < (tmp_path / "r.html").stat().st_size < 500_000
    sample = data_of(tmp_path / "r.html")["sample"]
    assert 0 < sample["shown"] < 40
    assert sample["shown"] + sample["tooLarge"] == sample["total"] == 40
    assert sample["images"] > 0
    assert sample["images"] + sample["imagesLeftOut"] == sample["shown"]


def test_only_images_are_embedded(tmp_path):
    (tmp_path / "secret.txt").write_text("password")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "drawing.svg").write_text("<svg onload='alert(1)'/>")
    names = ["secret.txt", "torn.png", "drawing.svg", "absent.png", "\0"]
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        writer.write([["a"]] * len(names), images=names)
    srpo("report", tmp_path / "r.jsonl", "-o", tmp_path / "r.html")
    data = data_of(tmp_path / "r.html")
    assert data["images"] == {}
    assert data["sample"]["imagesMissing"] == len(names)
    told = data["missingImages"]
    assert re.search("3 (of 5 images )?were not readable as PNG, JPEG, GIF or WebP: ", told)
    assert re.search("2 (of 5 images )?were not found: ", told)
    assert all(name in told for name in names)


def test_show_has_the_text_its_weights_and_its_facts(file):
    output = srpo("show", file, "--index", "1", "--table").stdout
    (_, rollout, *_) = read_rollouts(file)
    assert rollout.text in output
    assert "how many?" in output
    assert "perception " in output
    assert output.count("reasoning") >= 4
    broken = srpo("show", file, "--index", "36").stdout
    assert "malformed: a block opens inside another" in broken
    stderr = srpo("show", file, "--index", "46", code=1).stderr
    assert f"there is no response 46 in {file}: --index must be at most 45" in stderr
    assert srpo("show", file, "--index", "45").stdout


def test_the_terminal_shows_the_colors_of_the_page():
    text = heat_text(["a", "b", "c"], np.array([1.0, 4.0, 0.25]), theme="light")
    assert text.plain == "abc"
    styles = {span.start: span.style for span in text.spans}
    assert 0 not in styles  # the middle keeps the terminal's own colors
    for start, shade in ((1, 2 * REACH), (2, 0)):
        assert styles[start].bgcolor.triplet == SCALES["light"][shade]
        assert styles[start].color.triplet == TEXT["light"]


def test_no_text_steers_the_terminal(file):
    for index in range(38, 46):
        for by in ("weight", "score"):
            output = srpo("show", file, "--index", str(index), "--by", by, "--table").stdout
            assert not set(output) & {"\x1b", "\x07", "\r", "\u202e", "\u2028"}
            if index == 42:
                assert "\\u2028\\u2029\\u202eevil\\u202c" in output
    assert "[bold red]markup[/bold red]" in srpo("show", file, "--index", "43").stdout


def test_segment_points_at_the_fault(tmp_path):
    responses = {
        "unclosed": "<perception>a",
        "stray_close": "<perception>a</perception></think>",
        "crossed": "<perception>猫\n<think>b</perception></think>",
    }
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        writer.write([[text] for text in responses.values()])
    lines = srpo("segment", tmp_path / "r.jsonl").stdout.split("\n")
    assert lines[0] == "0 of 3 responses are well-formed (0.0 %)"
    for reason, column in (("unclosed", 0), ("stray_close", 26), ("crossed", 22)):
        at = next(number for number, line in enumerate(lines) if f"  {reason}: " in line)
        wide = 1 if reason == "crossed" else 0  # the caret stands under what a wide character shifts
        assert lines[at + 3].index("^") == 2 + column + wide
    other = ["--perception", "<d>", "</d>", "--reasoning", "<perception>", "</perception>"]
    assert "no_perception" in srpo("segment", tmp_path / "r.jsonl", *other).stdout
    same = srpo("segment", tmp_path / "r.jsonl", "--perception", "<think>", "</think>", code=1)
    assert "each tag must mean one thing" in same.stderr


def test_weights_tries_options_on_recorded_log_probs(tmp_path):
    file = write_rollouts(tmp_path / "rollouts.jsonl", interference=0.5)
    output = srpo("weights", file, "--strength", "0", "-o", file.with_name("new.jsonl")).stdout
    lines = output.split("\n")
    before = next(number for number, line in enumerate(lines) if line.startswith("perception, right answers"))
    assert lines[before].split()[-1] > "1.000"
    assert lines[before + 1].split() == ["these", "options", "-", "1.000", "1.000", "1.000", "1.000"]
    new = list(read_rollouts(file.with_name("new.jsonl")))
    assert len(new) == 46
    assert sum(rollout.weights is None for rollout in new) == 2  # of those nothing says what they are
    assert all((rollout.weights == 1).all() for rollout in new if rollout.weights is not None)
    assert [rollout.text for rollout in new] == [rollout.text for rollout in read_rollouts(file)]
    # The two divergences were taken with the old weights, and say nothing of new ones.
    assert all(rollout.down_divergence is None for rollout in new)
    # The new file is compared with what it records.
    assert "recorded" in srpo("weights", file.with_name("new.jsonl")).stdout
    assert "2 responses have neither log-probs of a second view nor scores" in output


def offered():
    """The command's options of weights, as its parser knows them."""
    known = {parameter.name: parameter for parameter in typer.main.get_command(app).commands["weights"].params}
    others = {"files", "output", "right", "strict", "workers", "format", "perception", "reasoning", "answer"}
    return {name: known[name] for name in known.keys() - others}


def test_the_options_of_weights_are_those_of_the_dataclass():
    groups = {each.name: each for each in fields(CreditOptions)} | {
        each.name: each for each in fields(ContextOptions) if each.name == "answer_role"
    }
    assert offered().keys() == groups.keys() - set(UNREAD)
    for name, option in offered().items():
        each = groups[name]
        assert option.opts == ["--" + name.replace("_", "-")]
        assert option.default == each.default
        assert option.help.startswith(each.metadata["help"])
        assert str(each.metadata["range"]) in option.help


def test_options_of_weights_reach_the_weights(file, monkeypatch):
    seen = []

    def summarize(files, options, *, strict, workers):
        seen.append(options)
        if options.recompute:
            raise ValueError("seen enough")

    monkeypatch.setattr(weights_module, "summarize", summarize)
    for name in offered():
        seen.clear()
        values = another_value(name)
        arguments = [word for key, value in values.items() for word in ("--" + key.replace("_", "-"), value)]
        srpo("weights", file, *arguments, code=1)
        answer_role = values.pop("answer_role", "reasoning")
        expected = ScoringOptions(CreditOptions(**values), answer_role=answer_role, recompute=True)
        assert expected != ScoringOptions(recompute=True)
        assert seen == [ScoringOptions(), expected]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--bound", "0"], "--bound must be above 0", 1),
        (["--mix", "2"], "--mix must be in [0, 1], got 2.0", 1),
        (["--strength", "100"], "--strength must be in [0, 40 / --bound], got 100.0 with --bound 0.69", 1),
        (["--weight-map", "sigmoid", "--bound", "2"], "--bound is 2.0, but only --weight-map 'exp_tanh'", 1),
        (["--sign", "advantage"], "sign='advantage' needs 'advantage' in every line", 1),
        (["--weight-map", "tanh"], "'tanh' is not one of 'exp_tanh'", 2),
        # What a file cannot serve is not offered.
        (["--visual-score", "jsd"], "'jsd' is not one of 'log_ratio'", 2),
        (["--scale", "ema_rms"], "'ema_rms' is not one of 'fixed', 'batch_rms'", 2),
        (["--mix-warmup-steps", "5"], "No such option: --mix-warmup-steps", 2),
    ],
)
def test_options_of_weights_are_checked_under_their_names(file, arguments, message, code):
    assert message in srpo("weights", file, *arguments, code=code).stderr


# Tags, on every command


def of_one_response(tmp_path):
    """A response that only the tags ``<d>`` and ``<r>`` parse, with contrasts: 6 tokens, 1 of each role."""
    tokens = ["<d>", "red", "</d>", "<r>", "so", "</r>"]
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        writer.write(
            [tokens],
            old_log_probs=torch.full((1, 6), -1.0),
            corrupted_log_probs=torch.full((1, 6), -2.0),
            counterfactual_log_probs=torch.full((1, 6), -3.0),
            rewards=[1.0],
        )
    return tmp_path / "r.jsonl"


TAGS = {
    "one value each": ["--perception", "<d> </d>", "--reasoning", "<r> ... </r>"],
    "two values each": ["--perception", "<d>", "</d>", "--reasoning", "<r>", "</r>", "--answer", "none"],
    "a grammar": ["--format", "perception = <d> ... </d>; reasoning = <r> ... </r>"],
    "a grammar and a change": [
        "--format",
        "perception = <d> ... </d>; reasoning = <x> ... </x>",
        "--reasoning",
        "<r> </r>",
    ],
}


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
def test_tags_are_options_of_every_command_that_reads(tmp_path, tags):
    file = of_one_response(tmp_path)
    assert "0 of 1 response is well-formed" in srpo("segment", file).stdout
    assert "1 of 1 response is well-formed" in srpo("segment", *tags, file).stdout
    assert "malformed" in srpo("show", file).stdout
    shown = srpo("show", file, *tags).stdout
    assert "malformed" not in shown
    assert re.search(r"perception +1 ", shown)
    assert re.search(r"well-formed +0.0 %", srpo("report", file, "-o", tmp_path / "r.html").stdout)
    reported = srpo("report", file, "-o", tmp_path / "r.html", *tags).stdout
    assert re.search(r"well-formed +100.0 %", reported)
    # A sixth of the tokens each, and of the weight, which the shared baseline keeps: 1 on average.
    assert reported.count("on 16.7 % of the tokens") == 2
    assert data_of(tmp_path / "r.html")["rows"][0]["roles"] != data_of_default(file, tmp_path)
    srpo("weights", file, *tags, "-o", tmp_path / "new.jsonl")
    (new,) = read_rollouts(tmp_path / "new.jsonl")
    assert (new.tags.perception, new.tags.reasoning) == (("<d>", "</d>"), ("<r>", "</r>"))
    assert new.weights[1] != 1
    # What was written is read with the tags it was weighted with.
    assert "1 of 1 response is well-formed" in srpo("segment", tmp_path / "new.jsonl").stdout


def data_of_default(file, tmp_path):
    srpo("report", file, "-o", tmp_path / "default.html")
    return data_of(tmp_path / "default.html")["rows"][0]["roles"]


def test_headings_and_published_formats_are_tags_too(tmp_path):
    text = "### Perception\na cat\n### Reasoning\nit purrs\nAnswer: 3"
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        writer.write([[text]])
    headings = ["--perception", "### Perception", "--reasoning", "### Reasoning", "--answer", "Answer:"]
    for tags in (headings, [word for word in headings if word not in ("--answer", "Answer:")] + ["--answer", "none"]):
        assert "1 of 1 response is well-formed" in srpo("segment", *tags, tmp_path / "r.jsonl").stdout
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        writer.write([[PUBLISHED["visionary-r1"].example]])
    assert "0 of 1 response is well-formed" in srpo("segment", tmp_path / "r.jsonl").stdout
    assert "1 of 1 response is well-formed" in srpo("segment", "--format", "visionary-r1", tmp_path / "r.jsonl").stdout


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (["--format", "vision-r0"], "--format must be one of 'default'"),
        (["--format", "perception = <d>"], "--format is not a format: "),
        (["--perception", "<d>"], "--perception must be two non-empty strings, an opening and a closing tag"),
        (["--perception", "<think> </think>"], "each tag must mean one thing, got '<think>'"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_tags_are_checked_under_their_names(file, command, tags, message):
    assert message in srpo(*COMMANDS[command](file), *tags, code=1).stderr


def test_doctor_names_versions_and_what_is_missing(monkeypatch):
    output = srpo("doctor").stdout
    assert "the loss on" in output
    for name in ("torch", "trl", "verl", "openrlhf"):
        assert any(line.startswith(name) for line in output.split("\n"))
    lines = ["torch>=99", "torch (>=1,<99)", "nothing-of-this-name>=1; extra == 'trl'"]
    monkeypatch.setattr(checks_module, "requires", lambda name: lines)
    good = {True: "ok", False: "not supported", None: "not installed (for TRL)"}
    python, new, old, missing = checks()
    assert (python.good, new.good, old.good, missing.good) == (True, False, True, None)
    assert [check.verdict for check in (new, old, missing)] == [good[False], good[True], good[None]]
    assert (old.supported, missing.installed) == (">=1,<99", "-")
    output = srpo("doctor").stdout
    assert "not supported" in next(line for line in output.split("\n") if line.startswith("torch"))
    assert "not installed (for TRL)" in output
    assert loss_is_right() == ("cuda" if torch.cuda.is_available() else "cpu", True)


def test_plain_doctor_says_the_same_without_the_packages_of_the_command(monkeypatch, capsys):
    assert plain_doctor("typer") == 0
    output = capsys.readouterr().out
    rows = [line.split()[:3] for line in output.split("\n\n")[0].split("\n")]
    assert rows == [list(check[:3]) for check in checks()]
    assert "the loss on" in output
    assert output.endswith("need typer, which is not installed: pip install '.[cli]' in a checkout of srpo_core.\n")
    monkeypatch.setattr(checks_module, "loss_is_right", lambda: ("cpu", False))
    assert plain_doctor("typer") == 1

    def not_there(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(checks_module, "requires", not_there)
    assert plain_doctor("typer") == 1
    assert "imported but not installed: pip install -e ." in capsys.readouterr().err
    assert "imported but not installed: pip install -e ." in srpo("doctor", code=1).stderr


def test_demo_runs_in_a_checkout_and_says_where_it_is_elsewhere(monkeypatch, tmp_path):
    ran = []

    def run(command, **options):
        ran.append((command, options))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(demo.subprocess, "run", run)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "srpo_core" / "cli" / "demo.py"))
    assert "in a checkout of srpo_core run `make demo`" in srpo("demo", code=1).stderr
    (tmp_path / "benchmarks" / "grounding").mkdir(parents=True)
    (tmp_path / "benchmarks" / "grounding" / "demo.py").touch()
    srpo("demo", "--seeds", "1", code=3)
    assert ran == [
        (
            [sys.executable, "-P", "-m", "benchmarks.grounding.demo", "--seeds", "1"],
            {"check": False},
        )
    ]


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_without_its_packages_the_command_says_what_to_install(name):
    without = f"import sys; sys.modules.update({name}=None, packaging=None); from srpo_core.cli import main; "
    done = run_python(f"{without} sys.argv = ['srpo', 'report', 'r.jsonl']; main()")
    assert done.returncode == 1
    assert done.stderr == (
        f"The srpo command needs {name}, which is not installed: pip install '.[cli]' in a checkout of srpo_core. "
        "Until then only `srpo doctor` works.\n"
    )
    done = run_python(f"{without} sys.argv = ['srpo', 'doctor']; main()")
    assert (done.returncode, done.stderr) == (0, "")
    assert "installed; not compared, because packaging is missing" in done.stdout
    assert "the loss on" in done.stdout


def test_another_package_that_is_missing_is_no_matter_of_the_command():
    done = run_python("import sys; sys.modules['torch'] = None; from srpo_core.cli import main; main()")
    assert "ModuleNotFoundError: import of torch halted" in done.stderr
    assert ".[cli]" not in done.stderr


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )


def test_the_core_needs_none_of_them():
    blocked = ("typer", "rich", "orjson", "PIL", "jsonschema", "packaging")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import srpo_core.rollouts, srpo_core.report"
    assert run_python(code).stderr == ""
