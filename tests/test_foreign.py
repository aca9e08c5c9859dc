"""Files as they come: byte-order marks, NaN and null, files of other kinds, logs of other tools."""

import gzip
import json
import math
import sys
import types

import numpy as np
import pytest

from srpo_core.rollouts import RolloutError, ScoringOptions, parse_rollout, read_rollouts, record, summarize_files
from srpo_core.rollouts.foreign import logged
from srpo_core.rollouts.lines import TOOLS, not_a_rollout_file, other_tool
from srpo_core.rollouts.log_files import UnreadableLog, log_files, read_tables
from srpo_core.rollouts.retag import Retag, tags_as_json
from srpo_core.tags import RoleTags

WELL_FORMED = "<perception>a cat</perception><think>it purrs</think><answer>3</answer>"
LINE = {"tokens": ["a", "b"], "reward": 1}
both_loaders = pytest.mark.parametrize("loads", ["orjson", "json"])


@pytest.fixture(autouse=True)
def _loader(request, monkeypatch):
    if "loads" in request.fixturenames and request.getfixturevalue("loads") == "json":
        monkeypatch.setattr(record, "load_json", record.load_with_stdlib)


# Lines


@both_loaders
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_byte_order_marks_are_read_wherever_a_file_began(tmp_path, newline, loads):
    """Also in the middle: `cat a.jsonl b.jsonl`."""
    path = tmp_path / "r.jsonl"
    text = "".join("\ufeff" + json.dumps(LINE | {"step": step}) + newline for step in (1, 2)) + "\ufeff" + newline
    path.write_bytes(text.encode())
    assert [(each.text, each.step) for each in read_rollouts(path)] == [("ab", 1), ("ab", 2)]
    summary = summarize_files([path], strict=True)
    assert len(summary) == 2
    assert summary.columns["step"].tolist() == [1, 2]
    assert parse_rollout("\ufeff" + json.dumps(LINE)).text == "ab"


@both_loaders
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a", "reward": NaN}', "reward is NaN, which JSON does not have; write null where there is none"),
        ('{"text": "a", "advantage": -Infinity}', "advantage is -Infinity, which JSON does not have; write null"),
        ('{"tokens": ["a", "b"], "old_log_probs": [-1, NaN]}', "old_log_probs[1] is NaN, which JSON does not have"),
        ('{"tokens": ["a"], "old_log_probs": [NaN]}', "leave old_log_probs out of lines where it is not known"),
        ('{"tokens": ["a"], "old_log_probs": [-Infinity]}', "old_log_probs[0] is -Infinity, which JSON does not have"),
        ('{"tokens": ["a"], "corrupted_log_probs": [-Infinity]}', "write null for minus infinity"),
        ('{"text": "a", "extra": {"x": {"y": [0, Infinity]}}}', "extra.x.y[1] is Infinity"),
        ('{"text": "a", "reward": nan}', "not JSON: Expecting value at column 25"),
        ('{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
        (b'{"text": "\xff"}', "not JSON: the byte at column 11 is not UTF-8"),
        (b'{"text": "\xff\x00"}', "not JSON: there are zero bytes in it; is it UTF-16? A rollout file is UTF-8"),
        ('{"text": "a", "extra": {"x": ' + "[" * 100_000, "not JSON: "),
        ('{"text": "a", "reward": ' + "9" * 5000 + "}", ""),
    ],
)
def test_what_is_not_json_is_named_by_line_and_field_by_both_loaders(tmp_path, line, reason, loads):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    errors = []
    assert [each.text for each in read_rollouts(path, on_error=errors.append)] == ["a"]
    assert [(error.line, reason in error.reason) for error in errors] == [(3, True)], errors
    with pytest.raises(RolloutError, match="line 3: "):
        summarize_files([path], strict=True)


@both_loaders
def test_half_an_emoji_is_read_by_both_loaders(loads):
    assert parse_rollout(b'{"text": "a\\ud83d"}').text == "a\ud83d"


def test_null_is_not_recorded():
    """In every field but the response, as pandas writes it: a column that some rows lack."""
    schema = json.loads(record.SCHEMA_PATH.read_text())
    names = schema["properties"].keys() - {"text"}
    rollout, plain = parse_rollout(json.dumps({"text": "a"} | dict.fromkeys(names))), parse_rollout('{"text": "a"}')
    for name in plain.__dataclass_fields__:
        assert getattr(rollout, name) == getattr(plain, name), name
    with pytest.raises(RolloutError, match="needs 'tokens' or 'text', got none"):
        parse_rollout('{"text": null, "tokens": null}')
    with pytest.raises(RolloutError, match=r"up_divergence is missing"):
        parse_rollout('{"tokens": ["a"], "down_divergence": [1], "up_divergence": null}')


