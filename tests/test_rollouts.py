"""What is written is read again; what the schema refuses is refused, with a reason; any trainer's tensors will do."""

import json
from itertools import pairwise

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import EOS, byte_bpe

from srpo_core import BrokenReason, Role, RoleTags, counterfactual_responses, segment_responses
from srpo_core import rollouts as rollouts_module
from srpo_core.rollouts import SCHEMA_PATH, Rollout, RolloutError, RolloutWriter, parse_rollout, read_rollouts

SCHEMA = jsonschema.Draft202012Validator(json.loads(SCHEMA_PATH.read_text()))
TEXT = "<perception>a cat</perception><think>it purrs</think><answer>cat</answer>"

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
    beyond_schema = reason is not None and ("entries for" in reason or "no span of" in reason)
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
        (b'{"tokens": [], "offsets": []}', "offsets are those of 'text'; 'tokens' need none"),
        (b'{"tokens": [], "text": ""}', "a rollout needs 'tokens' or 'text', not both"),
        (b'{"text": "a", "log_probs": [1]}', "'log_probs' is no field of a rollout; did you mean 'old_log_probs'"),
        (b'{"text": "a", "loss": [1]}', "'loss' is no field of a rollout; put what is your own under 'extra'"),
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
        (b'{"text": "ab", "offsets": [[1, 3]]}', "offsets[0] is [1, 3], which is no span of the 2 characters"),
        (b'{"text": "ab", "offsets": [[1, 2, 3]]}', "offsets[0] must be two whole numbers, at least 0"),
        (b'{"text": "a", "step": -1}', "step must be a whole number, at least 0"),
        (b'{"text": "a", "tags": {"perception": ["a", "b"]}}', "tags must have perception, reasoning and answer"),
        (
            b'{"text": "a", "tags": {"perception": ["a", "b"], "reasoning": ["a", "c"], "answer": null}}',
            "tags: each tag must mean one thing",
        ),
    ],
)
def test_a_malformed_line_says_what_is_wrong(line, reason, loads, monkeypatch):
    if loads == "json":
        monkeypatch.setattr(rollouts_module, "_loads", rollouts_module._load_with_stdlib)
    with pytest.raises(RolloutError) as caught:
        parse_rollout(line)
    assert reason in caught.value.reason


@given(lines())
def test_both_json_readers_agree(line):
    text = json.dumps(line).encode()
    assert rollouts_module._loads(text) == rollouts_module._load_with_stdlib(text)


def test_a_file_is_read_up_to_its_faults(tmp_path):
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


# Writing


def batch_of(texts_, tokenizer, eos):
    ids = [[*tokenizer.encode(text).ids, eos] for text in texts_]
    time = max(map(len, ids))
    mask = torch.tensor([[True] * len(row) + [False] * (time - len(row)) for row in ids])
    return torch.tensor([row + [0] * (time - len(row)) for row in ids]), mask


