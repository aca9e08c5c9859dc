"""A worker's rows -> corrupted and changed ones. Needs no verl."""

from types import SimpleNamespace

import pytest
import torch
from srpo_verl.views import (
    ImageFacts,
    corrupt_rows,
    image_facts,
    moved_positions,
    prompt_id,
    refuse_per_token_inputs,
    source_tokens,
)

from srpo_core import Role, SRPOConfig, corrupt_pixel_values, counterfactual_responses

FACTS = ImageFacts(image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.25), merge_size=2, temporal_patch_size=2)
PROMPT = torch.tensor([1, 2, 3])


def flattened(seed, *grids):
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor(grids)
    return {
        "pixel_values": torch.randn(int(grid.prod(1).sum()), 1176, generator=generator),
        "image_grid_thw": grid,
        "images_seqlens": torch.tensor([4]),
    }


def test_pixels_change_as_the_core_changes_them_and_nothing_else_does():
    row = flattened(0, [1, 4, 4], [1, 4, 6])
    before = row["pixel_values"].clone()
    (new,), counts = corrupt_rows([row], [PROMPT], SRPOConfig(seed=3), FACTS, step=5)
    number = prompt_id(PROMPT, row)
    expected = corrupt_pixel_values(
        before,
        prompt_ids=torch.tensor([number, number]),
        image_index=torch.tensor([0, 1]),
        image_grid_thw=row["image_grid_thw"],
        seed=3,
        step=5,
        **FACTS._asdict(),
    )
    assert torch.equal(new["pixel_values"], expected)
    assert not torch.equal(new["pixel_values"], before)
    assert torch.equal(row["pixel_values"], before)
    assert new["image_grid_thw"] is row["image_grid_thw"]
    assert new["images_seqlens"] is row["images_seqlens"]
    assert counts.tolist() == [[2, 0]]


def test_rows_without_images_stay_as_they_are():
    rows, counts = corrupt_rows([{}, None], [PROMPT, PROMPT], SRPOConfig(), None, step=1)
    assert rows == [{}, {}]
    assert counts.tolist() == [[0, 0], [0, 0]]


def test_a_group_shares_one_draw_wherever_its_rows_are():
    rows = [flattened(0, [1, 8, 8]), flattened(1, [1, 8, 8]), flattened(0, [1, 8, 8])]
    together, _ = corrupt_rows(rows, [PROMPT] * 3, SRPOConfig(), FACTS, step=1)
    alone, _ = corrupt_rows([flattened(0, [1, 8, 8])], [PROMPT], SRPOConfig(), FACTS, step=1)
    assert together[0]["pixel_values"] is together[2]["pixel_values"]
    assert torch.equal(together[2]["pixel_values"], alone[0]["pixel_values"])
    hidden = [new["pixel_values"] != old["pixel_values"] for new, old in zip(together, rows, strict=True)]
    assert torch.equal(hidden[0], hidden[2])
    assert not torch.equal(hidden[0], hidden[1])  # another image, another draw


def test_a_new_step_draws_anew():
    row = flattened(0, [1, 8, 8])
    first, second = (corrupt_rows([row], [PROMPT], SRPOConfig(), FACTS, step=step)[0][0] for step in (1, 2))
    assert not torch.equal(first["pixel_values"], second["pixel_values"])


def test_images_that_did_not_change_are_counted():
    row = flattened(0, [1, 2, 2], [1, 4, 4])
    row["pixel_values"][:4] = row["pixel_values"][:4].mean()
    config = SRPOConfig(corruption="patch_shuffle")  # one token cannot be shuffled
    _, counts = corrupt_rows([row], [PROMPT], config, FACTS, step=1)
    assert counts.tolist() == [[2, 1]]


def test_images_of_the_unflattened_layout():
    row = {"pixel_values": torch.rand(2, 3, 28, 28)}
    (new,), counts = corrupt_rows([row], [PROMPT], SRPOConfig(), FACTS, step=1)
    assert new["pixel_values"].shape == (2, 3, 28, 28)
    assert counts.tolist() == [[2, 0]]


def test_a_model_whose_images_are_no_tensor_is_refused():
    with pytest.raises(ValueError, match="must be a tensor made by an image processor, got list"):
        corrupt_rows([{"pixel_values": [torch.rand(3, 4, 4)]}], [PROMPT], SRPOConfig(), FACTS, step=1)


def test_inputs_with_one_entry_per_token_are_refused():
    refuse_per_token_inputs([{}, None, {"pixel_values": torch.zeros(1)}])
    with pytest.raises(ValueError, match="token_type_ids.*one entry per token"):
        refuse_per_token_inputs([{"token_type_ids": torch.zeros(1, 4)}])


def test_prompts_and_images_are_told_apart():
    numbers = [
        prompt_id(PROMPT, {}),
        prompt_id(PROMPT + 1, {}),
        prompt_id(PROMPT, flattened(0, [1, 4, 4])),
        prompt_id(PROMPT, flattened(1, [1, 4, 4])),
    ]
    assert len(set(numbers)) == 4
    assert numbers[2] == prompt_id(PROMPT.clone(), flattened(0, [1, 4, 4]))
    assert all(0 <= number < 2**63 for number in numbers)


def test_image_facts_say_how_pixels_were_normalised():
    images = SimpleNamespace(image_mean=[0.5], image_std=[0.2], do_normalize=True, merge_size=4)
    assert image_facts(SimpleNamespace(image_processor=images)) == ImageFacts([0.5], [0.2], 4, 2)
    images.do_normalize = False
    assert image_facts(SimpleNamespace(image_processor=images))[:2] == (0.0, 1.0)
    assert image_facts(None) is None
    with pytest.raises(ValueError, match="no image_mean"):
        image_facts(SimpleNamespace(image_processor=SimpleNamespace()))


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
