"""A worker's rows: which prompt they answer, and where the tokens of a changed response stand. Needs no verl."""

import pytest
import torch
from srpo_verl.views import moved_positions, nested, refuse_per_token_inputs, source_tokens

from srpo_core import Role, SRPOConfig, counterfactual_responses
from srpo_core.batch import prompt_id
from srpo_core.pixel_values import ImageFacts, corrupt_rows

PROMPT = torch.tensor([1, 2, 3])


def flattened(seed, *grids):
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor(grids)
    pixels = torch.randn(int(grid.prod(1).sum()), 1176, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def test_a_group_shares_one_draw_on_whatever_worker_its_rows_are():
    facts = ImageFacts(image_mean=0.5, image_std=0.25, merge_size=2, temporal_patch_size=2)

    def corrupted(*rows):
        return corrupt_rows(rows, [prompt_id(PROMPT, row) for row in rows], SRPOConfig(), facts, step=1)[0]

    rows = [flattened(0, [1, 8, 8]), flattened(1, [1, 8, 8]), flattened(0, [1, 8, 8])]
    together, alone = corrupted(*rows), corrupted(flattened(0, [1, 8, 8]))
    assert torch.equal(together[2]["pixel_values"], alone[0]["pixel_values"])
    hidden = [new["pixel_values"] != old["pixel_values"] for new, old in zip(together, rows, strict=True)]
    assert torch.equal(hidden[0], hidden[2])
    assert not torch.equal(hidden[0], hidden[1])  # another image, another draw


def test_rows_say_where_their_images_are_and_videos_are_corrupted_too():
    """Half of 4 patches of a 32 x 32 image on its canvas; of a video the same of every frame."""
    facts = ImageFacts(image_mean=0.5, image_std=0.25, merge_size=2, temporal_patch_size=2)
    pixels = torch.zeros(1, 3, 320, 320)
    pixels[:, :, :32, :32] = 1.0
    video = {"pixel_values_videos": torch.ones(4 * 64, 1176), "video_grid_thw": torch.tensor([[4, 8, 8]])}
    rows = [{"pixel_values": pixels, "image_sizes": torch.tensor([[32, 32]])}, video]
    changed, counts = corrupt_rows(rows, [1, 2], SRPOConfig(), facts, step=1, patch_size=(16, 16))
    hidden = (changed[0]["pixel_values"] != pixels).any(1)[0]
    assert hidden.sum() == 2 * 16 * 16
    assert hidden[:32, :32].sum() == 2 * 16 * 16
    frames = (changed[1]["pixel_values_videos"] != video["pixel_values_videos"]).all(1).view(4, 64)
    assert frames.sum(1).tolist() == [4 * round(0.6 * 16)] * 4
    assert torch.equal(frames.all(0), frames[0])
    assert counts.tolist() == [[1, 0], [1, 0]]


def test_inputs_with_one_entry_per_token_are_refused():
    refuse_per_token_inputs([{}, None, {"pixel_values": torch.zeros(1)}])
    with pytest.raises(ValueError, match="token_type_ids.*one entry per token"):
        refuse_per_token_inputs([{"token_type_ids": torch.zeros(1, 4)}])


def test_rows_are_cut_to_their_lengths():
    rows = nested(torch.arange(6).reshape(2, 3), [3, 1])
    assert [row.tolist() for row in rows.unbind()] == [[0, 1, 2], [3]]


P, R, O = Role.PERCEPTION, Role.REASONING, Role.OTHER  # noqa: E741


def responses():
    ids = torch.tensor([[1, 10, 11, 2, 30, 31, 3], [1, 20, 2, 32, 33, 3, 0], [5, 6, 7, 0, 0, 0, 0]])
    roles = torch.tensor([[O, P, P, O, R, R, O], [O, P, O, R, R, O, O], [O] * 7])
    return ids, roles, ids > 0


@pytest.mark.parametrize("kind", ["swap", "drop"])
def test_positions_of_text_restart_as_consecutive(kind):
    ids, roles, mask = responses()
    changed = counterfactual_responses(ids, roles, mask, kind=kind)
    sources = source_tokens(changed)
    assert changed.token_ids.shape == sources.shape
    prompt_length = 4
    # Text position, then M-RoPE, which stands lower behind an image.
    row = torch.arange(prompt_length + 7).repeat(4, 1)
    row[1:, prompt_length:] -= 2
    for number, length in enumerate(changed.attention_mask.sum(1).tolist()):
        new = moved_positions(row, prompt_length, sources[number, :length])
        assert torch.equal(new[0], torch.arange(prompt_length + length))
        assert torch.equal(new[1, prompt_length:], torch.arange(length) + prompt_length - 2)
        assert torch.equal(new[:, :prompt_length], row[:, :prompt_length])


def test_an_image_inside_the_response_keeps_its_shape():
    """A tool's image, of 2 x 2 tokens, after the perception: M-RoPE counts it as two, and in two directions."""
    ids = torch.tensor([[1, 10, 11, 2, 90, 90, 90, 90, 30, 3]])
    mask = ids != 90
    roles = torch.tensor([[O, P, P, O, O, O, O, O, R, O]])
    positions = torch.tensor(
        [
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
            [0, 1, 2, 3, 4, 4, 4, 4, 6, 7],
            [0, 1, 2, 3, 4, 4, 5, 5, 6, 7],
            [0, 1, 2, 3, 4, 5, 4, 5, 6, 7],
        ]
    )
    changed = counterfactual_responses(ids, roles, mask, kind="drop")
    new = moved_positions(positions, 0, source_tokens(changed)[0])
    # The same, two places earlier; text axis: consecutive.
    assert torch.equal(new[0], torch.arange(8))
    assert torch.equal(new[1:, 2:], positions[1:, 4:] - 2)