# Files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps([LINE, LINE]), "one JSON array, and a rollout file has one object a line; srpo import "),
        (json.dumps([LINE, LINE], indent=1), "one JSON array"),
        ("\ufeff" + json.dumps([LINE]), "one JSON array"),
        (json.dumps(LINE, indent=2), "JSON over several lines, and a rollout file has one object a line"),
        (json.dumps(LINE).encode("utf-16"), "UTF-16 text, and a rollout file is UTF-8; srpo import "),
        (json.dumps(LINE).encode("utf-16-le"), "UTF-16 text"),
        (gzip.compress(b"{}", mtime=0), "compressed; unpack it with gunzip"),
        (b"PAR1....PAR1", "a Parquet file, as TRL logs completions; srpo import "),
        ('{"input": "q", "output": "a", "score": 1, "step": 1}', "a log of verl by its columns (input, output, score"),
        ('{"prompt": "q", "completion": "a", "advantage": NaN}', "a log of TRL by its columns"),
        ('{"prompt": ["q"], "completion": ["a"], "step": ["1"]}', "a log of ms-swift by its columns"),
        ('{"columns": ["step"], "data": [[1]]}', "a table, as Weights & Biases saves it; srpo import "),
    ],
)
def test_a_file_of_another_kind_is_named_once(tmp_path, content, said):
    path = tmp_path / "r.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (lambda: list(read_rollouts(path, on_error=lambda error: None)), lambda: summarize_files([path])):
        with pytest.raises(RolloutError) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: this is {said}")


@pytest.mark.parametrize(
    "content", ["", "\n\n", "[1]\n", '{"token": []}', '{"text": "a"', "{}", '{"tokens": []}\n[{}]']
)
def test_other_files_are_read_line_by_line(tmp_path, content):
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    assert not_a_rollout_file(path) is None


def tables(path):
    found = [table.records for table in read_tables(path)]
    errors = [(number, row) for records in found for number, row in records if isinstance(row, str)]
    return [[row for _, row in records if not isinstance(row, str)] for records in found], errors


ROWS = [{"prompt": "q", "completion": text, "step": 1, "r": 0.5} for text in "abc"]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(map(json.dumps, ROWS)),
        "\r\n".join(map(json.dumps, ROWS)) + "\r\n\r\n",
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps(COLUMNS),
        json.dumps(COLUMNS, indent=2),
        json.dumps({"columns": list(COLUMNS), "data": [list(row.values()) for row in ROWS]}),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gzip"])
def test_read_tables_of_every_shape_and_encoding(tmp_path, content, encoding):
    path = tmp_path / "log.json"
    path.write_bytes(gzip.compress(content.encode()) if encoding == "gzip" else content.encode(encoding))
    found, errors = tables(path)
    assert [row for table in found for row in table] == ROWS
    assert errors == []


def test_read_tables_keeps_each_step_of_a_log_of_columns(tmp_path):
    path = tmp_path / "completions.jsonl"
    steps = [COLUMNS | {"step": [str(step)] * 3} for step in (1, 2)]
    path.write_text(
        "\n".join(map(json.dumps, steps)) + '\n{"prompt": ["q"], "completion": ["a", "b"], "step": []}\n{"a'
    )
    found, errors = tables(path)
    assert [[row["step"] for row in table] for table in found if table] == [["1"] * 3, ["2"] * 3]
    assert errors == [
        (3, "prompt has 1 entries, and completion has 2"),
        (4, "not JSON: Unterminated string starting at at column 2"),
    ]


def test_more_rows_than_are_read_at_once_stay_in_order(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"input": str(row)}) + "\n" for row in range(2500)))
    found, _ = tables(path)
    assert [row["input"] for table in found for row in table] == [str(row) for row in range(2500)]
    assert max(map(len, found)) <= 1025


@pytest.mark.parametrize("content", ["text\nmore", "{", "3", '"text"', b"\xff\xfe\x00"])
def test_a_file_that_is_no_log_is_refused_as_a_whole(tmp_path, content):
    path = tmp_path / "log.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UnreadableLog):
        tables(path)


def test_a_torn_gzip_file_is_refused(tmp_path):
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 100, mtime=0)[:-9])
    with pytest.raises(UnreadableLog, match="torn"):
        tables(path)


