"""What is written is read again, whatever a trainer's tensors look like; a run that crashed goes on without a trace."""

import base64
import errno
import io
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import EOS, byte_bpe

from srpo_core import RoleTags, counterfactual_responses, segment_responses
from srpo_core.rollouts import SCHEMA_PATH, RolloutWriter, line_file, read_rollouts

SCHEMA = jsonschema.Draft202012Validator(json.loads(SCHEMA_PATH.read_text()))
TEXT = "<perception>a cat</perception><think>it purrs</think><answer>cat</answer>"


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
    scores = torch.where(mask & (roles > 0), torch.randn(mask.shape, generator=g), 0.0)
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
            scores=torch.where(mask, scores, torch.nan),
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
        np.testing.assert_allclose(rollout.scores, scores[row, real], atol=6e-6)
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
    with RolloutWriter(path, resume_at=0) as writer:
        writer.write([["d"]], ids=["last"], finished=[False])
    first, second, third, last = read_rollouts(path)
    assert first.old_log_probs.tolist() == [-1.0, -2.0]
    assert second.old_log_probs.tolist() == [-3.0]
    assert third.old_log_probs.tolist() == [-9.0, -1.0]
    assert third.text == "a?"
    assert first.tags.perception == ("<p>", "</p>")
    assert first.tags.answer is None
    assert (last.id, last.finished, last.tags) == ("last", False, RoleTags())