def test_tensors_of_a_training_step_survive_the_file(tmp_path):
    tokenizer = byte_bpe()
    eos = tokenizer.token_to_id(EOS)
    responses = [TEXT, TEXT.replace("cat", "déjà vu ☃"), "no tags at all"]
    token_ids, mask = batch_of(responses, tokenizer, eos)
    roles, broken, boundary = segment_responses(token_ids, mask, tokenizer, eos_token_id=eos)
    other = counterfactual_responses(
        token_ids, roles, mask, group_ids=torch.zeros(3, dtype=torch.int64), boundary=boundary
    )
    g = torch.Generator().manual_seed(0)
    old, corrupted, replaced = (-3 * torch.rand(mask.shape, generator=g) for _ in range(3))
    corrupted[0, 3] = -torch.inf
    visual = torch.where(roles == Role.PERCEPTION, torch.randn(mask.shape, generator=g), torch.nan)
    consistency = torch.where(roles == Role.REASONING, torch.randn(mask.shape, generator=g), torch.nan)
    weights = torch.rand(mask.shape, generator=g).to(torch.bfloat16)
    path = tmp_path / "deep" / "rollouts.jsonl"
    with RolloutWriter(path, tokenizer=tokenizer, eos_token_id=eos) as writer:
        writer.write(
            token_ids,
            mask,
            old_log_probs=torch.where(mask, old, torch.nan),
            corrupted_log_probs=corrupted,
            counterfactual_log_probs=replaced,
            roles=torch.where(mask, roles, 99),
            broken=broken,
            visual_dependency=visual,
            perception_consistency=consistency,
            weights=weights,
            rewards=torch.tensor([1.0, 0.0, 0.0]),
            advantages=[0.5, -0.25, -0.25],
            correct=np.array([True, False, False]),
            group_ids=["park", "park", "park"],
            donors=other.donors,
            step=7,
            extra=[{"temperature": 1.0}, {}, {}],
        )
    for line in path.read_text().splitlines():
        SCHEMA.validate(json.loads(line))
    for row, rollout in enumerate(read_rollouts(path)):
        real = mask[row]
        assert rollout.text == responses[row] + EOS
        assert len(rollout) == real.sum()
        np.testing.assert_allclose(rollout.old_log_probs, old[row, real], atol=6e-6)
        np.testing.assert_allclose(rollout.corrupted_log_probs, corrupted[row, real], atol=6e-6)
        np.testing.assert_allclose(rollout.weights, weights[row, real].float(), atol=6e-6)
        np.testing.assert_array_equal(rollout.roles, roles[row, real])
        scores = torch.where(roles == Role.PERCEPTION, visual, consistency)[row, real]
        np.testing.assert_allclose(rollout.scores, torch.where(roles[row, real] > 0, scores, 0.0), atol=6e-6)
        assert rollout.broken == broken[row]
        assert rollout.swapped == (other.donors[row] >= 0)
        assert (rollout.group, rollout.step, rollout.finished) == ("park", 7, True)
    assert rollout.extra == {}


def test_a_character_split_over_tokens_is_written_with_offsets(tmp_path):
    tokenizer = byte_bpe()
    snowman = tokenizer.encode("a☃").ids
    assert len(snowman) > 2  # else the test shows nothing
    with RolloutWriter(tmp_path / "r.jsonl", tokenizer=tokenizer, eos_token_id=()) as writer:
        writer.write(torch.tensor([snowman]), torch.ones(1, len(snowman)).bool())
    (rollout,) = read_rollouts(tmp_path / "r.jsonl")
    assert rollout.text == "a☃"
    assert rollout.pieces[:2] == ["a", "☃"]
    assert not any(rollout.pieces[2:])
    assert not rollout.finished