def test_log_files_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("10.jsonl", "9.jsonl", "100.jsonl", "notes.txt", "b.json"):
        (tmp_path / name).touch()
    assert [path.name for path in log_files([tmp_path])] == ["9.jsonl", "10.jsonl", "100.jsonl", "b.json"]
    assert log_files([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableLog, match="there is no log in this folder"):
        log_files([tmp_path / "empty"])


class _Table:
    """As much of pyarrow's table as is used."""

    column_names: tuple[str, ...] = ("prompt", "completion", "__index_level_0__")

    def select(self, names):
        assert list(names) == ["prompt", "completion"]
        return self

    def to_pylist(self):
        return [{"prompt": "q", "completion": "a"}]


def test_parquet_is_read_by_pyarrow_and_without_it_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "completions_00001.parquet"
    path.write_bytes(b"PAR1 and so on")
    fake = types.SimpleNamespace(read_table=lambda path: _Table())
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", fake)
    assert tables(path) == ([[{"prompt": "q", "completion": "a"}]], [])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        UnreadableLog, match=r"needs pyarrow, which is not installed: pip install 'srpo-core\[import\]'"
    ):
        tables(path)


def test_a_torn_parquet_file_is_refused(tmp_path):
    pytest.importorskip("pyarrow", reason="optional: only TRL's logs need it")
    path = tmp_path / "completions_00001.parquet"
    path.write_bytes(b"PAR1 and so on")
    with pytest.raises(UnreadableLog, match="the Parquet file cannot be read"):
        tables(path)


# Records


@pytest.mark.parametrize(
    ("record", "tool"),
    [
        ({"input": "", "output": "", "score": 1, "gts": None}, "verl"),
        ({"input": "", "output": "", "reward": 1}, "openrlhf"),
        ({"global_step": 1, "text": "", "reward": 1}, "openrlhf"),
        ({"prompt": "", "completion": "", "advantage": 1, "step": 1}, "trl"),
        ({"prompt": [], "completion": [{"role": "assistant", "content": ""}], "step": 1}, "trl"),
        ({"prompt": [""], "completion": [""], "step": [1]}, "swift"),
        ({"gen_step": [0], "prompt": [""], "completion": [""]}, "swift"),
        ({"prompt": "", "completion": "", "advantages": 1, "step": "1"}, "swift"),
        ({"messages": [], "completion": "", "reward": 1}, "swift"),
        ({"input": "", "output": ""}, None),
        ({"text": ""}, None),
    ],
)
def test_columns_tell_the_tool(record, tool):
    assert other_tool(record) == tool
    assert tool is None or tool in TOOLS


def test_conversations_become_text():
    record = {
        "prompt": [
            {"role": "system", "content": "Look."},
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "how many?"}]},
        ],
        "completion": [
            {"role": "assistant", "content": "a"},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        ],
    }
    found = logged("trl", record)
    assert found.prompt == "system: Look.\nuser: <image>how many?"
    assert found.text == "a\n<think>hm</think>\nb"
    assert found.dropped == ["messages of tools"]
    one = logged("trl", {"prompt": [{"role": "user", "content": "q"}], "completion": "a"})
    assert (one.prompt, one.text, one.whole_prompt) == ("q", "a", False)
    assert logged("trl", {"prompt": "q<think>", "completion": "a"}).whole_prompt


def test_numbers_that_verl_writes_as_strings_are_numbers():
    record = {"input": "q", "output": "a", "score": "0.5", "step": "3", "acc": "True", "pred": "x", "gts": ["3", "4"]}
    found = logged("verl", record)
    assert (found.total, found.step, found.reference) == (0.5, 3, '["3", "4"]')
    assert found.rewards == {"score": 0.5, "acc": 1.0}
    assert found.extra == {"acc": "True", "pred": "x"}
    # TRL writes numbers as numbers: a string of digits is an answer, not a reward.
    assert logged("trl", {"prompt": "q", "completion": "a", "parsed": "42", "flag": True}).rewards == {}


def test_nan_is_a_reward_that_was_not_given_and_infinity_none():
    found = logged(
        "trl", {"prompt": "q", "completion": "a", "one": math.nan, "two": None, "three": 1, "advantage": None}
    )
    assert {name: None if math.isnan(value) else value for name, value in found.rewards.items()} == {
        "one": None,
        "two": None,
        "three": 1.0,
    }
    assert found.advantage is None
    assert found.extra == {"three": 1}
    with pytest.raises(ValueError, match="score is Infinity; a reward is finite, or null"):
        logged("verl", {"input": "q", "output": "a", "score": math.inf})


