"""What the schema allows is read; what it refuses is refused, with a reason."""

import json
from itertools import pairwise

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_core.rollouts import (
    SCHEMA_PATH,
    Rollout,
    RolloutError,
    parse_rollout,
    read_rollouts,
    record,
    score_rollouts,
)
from srpo_core.tags import BrokenReason

SCHEMA = jsonschema.Draft202012Validator(json.loads(SCHEMA_PATH.read_text()))

texts = st.text(st.characters(codec="utf-8"), max_size=4)
finite = st.floats(-9, 0, width=32).map(lambda value: round(value, 5))


@st.composite
def lines(draw):
    """A valid line, as an object."""
    tokens = draw(st.lists(texts, max_size=6))
    if draw(st.booleans()):
        line = {"tokens": tokens}
    else:
        edges = np.cumsum([0, *map(len, tokens)]).tolist()
        line = {"text": "".join(tokens), "offsets": [list(span) for span in pairwise(edges)]}
    per_token = {
        "old_log_probs": finite | st.none(),
        "corrupted_log_probs": finite | st.none(),
        "counterfactual_log_probs": finite,
        "repeated_log_probs": finite,
        "scores": st.floats(-5, 5, width=32),
        "weights": st.floats(0, 4, width=32),
    }
    optional = {name: st.lists(v, min_size=len(tokens), max_size=len(tokens)) for name, v in per_token.items()}
    divergences = st.lists(st.floats(0, 9, width=32), min_size=len(tokens), max_size=len(tokens))
    if draw(st.booleans()):
        line |= {"down_divergence": draw(divergences), "up_divergence": draw(divergences)}
    optional |= {
        "roles": st.lists(st.sampled_from("OPR"), min_size=len(tokens), max_size=len(tokens)).map("".join),
        "broken": st.sampled_from([reason.name.lower() for reason in BrokenReason]),
        "reward": st.floats(-2, 2) | st.integers(-2, 2),
        "advantage": st.floats(-2, 2),
        "correct": st.booleans(),
        "perception_correct": st.booleans(),
        "group": st.integers(0, 9) | texts,
        "step": st.integers(0, 9),
        "id": texts,
        "finished": st.booleans(),
        "swapped": st.booleans(),
        "prompt": texts,
        "reference": texts,
        "image": texts,
        "tags": st.just({"perception": ["<p>", "</p>"], "reasoning": ["<t>", "</t>"], "answer": None}),
        "extra": st.dictionaries(texts, st.integers() | texts, max_size=2),
    }
    return line | {name: draw(values) for name, values in optional.items() if draw(st.booleans())}


junk = st.none() | st.booleans() | st.integers(-2, 2) | st.just("O") | st.just([]) | st.just([[0, 1]]) | st.just({})
junk |= st.sampled_from(
    [0.5, "none", [0.5], ["a"], [None], [True], {"perception": ["a", "b"]}, [[0.0, 1.0]], [[-1, 0]]]
)


@given(lines())
def test_a_valid_line_satisfies_the_schema_and_comes_back_whole(line):
    SCHEMA.validate(line)
    rollout = parse_rollout(json.dumps(line))
    tokens = line.get("tokens", [])
    assert rollout.text == line.get("text", "".join(tokens))
    assert "".join(rollout.pieces) == rollout.text
    if "tokens" in line:
        assert rollout.pieces == tokens
    for name in ("old_log_probs", "corrupted_log_probs", "scores", "weights", "down_divergence", "up_divergence"):
        if name in line:
            expected = [-np.inf if value is None else value for value in line[name]]
            np.testing.assert_allclose(getattr(rollout, name), expected, rtol=1e-6)
        else:
            assert getattr(rollout, name) is None
    if "roles" in line:
        assert rollout.roles.tolist() == [{"O": 0, "P": 1, "R": 2}[letter] for letter in line["roles"]]
    for name in ("reward", "correct", "group", "step", "id", "swapped", "prompt", "image"):
        assert getattr(rollout, name) == line.get(name)
    assert rollout.finished == line.get("finished", True)


@given(lines(), st.data())
@settings(max_examples=150)
def test_what_the_schema_refuses_is_refused_and_nothing_else_but_lengths(line, data):
    name = data.draw(st.sampled_from([*SCHEMA.schema["properties"], "reward", "log_probs"]))
    line = line | {name: data.draw(junk)}
    if data.draw(st.booleans()):
        line.pop(data.draw(st.sampled_from(sorted(line))))
    reason = None
    try:
        parse_rollout(json.dumps(line))
    except RolloutError as error:
        reason = error.reason
    # What JSON Schema cannot say: arrays are as long as each other, offsets lie in the text.
    beyond_schema = reason is not None and ("entries for" in reason or "not a span of" in reason)
    assert SCHEMA.is_valid(line) == (reason is None or beyond_schema), reason


