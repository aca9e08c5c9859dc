"""The published formats: an example of each taken apart, how they are named, and what the doctor shows of them."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from srpo_core import RoleTags
from srpo_core.cli.app import app
from srpo_core.formats import FORMATS, PUBLISHED, PublishedFormat, read_format
from srpo_core.prompting import example_response
from srpo_core.tags import DEFAULT_TAGS, BrokenReason, parse_response

RED, BALL = "Three red cubes and a blue ball.", "Of the four objects three are red."
# What the examples say, written down by hand: perceptions, reasoning, answer.
SAID = {
    "default": ([RED], [BALL], "3"),
    "vision-sr1": ([RED], ["Not \\boxed{4}: of the four objects three are red."], "3"),
    "visionary-r1": ([RED], [BALL], "3"),
    "observe-r1": ([RED], [BALL], "3"),
    "spatial-thinker": (
        ['{"objects": [{"id": "cube.1", "bbox": [4, 8, 20, 24]}]}'],
        ["There is one cube."],
        "1",
    ),
    "satori-r1": ([RED], ["[[4, 8, 20, 24]]"], "3"),
    "llava-cot": ([RED], [BALL], "3"),
    "nested": (
        [RED, "The ball is blue."],
        ["I look first.", "Of the four three are red.", "So it does not count."],
        "3",
    ),
    "headings": ([RED], [BALL], "3"),
    "json-boxes": (
        ['[\n\t{"bbox_2d": [4, 8, 20, 24], "label": "red cube"}\n]'],
        ["There is one box, so there is one cube."],
        "1",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_example_of_each_published_format_is_taken_apart(name):
    published = PUBLISHED[name]
    parsed = parse_response(published.example, published.tags)
    assert parsed.reason == BrokenReason.NONE
    said = {kind: [] for kind in ("perception", "reasoning", "answer")}
    for kind, start, end in parsed.blocks:
        said[kind].append(published.example[start:end].strip())
    assert (said["perception"], said["reasoning"], *said["answer"]) == SAID[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_format_is_in_the_docs_with_its_source(name):
    assert isinstance(PUBLISHED[name], PublishedFormat)
    table = Path("docs/how-to/formats.md").read_text().partition("\n## Published formats")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    for number in PUBLISHED[name].source.split("arXiv:")[1:]:
        assert f"arxiv.org/abs/{number[:10]}" in rows[0]
    for tag in (pair[0] for pair in FORMATS[name].pairs.values() if pair[0].startswith("<")):
        assert f"`{tag}`" in rows[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_format_can_be_printed_and_asked_for(name):
    tags = FORMATS[name]
    assert RoleTags.of_grammar(tags.grammar) == tags
    assert parse_response(example_response(tags), tags).reason == BrokenReason.NONE


def test_read_format_of_a_name_or_lines():
    assert read_format("default") == read_format(DEFAULT_TAGS.grammar) == DEFAULT_TAGS
    assert read_format(" LLaVA-CoT ") is FORMATS["llava-cot"]
    assert read_format("perception = json; reasoning = Think:") == RoleTags("json", "Think:", None)
    with pytest.raises(ValueError, match="^must be one of 'default', .*, or lines .*, got 'headngs' .*'headings'"):
        read_format("headngs")
    with pytest.raises(ValueError, match="^is not a format: line 1 of the format, 'see = <see>', must be"):
        read_format("see = <see>")


# srpo doctor --format


def doctor(value, code=0):
    result = CliRunner().invoke(app, ["doctor", "--format", value], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("name", PUBLISHED)
def test_doctor_shows_a_published_format(name):
    output = doctor(name)
    assert FORMATS[name].grammar in output
    assert PUBLISHED[name].source in " ".join(output.split())  # whatever the width of the console
    rows = [line.split(maxsplit=1) for line in output.partition("how it is read")[2].splitlines()]
    shown = {
        kind: [row[1].strip() for row in rows if row[:1] == [kind]] for kind in ("perception", "reasoning", "answer")
    }
    perceptions, reasoning, answer = SAID[name]
    assert [text.splitlines()[0] for text in perceptions] == shown["perception"]
    assert reasoning == shown["reasoning"]
    assert [answer] == shown["answer"]


def test_doctor_shows_lines_and_files_with_lines(tmp_path):
    lines = "perception = json\nreasoning = <t> ... </t>\n"
    (tmp_path / "format.txt").write_text(lines)
    for value in (lines, lines.replace("\n", ";"), str(tmp_path / "format.txt")):
        output = doctor(value)
        assert lines in output
        assert "a JSON array or object that begins a line" in output
        assert "Answers are not tagged." in output
    assert "perception in reasoning = json" in doctor("perception in reasoning = json; reasoning = <t> ... </t>")


def test_doctor_says_what_is_wrong_with_a_format(tmp_path):
    assert "Error: --format must be one of 'default'" in doctor("typo", code=1)
    assert "Error: --format is not a format: line 1 of the format, 'perception = <p>'" in doctor(
        "perception = <p>", code=1
    )
    (tmp_path / "empty.txt").write_text("")
    assert "Error: --format must be one of" in doctor(str(tmp_path / "empty.txt"), code=1)