@pytest.mark.parametrize(
    ("tool", "record", "message"),
    [
        (
            "trl",
            {"input": "", "output": "", "score": 1},
            "has a column 'prompt', got 'input'.*log of verl: --from verl",
        ),
        ("verl", {"input": "q", "output": 3, "score": 1}, "output must be a string, got a number"),
        ("verl", {"input": "q", "output": "a", "score": "high"}, "score must be a number or null, got a string"),
        ("trl", {"prompt": 3, "completion": "a"}, "prompt must be a string or a list of messages, got a number"),
        ("trl", {"prompt": "q", "completion": ["a"]}, "completion must be a string or a list of messages, got a list"),
        ("trl", {"prompt": "q", "completion": "a", "step": -1}, "step must be a whole number, at least 0, got -1"),
        ("swift", {"messages": "q", "completion": [{"content": 3}]}, "content of a message must be a string or a list"),
        ("openrlhf", {"text": None, "reward": 1}, "text must be a string, got null"),
    ],
)
def test_logged_says_what_is_wrong_with_a_record(tool, record, message):
    with pytest.raises(ValueError, match=message):
        logged(tool, record)


def test_what_json_cannot_hold_is_left_out_or_written_as_text():
    stamp = np.datetime64("2026-01-01")
    record = {
        "input": "q",
        "output": "a",
        "score": 1,
        "b": b"\0",
        "t": stamp,
        "x": [math.nan, (1,)],
        "y": {"z": math.nan},
    }
    found = logged("verl", record)
    assert found.extra == {"t": "2026-01-01", "x": [None, [1]]}
    assert found.dropped == ["binary values"]


@pytest.mark.parametrize(
    ("value", "image", "dropped"),
    [
        ("a.png", "a.png", []),
        (["a.png"], "a.png", []),
        ([{"path": "a.png", "bytes": None}], "a.png", []),
        ([], None, []),
        (None, None, []),
        ({"bytes": b"..", "path": None}, None, ["images"]),
        (["a.png", "b.png"], None, ["images"]),
    ],
)
def test_images_are_kept_as_paths(value, image, dropped):
    found = logged("swift", {"prompt": "q", "completion": "a", "image": value})
    assert (found.image, found.dropped) == (image, dropped)


@pytest.mark.parametrize(
    ("text", "prompt", "response", "dropped"),
    [
        ("system\nLook.\nuser\nhow many?\nassistant\nthree", "system\nLook.\nuser\nhow many?", "three", []),
        ("user\nq\nmodel\nthree\nassistant\n", "user\nq", "three\nassistant\n", []),
        ("q three", None, "q three", ["where the response begins"]),
    ],
)
def test_the_texts_of_openrlhf_are_parted_where_the_response_begins(text, prompt, response, dropped):
    found = logged("openrlhf", {"global_step": 2, "text": text, "reward": 0.5})
    assert (found.prompt, found.text, found.dropped) == (prompt, response, dropped)
    assert (found.step, found.total) == (2, 0.5)


# Other tags


def test_other_tags_take_the_place_of_what_the_trainer_read_with_its_own(tmp_path):
    line = {"tokens": ["<d>", "a", "</d>", "<think>", "b", "</think>"], "roles": "OOOORO", "broken": "no_perception"}
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(line | {"weights": [1, 2, 1, 1, 0.5, 1], "scores": [0] * 6}))
    before = summarize_files([path]).metrics()
    assert (before["tokens/perception/fraction"], before["broken/no_perception"]) == (0, 1)
    tags = Retag(changed=(("perception", ("<d>", "</d>")),))
    after = summarize_files([path], ScoringOptions(tags=tags)).metrics()
    assert (after["tokens/perception/fraction"], after["tokens/reasoning/fraction"]) == (1 / 6, 1 / 6)
    assert after["broken/fraction"] == 0
    assert after["weight/perception/mean"] == 2  # as training used it
    rollout = parse_rollout(json.dumps(line))
    assert Retag()(rollout) is rollout
    with pytest.raises(RolloutError, match="each tag must mean one thing"):
        Retag(changed=(("perception", ("<think>", "</think>")),))(rollout)


def test_tags_as_json_are_read_again():
    for tags in (
        RoleTags(),
        RoleTags("### Perception", "### Reasoning", "Answer:"),
        RoleTags(answer=None, nested=True),
        RoleTags("json", answer=("\\boxed{", "}")),
    ):
        assert parse_rollout(json.dumps({"text": "", "tags": tags_as_json(tags)})).tags == tags
