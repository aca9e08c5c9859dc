"""What is written is read again, whatever a trainer's tensors look like; a run that crashed goes on without a trace."""

import io
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import EOS, byte_bpe

from srpo_core import RoleTags, counterfactual_responses, segment_responses
from srpo_core.rollouts import SCHEMA_PATH, RolloutWriter, read_rollouts
from srpo_core.rollouts import writer as writer_module

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(1, 2).long(), "mask": torch.ones(1, 2).bool()}, "need RolloutWriter.path, tokenizer"),
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
        ({"tokens": [["a"]], "up_divergence": torch.ones(1, 1)}, "are written together: pass both or neither"),
        ({"tokens": [["a"]], "scores": torch.tensor([[torch.nan]])}, "scores is nan at response 0 token 0"),
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
    monkeypatch.setattr(writer_module, "_BLOCK_BYTES", block)
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
    monkeypatch.setattr(writer_module, "_BLOCK_BYTES", block)
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
    assert path.stat().st_size > 20 * writer_module._BLOCK_BYTES
    assert removed < sum(read) < removed + 2 * writer_module._BLOCK_BYTES