WRONG_CALLS = [
    ({"tokens": torch.zeros(1, 2).long(), "mask": torch.ones(1, 2).bool()}, "need RolloutWriter.path, tokenizer"),
    ({"tokens": torch.zeros(1, 2).long()}, "need the mask"),
    ({"tokens": [["a"]], "mask": torch.ones(1, 2).bool()}, "exactly the tokens at which the mask is True"),
    ({"tokens": [["a"]], "mask": torch.ones(1, 1)}, "mask must be a boolean .batch, time. tensor, got float32.1, 1."),
    ({"tokens": [["a"]], "mask": torch.ones(2, 1).bool()}, "mask has 2 rows for the tokens of 1 responses"),
    ({"tokens": ["a"]}, "tokens must be a list of the texts of tokens for each response, got a text"),
    ({"tokens": [["a"]], "rewards": [1.0, 2.0]}, "reward: 2 values for 1 responses"),
    ({"tokens": [["a"]], "rewards": torch.ones(1, 1)}, "reward must have one value for each response, shape .1,."),
    ({"tokens": [["a"]], "prompts": "a"}, "prompt must be a list of one value for each response, got a str"),
    ({"tokens": [["a", "b"]], "weights": torch.ones(1, 1)}, "weights has shape .1, 1.; it must be .1, 2., or wider"),
    ({"tokens": [["a"]], "scores": [[1.0]]}, "scores must be a .batch, time. tensor, got a list"),
    (
        {"tokens": [["a"]], "mask": torch.tensor([[True, False]]), "weights": torch.ones(1, 3)},
        "weights has shape .1, 3.; it must be .1, 2., as the mask",
    ),
    ({"tokens": [["a"]], "up_divergence": torch.ones(1, 1)}, "are written together: pass both or neither"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_CALLS)
def test_a_first_call_that_is_wrong_is_refused_whole(tmp_path, arguments, message):
    with RolloutWriter(tmp_path / "r.jsonl") as writer, pytest.raises(ValueError, match=message):
        writer.write(**arguments)
    assert (tmp_path / "r.jsonl").read_text() == ""


@pytest.mark.parametrize(("arguments", "message"), WRONG_CALLS)
def test_a_later_call_that_is_wrong_ends_no_training(tmp_path, arguments, message, caplog):
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        writer.write([["first"]])
        writer.write(**arguments)
        writer.write(**arguments)
        writer.write([["last"]])
        ((_, reason), count), *others = writer.left_out.items()
    assert (reason, count, others) == ("a call that is wrong", 2, [])
    assert len(re.findall(message, caplog.text)) == 1
    read = list(read_rollouts(tmp_path / "r.jsonl"))
    assert (read[0].text, read[-1].text) == ("first", "last")
    assert {rollout.text for rollout in read[1:-1]} <= {"a", "ab"}


class Odd:
    """What a line cannot hold, and what does not even print."""

    def __repr__(self):
        raise RuntimeError("no name")


NAN, INF = torch.nan, torch.inf


@pytest.mark.parametrize(
    ("argument", "value", "field", "reason"),
    [
        ("old_log_probs", torch.tensor([[-1.0, NAN]]), "old_log_probs", "NaN"),
        ("old_log_probs", torch.tensor([[-1.0, INF]]), "old_log_probs", "infinite, or beyond single precision"),
        ("corrupted_log_probs", torch.tensor([[0.5, -1.0]]), "corrupted_log_probs", "above 0, which no log-prob"),
        ("scores", torch.tensor([[NAN, 0.0]]), "scores", "NaN"),
        ("scores", torch.tensor([[-INF, 0.0]]), "scores", "infinite"),
        ("scores", torch.tensor([[1e39, 0.0]]).double(), "scores", "infinite, or beyond single precision"),
        ("weights", torch.tensor([[INF, 1.0]]), "weights", "infinite"),
        ("weights", torch.tensor([[-1.0, 1.0]]), "weights", "below 0"),
        ("roles", torch.tensor([[99, 1]]), "roles", "not 0, 1 or 2"),
        ("roles", torch.tensor([[-1, 1]]), "roles", "not 0, 1 or 2"),
        ("broken", torch.tensor([99]), "broken", "none of BrokenReason"),
        ("rewards", [float("nan")], "reward", "NaN"),
        ("rewards", torch.tensor([INF]), "reward", "infinite"),
        ("rewards", ["much"], "reward", "a str, which is no number"),
        ("rewards", [Odd()], "reward", "TypeError"),
        ("advantages", np.array([np.nan]), "advantage", "NaN"),
        ("correct", torch.tensor([2]), "correct", "neither true nor false"),
        ("correct", [0.5], "correct", "neither true nor false"),
        ("group_ids", [float("nan")], "group", "a float, neither a whole number nor a text"),
        ("group_ids", [(1, 2)], "group", "a tuple, neither a whole number nor a text"),
        ("prompts", [[{"role": "user", "content": "how many?"}]], "prompt", "a list, which is no text"),
        ("references", [b"3"], "reference", "a bytes, which is no text"),
        ("step", -1, "step", "not a whole number, at least 0"),
        ("step", 0.5, "step", "not a whole number, at least 0"),
        ("open_at_start", ["middle"], "open_at_start", "no kind of block"),
        ("extra", [3], "extra", "a int, not a mapping"),
        ("extra", [{"odd": Odd()}], "extra", "a Odd, which JSON cannot hold"),
        ("extra", [{"number": float("nan")}], "extra", "not JSON (ValueError)"),
        ("images", [Odd()], "image", "a Odd, which is no image"),
        ("images", [torch.zeros(5, 2, 2)], "image", "an array that is not of 1, 3 or 4 channels, height and width"),
        ("images", [np.zeros((0, 4, 3))], "image", "an image without pixels"),
        ("images", [b"not a picture"], "image", "UnidentifiedImageError"),
        ("images", [{"caption": "a cat"}], "image", "an object without bytes or path"),
        ("images", ["data:image/png;base64,!"], "image", "a data: address that is not base64"),
    ],
)
def test_what_cannot_be_written_is_absent_counted_and_warned_of_once(tmp_path, caplog, argument, value, field, reason):
    path = tmp_path / "r.jsonl"
    with RolloutWriter(path) as writer:
        for _ in range(3):  # the first batch too: it is the data that are odd
            writer.write([["a", "b"]], **{argument: value})
        ((name, why), count), *others = writer.left_out.items()
        warned = [record for record in caplog.records if record.levelname == "WARNING"]
        assert len(warned) == 1
        assert f"{field} cannot be written and is left out: " in warned[0].getMessage()
    assert (name, count, others) == (field, 3, [])
    assert why.startswith(reason)
    # When it is closed, the file says what it lacks.
    assert caplog.records[-1].getMessage().startswith(f"{path} lacks what could not be written: {field} 3 ({reason}")
    for line in path.read_text().splitlines():
        SCHEMA.validate(json.loads(line))
        assert json.loads(line).keys() - {"extra"} == {"tokens"}
        assert json.loads(line).get("extra", {}) == {}
    assert len(list(read_rollouts(path))) == 3


def test_only_what_cannot_be_written_is_absent(tmp_path):
    """Of a batch the other responses, of a response the other fields, of an extra the other keys."""
    path = tmp_path / "r.jsonl"
    up, down = torch.ones(3, 2), torch.ones(3, 2)
    down[1, 0] = NAN
    weights = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, NAN]])
    with RolloutWriter(path) as writer:
        writer.write(
            [["a", "b"]] * 3,
            weights=weights,
            up_divergence=up,
            down_divergence=down,
            rewards=[1.0, float("nan"), None],
            correct=[True, None, -1],
            prompts=[None, "why?", 7],
            step=np.int64(4),
            group_ids=[np.int64(1), "one", 2.0],
            extra=[{"a": {1, 2}, "b": np.float32(0.5), 3: torch.tensor([1])}, None, {"n": np.nan}],
        )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("weights") for line in lines] == [[1, 2], [1, 2], None]
    # One divergence without the other says nothing.
    assert [line.get("up_divergence") for line in lines] == [[1, 1], None, [1, 1]]
    assert [line.get("down_divergence") for line in lines] == [[1, 1], None, [1, 1]]
    assert [line.get("reward") for line in lines] == [1, None, None]
    assert [line.get("correct") for line in lines] == [True, None, None]
    assert [line.get("prompt") for line in lines] == [None, "why?", "7"]
    assert [line["step"] for line in lines] == [4, 4, 4]
    assert [line["group"] for line in lines] == [1, "one", 2]
    assert [line.get("extra") for line in lines] == [{"b": 0.5, "3": [1]}, None, {}]
    # None is no fault: it says that a value is not known.
    assert writer.left_out == {
        ("weights", "NaN"): 1,
        ("down_divergence", "NaN"): 1,
        ("reward", "NaN"): 1,
        ("extra", "a set, which JSON cannot hold"): 1,
        ("extra", "not JSON (ValueError)"): 1,
    }