@pytest.mark.parametrize("loads", ["orjson", "json"])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: "),
        (b'{"tokens": ["\xff"]}', "not JSON: "),
        (b'{"tokens": ["a"], "reward": NaN}', "not JSON: "),
        (b"[1]", "a rollout is a JSON object, got an array"),
        (b'{"reward": 1}', "a rollout needs 'tokens' or 'text', got none"),
        (b'{"tokens": [], "offsets": []}', "offsets belong to 'text'; leave them out with 'tokens'"),
        (b'{"tokens": [], "text": ""}', "a rollout needs 'tokens' or 'text', not both"),
        (b'{"text": "a", "log_probs": [1]}', "'log_probs' is not a field of a rollout; did you mean 'old_log_probs'"),
        (b'{"text": "a", "loss": [1]}', "'loss' is not a field of a rollout; put what is your own under 'extra'"),
        (b'{"tokens": ["a", 2]}', "tokens[1] must be a string, got a number"),
        (b'{"tokens": ["a"], "old_log_probs": [-1, -2]}', "old_log_probs has 2 entries for 1 tokens"),
        (b'{"text": "a", "weights": [1]}', "weights has 1 entries for no tokens (give 'tokens' or 'offsets')"),
        (b'{"tokens": ["a"], "old_log_probs": [0.9]}', "old_log_probs[0] is 0.9; a log-probability is at most 0"),
        (b'{"tokens": ["a"], "weights": [-1]}', "weights[0] is -1; a weight is at least 0"),
        (b'{"tokens": ["a"], "weights": [true]}', "weights[0] must be a number, got a boolean"),
        (b'{"tokens": ["a"], "weights": [1e39]}', "weights[0] is not a finite number"),
        # Before lengths are looked at, as the schema does.
        (b'{"tokens": ["a"], "up_divergence": [1, 2]}', "down_divergence is missing"),
        (b'{"tokens": ["a"], "up_divergence": [1]}', "down_divergence is missing; down_divergence and up_divergence"),
        (b'{"tokens": ["a"], "down_divergence": [1]}', "up_divergence is missing; down_divergence and up_divergence"),
        (
            b'{"tokens": ["a"], "up_divergence": [1, 2], "down_divergence": [1]}',
            "up_divergence has 2 entries for 1 tok",
        ),
        (
            b'{"tokens": ["a"], "up_divergence": [1], "down_divergence": [-1e-9]}',
            "down_divergence[0] is -1e-09; a diver",
        ),
        (
            b'{"tokens": ["a"], "up_divergence": [null], "down_divergence": [1]}',
            "up_divergence[0] must be a number, got",
        ),
        (b'{"text": "a", "up_divergence": [1], "down_divergence": [1]}', "divergence has 1 entries for no tokens"),
        (b'{"tokens": ["a"], "roles": "Q"}', "roles has 'Q' at token 0; use O, P and R"),
        (b'{"tokens": ["a"], "broken": "torn"}', "broken must be one of none, no_perception, unclosed"),
        (b'{"text": "ab", "offsets": [[1, 3]]}', "offsets[0] is [1, 3], which is not a span of the 2 characters"),
        (b'{"text": "ab", "offsets": [[1, 2, 3]]}', "offsets[0] must be two whole numbers, at least 0"),
        (b'{"text": "a", "step": -1}', "step must be a whole number, at least 0"),
        (b'{"text": "a", "tags": {"perception": ["a", "b"]}}', "tags must have perception, reasoning and answer"),
        (
            b'{"text": "a", "tags": {"perception": ["a", "b"], "reasoning": ["a", "c"], "answer": null}}',
            "tags: each tag must mean one thing",
        ),
    ],
)
def test_parse_rollout_says_what_is_wrong_with_a_line(line, reason, loads, monkeypatch):
    if loads == "json":
        monkeypatch.setattr(record, "load_json", record.load_with_stdlib)
    with pytest.raises(RolloutError) as caught:
        parse_rollout(line)
    assert reason in caught.value.reason


@given(lines())
def test_both_json_readers_agree(line):
    text = json.dumps(line).encode()
    assert record.load_json(text) == record.load_with_stdlib(text)


def test_read_rollouts_up_to_the_faults_of_a_file(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": 1}\r\n{"text": "b"}\n{"tokens": ["a"], "up_divergence": [1]}')
    errors = []
    assert [rollout.text for rollout in read_rollouts(path, on_error=errors.append)] == ["a", "b"]
    assert [(error.line, error.reason.partition(";")[0]) for error in errors] == [
        (3, "text must be a string, got a number"),
        (5, "down_divergence is missing"),
    ]
    with pytest.raises(RolloutError, match="rollouts.jsonl, line 3: text must be a string"):
        list(read_rollouts(path))


def test_read_rollouts_reports_a_torn_last_line_and_loses_no_other(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    whole, last = '{"text": "a"}\n', '{"text": "猫"}'.encode()
    for cut in range(1, len(last)):
        path.write_bytes(whole.encode() + last[:cut])
        errors = []
        assert [rollout.text for rollout in read_rollouts(path, on_error=errors.append)] == ["a"]
        assert [error.line for error in errors] == [2]
    path.write_bytes(whole.encode() + last)
    assert [rollout.text for rollout in read_rollouts(path)] == ["a", "猫"]


def test_a_response_that_begins_inside_a_block_is_read_so():
    line = {"tokens": ["a cat", "</perception>", "<think>", "one", "</think>"], "open_at_start": "perception"}
    (scored,) = score_rollouts([parse_rollout(json.dumps(line))])
    assert (scored.broken, scored.roles.tolist()) == (BrokenReason.NONE, [1, 0, 0, 2, 0])
    del line["open_at_start"]
    (scored,) = score_rollouts([parse_rollout(json.dumps(line))])
    assert scored.broken == BrokenReason.STRAY_CLOSE
    line |= {
        "open_at_start": "answer",
        "tags": {"perception": ["<a>", "</a>"], "reasoning": ["<b>", "</b>"], "answer": None},
    }
    (scored,) = score_rollouts([parse_rollout(json.dumps(line))])
    assert scored.broken == BrokenReason.NO_PERCEPTION


def test_a_rollout_knows_what_counts_as_right():
    assert Rollout(text="").is_right is None
    assert Rollout(text="", reward=0.1).is_right is None  # with a format bonus every wrong answer has that
    assert Rollout(text="", reward=0.1, correct=False).is_right is False