def test_texts_need_no_tokenizer_and_the_mask_says_where_they_lie(tmp_path):
    path = tmp_path / "r.jsonl"
    log_probs = torch.tensor([[-9.0, -1.0, -2.0], [-3.0, -9.0, -9.0]])
    mask = torch.tensor([[False, True, True], [True, False, False]])
    with RolloutWriter(path, tags=RoleTags(("<p>", "</p>"), ("<t>", "</t>"), None)) as writer:
        writer.write([["a", "b"], ["c"]], mask, old_log_probs=log_probs)
        writer.write([["a", "\ud800"]], old_log_probs=log_probs[:1])
    with RolloutWriter(path, mode="append") as writer:
        writer.write([["d"]], ids=["last"], finished=[False])
    first, second, third, last = read_rollouts(path)
    assert first.old_log_probs.tolist() == [-1.0, -2.0]
    assert second.old_log_probs.tolist() == [-3.0]
    assert third.old_log_probs.tolist() == [-9.0, -1.0]
    assert third.text == "a?"
    assert first.tags.perception == ("<p>", "</p>")
    assert first.tags.answer is None
    assert (last.id, last.finished, last.tags) == ("last", False, RoleTags())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(1, 2).long(), "mask": torch.ones(1, 2).bool()}, "needs RolloutWriter.path, tokenizer"),
        ({"tokens": [["a"]], "mask": torch.ones(1, 2).bool()}, "exactly the tokens at which the mask is True"),
        ({"tokens": [["a"]], "rewards": [1.0, 2.0]}, "reward: 2 values for 1 responses"),
        ({"tokens": [["a"]], "rewards": [float("nan")]}, "reward is nan at response 0"),
        ({"tokens": [["a", "b"]], "weights": torch.ones(1, 1)}, "weights has shape .1, 1., too small"),
        ({"tokens": [["a"]], "old_log_probs": torch.tensor([[torch.nan]])}, "old_log_probs is nan at response 0 token"),
        ({"tokens": [["a"]], "weights": torch.tensor([[torch.inf]])}, "weights is inf at response 0 token 0"),
        ({"tokens": [["a"]], "weights": -torch.ones(1, 1)}, "weights is -1.0 at response 0 token 0; it is at least 0"),
        (
            {"tokens": [["a"]], "up_divergence": torch.ones(1, 1), "down_divergence": -torch.ones(1, 1)},
            "down_divergence is -1.0 at response 0 token 0; it is at least 0",
        ),
        ({"tokens": [["a"]], "up_divergence": torch.ones(1, 1)}, "are written together: pass both"),
        ({"tokens": [["a"]], "visual_dependency": torch.ones(1, 1)}, "are written together: pass all three"),
        ({"tokens": [["a"]], "images": [torch.zeros(4, 2, 2)]}, "1 or 3 channels, height, width"),
    ],
)
def test_a_batch_that_cannot_be_written_is_refused_whole(tmp_path, arguments, message):
    with RolloutWriter(tmp_path / "r.jsonl") as writer, pytest.raises(ValueError, match=message):
        writer.write(**arguments)
    assert (tmp_path / "r.jsonl").read_text() == ""


def test_divergences_of_any_size_keep_their_digits(tmp_path):
    """One small step moves a distribution by far less than the rounding of a log-probability."""
    down, up = torch.tensor([[1.23456e-9, 0.0]]), torch.tensor([[1234.56, 4e-7]])
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        writer.write([["a", "b"]], down_divergence=down, up_divergence=up)
    SCHEMA.validate(json.loads((tmp_path / "r.jsonl").read_text()))
    (rollout,) = read_rollouts(tmp_path / "r.jsonl")
    np.testing.assert_allclose(rollout.down_divergence, down[0], rtol=1e-4)
    np.testing.assert_allclose(rollout.up_divergence, up[0], rtol=1e-4)


def test_a_tokenizer_needs_an_end(tmp_path):
    with pytest.raises(ValueError, match="eos_token_id must be given"):
        RolloutWriter(tmp_path / "r.jsonl", tokenizer=byte_bpe())


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_saved_once_each(tmp_path, channels):
    from PIL import Image

    pixels = torch.randint(0, 256, (channels, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.new("RGB", (3, 2), "red")
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        writer.write([["a"]] * 5, images=[pixels, pixels.float() / 255, picture, None, "there.jpg"])
    first, second, third, fourth, fifth = (rollout.image for rollout in read_rollouts(tmp_path / "r.jsonl"))
    assert first == second
    assert (fourth, fifth) == (None, "there.jpg")
    assert len(list((tmp_path / "r_images").iterdir())) == 2
    shown = np.asarray(Image.open(tmp_path / first))
    np.testing.assert_array_equal(shown, pixels.permute(1, 2, 0).numpy().squeeze())
    assert Image.open(tmp_path / third).getpixel((0, 0)) == (255, 0, 0)


def test_a_rollout_knows_what_counts_as_right():
    assert Rollout(text="").is_right is None
    assert Rollout(text="", reward=0.1).is_right is True
    assert Rollout(text="", reward=0.1, correct=False).is_right is False