def test_tokens_that_cannot_be_decoded_are_written_all_the_same(tmp_path):
    class Strict:
        eos_token_id = 0

        def decode(self, ids):
            return "".join(" abc"[token] for token in ids)  # of a larger id an IndexError

    ids = torch.tensor([[1, 2, 0], [1, 99, 3]])
    with RolloutWriter(tmp_path / "r.jsonl", tokenizer=Strict()) as writer:
        writer.write(ids, torch.ones(2, 3).bool(), weights=torch.ones(2, 3))
        assert writer.left_out == {("tokens", "ids that cannot be decoded"): 1}
    first, second = read_rollouts(tmp_path / "r.jsonl")
    assert first.pieces == ["a", "b", " "]
    assert second.pieces == ["a", "\N{REPLACEMENT CHARACTER}", "c"]
    assert len(second.weights) == 3
    assert (first.finished, second.finished) == (True, False)


def test_a_full_disk_ends_no_training_and_tears_no_line(tmp_path, monkeypatch, caplog):
    """Of a file system that takes 100 bytes, then none, then everything."""
    room = [100]

    class Disk(io.FileIO):
        def write(self, data):
            taken = min(room[0], len(data))
            if not taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            room[0] -= taken
            return super().write(bytes(data)[:taken])

    monkeypatch.setattr(Path, "open", lambda self, mode, **options: Disk(self, mode.replace("b", "")))
    path = tmp_path / "r.jsonl"
    with RolloutWriter(path) as writer:
        monkeypatch.undo()
        write_step(writer, 0, rows=1)
        write_step(writer, 1, rows=9)
        write_step(writer, 2, rows=1)
        assert writer.left_out == {("response", "No space left on device"): 9 + (room[0] == 0)}
        assert caplog.text.count("No space left on device") == 1
        room[0] = 10**6
        write_step(writer, 3, rows=2)
    assert ids_of(path)[0] == "0/0"
    assert ids_of(path)[-2:] == ["3/0", "3/1"]
    assert not [name for name in ids_of(path) if name.startswith("1/")]


def test_a_device_without_room_and_a_closed_file_end_no_training(tmp_path, caplog):
    with RolloutWriter("/dev/full") as writer:
        for _ in range(3):
            writer.write([["a"]] * 2)
        assert writer.left_out == {("response", "No space left on device"): 6}
    assert caplog.text.count("cannot be written") == 1
    writer = RolloutWriter(tmp_path / "r.jsonl")
    writer.close()
    writer.write([["a"]])
    assert writer.left_out == {("response", "ValueError"): 1}


def test_a_path_that_cannot_be_written_is_named_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "r.jsonl"):
        with pytest.raises(OSError, match=str(tmp_path)):
            RolloutWriter(path)


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
        RolloutWriter(tmp_path / "r.jsonl", tokenizer=Endless())


class Endless:
    """A tokenizer that knows no token that ends a response."""

    def decode(self, ids):
        return "".join(map(chr, ids))


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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "F", "I"])
def test_images_of_every_mode_are_shown(tmp_path, mode):
    """As near to their colors as the mode allows."""
    from PIL import Image

    picture = Image.new("RGB", (3, 2), "white")
    picture = (
        picture.convert("RGBA").convert("RGBa") if mode == "RGBa" else picture.convert(mode if mode != "PA" else "P")
    )
    picture = picture.convert("PA") if mode == "PA" else picture
    assert picture.mode == mode
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        writer.write([["a"]] * 2, images=[picture, [picture, None]])
        assert not writer.left_out
    one, other = (rollout.image for rollout in read_rollouts(tmp_path / "r.jsonl"))
    assert one == other
    shown = Image.open(tmp_path / one)
    assert shown.format == "PNG"
    assert shown.size == (3, 2)
    assert shown.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_two_palettes_are_two_images(tmp_path):
    from PIL import Image

    pictures = [Image.new("P", (2, 2), 0) for _ in range(2)]
    for picture, color in zip(pictures, ([255, 0, 0], [0, 0, 255]), strict=True):
        picture.putpalette(color)
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        writer.write([["a"]] * 2, images=pictures)
    colors = [Image.open(tmp_path / r.image).convert("RGB").getpixel((0, 0)) for r in read_rollouts(writer.path)]
    assert colors == [(255, 0, 0), (0, 0, 255)]


def test_arrays_bytes_and_what_data_sets_hold_are_images(tmp_path):
    from PIL import Image

    pixels = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    images = [
        pixels,
        pixels / 255,
        (pixels / 255).astype(np.float16),
        pixels.astype(np.float32),
        pixels.astype(np.int64),
        pixels.astype(np.uint16) * 257,
        pixels > 0,
        torch.tensor(pixels).permute(2, 0, 1),
        torch.tensor(pixels).permute(2, 0, 1)[None].to(torch.bfloat16) / 255,
        np.moveaxis(pixels, 2, 0),
        np.concatenate([pixels, np.full((2, 2, 1), 255, np.uint8)], 2),
        file.getvalue(),
        {"bytes": file.getvalue(), "path": None},
        {"type": "image", "image": pixels},
        [pixels, pixels],
        f"data:image/bmp;base64,{base64.b64encode(file.getvalue()).decode()}",
        np.stack([pixels[..., 0]] * 3, 2)[:, :, :1],
    ]
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        writer.write([["a"]] * len(images), images=images)
    assert writer.left_out == {("image", "all but the first of several"): 1}
    shown = [np.asarray(Image.open(tmp_path / r.image).convert("RGB")) for r in read_rollouts(writer.path)]
    for each in shown[:-1]:
        np.testing.assert_array_equal(each, pixels)
    np.testing.assert_array_equal(shown[-1], pixels[..., :1].repeat(3, 2))
    with RolloutWriter(tmp_path / "paths.jsonl") as writer:
        names = ["there.png", Path("there.png"), {"path": "there.png"}, "https://example.org/cat.png", {}, "", []]
        writer.write([["a"]] * len(names), images=names)
    paths = [rollout.image for rollout in read_rollouts(tmp_path / "paths.jsonl")]
    assert paths == ["there.png"] * 3 + ["https://example.org/cat.png", None, None, None]


def test_a_torn_image_file_is_absent_and_no_part_of_one_stays(tmp_path, monkeypatch):
    from PIL import Image

    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    lazy = Image.open(tmp_path / "torn.png")
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        writer.write([["a"]], images=[lazy])
        assert list(writer.left_out) == [("image", "OSError")]

        def full(self, content):
            with open(self, "wb") as file:
                file.write(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        picture = Image.new("RGB", (2, 2))
        writer.write([["a"]], images=[picture])
        monkeypatch.undo()
        assert list((tmp_path / "r_images").iterdir()) == []
        writer.write([["a"]], images=[picture])  # and what had no room once has it now
    assert [rollout.image is None for rollout in read_rollouts(writer.path)] == [True, True, False]


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
anything |= st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=2), st.floats(), max_size=2)
anything |= st.builds(Odd) | st.complex_numbers() | st.dates() | st.sets(st.integers(), max_size=2)


@given(st.data())
def test_nothing_that_a_batch_may_hold_raises_or_spoils_a_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("r") / "r.jsonl"
    names = ["rewards", "advantages", "correct", "perception_correct", "group_ids", "finished", "prompts"]
    names += ["references", "images", "ids", "open_at_start", "extra", "broken", "donors"]
    values = {name: data.draw(st.lists(anything, min_size=2, max_size=2)) for name in names if data.draw(st.booleans())}
    per_token = {
        name: torch.tensor(data.draw(st.lists(st.lists(st.floats(), min_size=1, max_size=1), min_size=2, max_size=2)))
        for name in ("old_log_probs", "scores", "weights")
    }
    with RolloutWriter(path, correct_by="chance > 0") as writer:
        writer.write([["a"], ["b"]], step=data.draw(anything), **values, **per_token)
    assert ("response", "a call that is wrong") not in writer.left_out
    lines = path.read_text(encoding="utf-8").split("\n")
    for line in lines[:-1]:
        SCHEMA.validate(json.loads(line))
    assert [rollout.text for rollout in read_rollouts(path)] == ["a", "b"]


def test_the_rule_of_right_and_the_open_block_and_every_shape_of_tags_survive(tmp_path):
    path = tmp_path / "r.jsonl"
    with RolloutWriter(path, correct_by="accuracy > 0") as writer:
        writer.write([["a"]] * 3, correct=torch.tensor([1, 0, -1]), open_at_start=["reasoning", None, "perception"])
        writer.write([["a"]], open_at_start="answer")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        SCHEMA.validate(line)
    assert [rollout.correct for rollout in read_rollouts(path)] == [True, False, None, None]
    # A rule that did not tell is known too; without an argument there was none.
    assert [rollout.correct_by for rollout in read_rollouts(path)] == ["accuracy > 0"] * 3 + [None]
    kinds = [rollout.open_at_start for rollout in read_rollouts(path)]
    assert kinds == ["reasoning", None, "perception", "answer"]


# Resuming


def write_step(writer, step, rows=3):
    writer.write([["猫", f" {row}"] for row in range(rows)], ids=[f"{step}/{row}" for row in range(rows)], step=step)


def ids_of(path):
    """Every line is read, and none is malformed."""
    return [rollout.id for rollout in read_rollouts(path)]


@given(st.data())
def test_a_crashed_run_that_resumes_writes_no_line_twice_and_loses_none(tmp_path_factory, data):
    """Killed at any byte after its checkpoint, resumed from the checkpoint, killed again, resumed again."""
    path = tmp_path_factory.mktemp("r") / "rollouts.jsonl"
    rows = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6), label="rows of each step")
    checkpoint, resume_at = 0, None
    for _ in range(data.draw(st.integers(0, 3), label="crashes")):
        stop = data.draw(st.integers(checkpoint, len(rows)), label="steps before the crash")
        ends = {}  # of each step, in bytes
        with RolloutWriter(path, resume_at=resume_at) as writer:
            ends[checkpoint] = path.stat().st_size
            for step in range(checkpoint, stop):
                write_step(writer, step, rows[step])
                ends[step + 1] = path.stat().st_size
        # What was written before the checkpoint is on the disk; of the rest any part may be.
        checkpoint = data.draw(st.integers(checkpoint, stop), label="checkpoint")
        with path.open("r+b") as file:
            file.truncate(data.draw(st.integers(ends[checkpoint], ends[stop]), label="bytes that survive"))
        resume_at = checkpoint
    with RolloutWriter(path, resume_at=resume_at) as writer:
        for step in range(checkpoint, len(rows)):
            write_step(writer, step, rows[step])
    assert ids_of(path) == [f"{step}/{row}" for step, count in enumerate(rows) for row in range(count)]


@pytest.mark.parametrize("block", [1, 7, 2**16])
def test_a_torn_last_line_never_takes_the_next_with_it(tmp_path, monkeypatch, block):
    """Cut at every byte, also in the middle of a character."""
    monkeypatch.setattr(line_file, "_BLOCK_BYTES", block)
    path = tmp_path / "rollouts.jsonl"
    with RolloutWriter(path) as writer:
        write_step(writer, 0, rows=2)
    whole = path.read_bytes()
    first, last = whole.splitlines(keepends=True)
    assert "猫".encode() in last
    for cut in range(len(last) + 1):
        path.write_bytes(first + last[:cut])
        with RolloutWriter(path, resume_at=1) as writer:
            write_step(writer, 1, rows=1)
        is_whole = cut >= len(last) - 1  # without its newline it still is
        assert ids_of(path) == (["0/0", "0/1", "1/0"] if is_whole else ["0/0", "1/0"]), cut


STEP = '{{"text": "", "step": {}}}\n'.format
NO_STEP, MALFORMED = '{"text": ""}\n', '{"text": \n'


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        ([], 0),
        ([STEP(5)], 0),
        ([STEP(4)], 1),
        ([STEP(4), STEP(5), STEP(6)], 1),
        ([STEP(4), STEP("5.0")], 1),  # JSON has one kind of number
        # What has no step stays, and so does what comes before it: only the end of the file is removed.
        ([STEP(4), NO_STEP], 2),
        ([STEP(6), NO_STEP, STEP(5)], 2),
        ([STEP(6), STEP(4), STEP(7)], 2),
        ([STEP(4), STEP('"five"')], 2),
        (["[5]\n", STEP(5)], 1),
        # A line that is malformed but has its newline was not torn by the last crash.
        ([STEP(6), MALFORMED, STEP(5)], 2),
        ([STEP(4), STEP(5), "\n", " \n"], 1),
        ([STEP(4), STEP(5), "\n", '{"text": "", "st'], 1),
        ([STEP(4), "\0" * 99], 1),  # some file systems leave this after a power cut
        ([STEP(4), "  "], 1),
    ],
)
@pytest.mark.parametrize("block", [1, 2**16])
def test_only_the_end_of_the_file_is_removed(tmp_path, monkeypatch, lines, kept, block):
    monkeypatch.setattr(line_file, "_BLOCK_BYTES", block)
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(lines))
    RolloutWriter(path, resume_at=5).close()
    assert path.read_text() == "".join(lines[:kept])


def test_a_run_may_resume_without_a_file(tmp_path):
    path = tmp_path / "new" / "rollouts.jsonl"
    with RolloutWriter(path, resume_at=3) as writer:
        write_step(writer, 3, rows=1)
    assert ids_of(path) == ["3/0"]


def test_a_new_run_replaces_and_a_step_below_0_touches_nothing(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text(NO_STEP)
    with pytest.raises(ValueError, match="resume_at must be a step, at least 0, got -1"):
        RolloutWriter(path, resume_at=-1)
    assert path.read_text() == NO_STEP
    RolloutWriter(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("torn", ["", '{"text": "'])
def test_resuming_reads_no_more_than_what_it_removes(tmp_path, monkeypatch, torn):
    path = tmp_path / "rollouts.jsonl"
    steps, rows = 2000, 50
    lines = [STEP(step) for step in range(steps) for _ in range(rows)]
    path.write_text("".join(lines) + torn)
    read = []

    class Counting(io.FileIO):
        def readinto(self, buffer):
            count = super().readinto(buffer)
            read.append(count)
            return count

        def readall(self):
            raise AssertionError("the whole file is read")

    def counted_open(self, mode, **options):
        return io.BufferedRandom(Counting(self, mode)) if mode == "r+b" else open_path(self, mode, **options)

    open_path = Path.open
    monkeypatch.setattr(Path, "open", counted_open)
    RolloutWriter(path, resume_at=steps - 10).close()
    monkeypatch.undo()
    assert path.read_text() == "".join(lines[: (steps - 10) * rows])
    removed = sum(map(len, lines[(steps - 10) * rows :])) + len(torn)
    assert path.stat().st_size > 20 * line_file._BLOCK_BYTES
    assert removed < sum(read) < removed + 2 * line_file._BLOCK_BYTES
