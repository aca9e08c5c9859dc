"""Corrupting images: what each kind does, and who shares a draw."""

import math
import re
from typing import get_args

import pytest
import torch
from helpers import random_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srpo_core import corrupt_images
from srpo_core.corruption import Key, Levels, Recipe, corrupt_views, distinct, have_changed, keys_of, needs_levels
from srpo_core.options import CorruptionKind
from srpo_core.processor_values import Sides

KINDS = sorted(set(get_args(CorruptionKind)) - {"none"})
RANDOM_KINDS: list[CorruptionKind] = ["patch_mask", "noise", "patch_shuffle"]


def write_views(views: list[Tensor], keys: list[Key], levels: Levels, recipe: Recipe) -> list[Tensor]:
    targets = [torch.full_like(view, math.nan) for view in views]
    moved = corrupt_views(views, targets, keys, levels, recipe)
    assert moved == [not torch.equal(*pair) for pair in zip(views, targets, strict=True)]
    return targets


def corrupt_one(image: Tensor, prompt_id: int = 0, **options) -> Tensor:
    return corrupt_images(image[None], prompt_ids=torch.tensor([prompt_id]), **options)[0]


# Every kind


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    channels=st.integers(1, 4),
    height=st.integers(5, 20),
    width=st.integers(5, 20),
    seed=st.integers(-(2**63), 2**63),
)
def test_corrupt_images_makes_a_new_tensor_of_the_same_shape_dtype_and_range_and_nothing_else(
    kind, dtype, channels, height, width, seed
):
    whole = random_images(4, channels, height, 2 * width, dtype=dtype)
    images = whole[:3, ..., ::2]  # a view: neither contiguous nor the whole storage
    before, random_state = whole.clone(), torch.get_rng_state()
    corrupted = corrupt_images(images, prompt_ids=torch.tensor([4, 4, -9]), kind=kind, patch_size=2, seed=seed)
    assert corrupted.shape == images.shape
    assert corrupted.dtype == dtype
    assert (corrupted != images).flatten(1).any(1).all()
    assert corrupted.min() >= 0
    assert corrupted.max() <= (255 if dtype == torch.uint8 else 1)
    corrupted.zero_()
    assert torch.equal(whole, before)
    assert torch.equal(torch.get_rng_state(), random_state)


# Who shares a draw


@pytest.mark.parametrize("kind", RANDOM_KINDS)
@settings(deadline=None, max_examples=25)
@given(
    prompt_ids=st.lists(st.integers(-3, 3), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_a_draw_depends_on_its_prompt_and_not_on_the_rest_of_the_batch(kind, prompt_ids, order):
    images = random_images(1, 3, 12, 12).expand(len(prompt_ids), -1, -1, -1)
    corrupted = corrupt_images(images, prompt_ids=torch.tensor(prompt_ids), kind=kind, patch_size=2)
    for row, prompt_id in enumerate(prompt_ids):
        assert torch.equal(corrupted[row], corrupt_one(images[row], prompt_id, kind=kind, patch_size=2))
        for other, other_id in enumerate(prompt_ids):
            assert torch.equal(corrupted[row], corrupted[other]) == (prompt_id == other_id)
    permutation = list(range(len(prompt_ids)))
    order.shuffle(permutation)
    again = corrupt_images(
        images[permutation], prompt_ids=torch.tensor(prompt_ids)[permutation], kind=kind, patch_size=2
    )
    assert torch.equal(again, corrupted[permutation])


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_seed_step_prompt_and_image_index_each_change_the_draw_and_do_not_stand_in_for_one_another(kind):
    image = random_images(3, 24, 24)
    draws = [
        corrupt_images(
            image[None],
            prompt_ids=torch.tensor([prompt]),
            image_index=torch.tensor([index]),
            kind=kind,
            patch_size=2,
            seed=seed,
            step=step,
        )
        for seed, step, prompt, index in ((s, t, p, i) for s in (0, 1) for t in (0, 1) for p in (0, 1) for i in (0, 1))
    ]
    assert all(not torch.equal(draws[i], draws[j]) for i in range(len(draws)) for j in range(i))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_draw_does_not_depend_on_the_dtype(dtype):
    images = torch.randint(20, 110, (2, 3, 16, 16)) / 128  # exact in every dtype
    ids = torch.tensor([0, 1])
    for kind in RANDOM_KINDS:
        expected = corrupt_images(images, prompt_ids=ids, kind=kind, patch_size=4)
        corrupted = corrupt_images(images.to(dtype), prompt_ids=ids, kind=kind, patch_size=4)
        tolerance = 0.0 if kind != "noise" else torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
        torch.testing.assert_close(corrupted.float(), expected, rtol=tolerance, atol=tolerance)


# What each kind does


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0.01, 1.0), side=st.integers(1, 7), height=st.integers(1, 30), width=st.integers(1, 30))
def test_patch_mask_paints_the_share_of_whole_patches_black(share, side, height, width):
    masked = corrupt_one(random_images(3, height, width), amount=share, patch_size=side) == 0
    states = [
        masked[:, y : y + side, x : x + side].float().mean().item()
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]
    assert set(states) <= {0.0, 1.0}
    assert sum(states) == max(1, round(share * len(states)))


def test_every_patch_is_masked_equally_often():
    images = random_images(1, 1, 8, 8).expand(2000, -1, -1, -1)
    masked = corrupt_images(images, prompt_ids=torch.arange(2000), patch_size=2)[:, 0, ::2, ::2] == 0
    share = masked.float().mean(0)
    assert masked.float().mean().item() == pytest.approx(10 / 16)  # round(0.6 * 16) of 16
    assert (share - 10 / 16).abs().max() < 5 * math.sqrt(10 / 16 * 6 / 16 / 2000)


def test_black_and_gray_have_their_meaning_in_pixels():
    image = random_images(3, 4, 6, dtype=torch.uint8)
    assert (corrupt_one(image, kind="black") == 0).all()
    assert (corrupt_one(image, kind="gray") == 128).all()
    assert (corrupt_one(image / 255, kind="gray") == 0.5).all()


def test_noise_has_the_stated_standard_deviation_in_pixels():
    options = {"prompt_ids": torch.tensor([0]), "kind": "noise", "amount": 0.1}
    image = torch.full((1, 3, 100, 100), 0.5)
    noise = corrupt_images(image, **options) - image
    assert noise.mean().item() == pytest.approx(0.0, abs=0.003)
    assert noise.std().item() == pytest.approx(0.1, rel=0.03)


def test_blur_is_the_gaussian_mean_around_each_pixel():
    image, sigma = random_images(1, 9, 7, dtype=torch.float64), 1.5
    radius = math.ceil(3 * sigma)
    expected = torch.zeros_like(image)
    for y in range(9):
        for x in range(7):
            total = 0.0
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    weight = math.exp(-(dy * dy + dx * dx) / (2 * sigma**2))
                    total += weight
                    expected[0, y, x] += weight * image[0, min(max(y + dy, 0), 8), min(max(x + dx, 0), 6)]
            expected[0, y, x] /= total
    torch.testing.assert_close(corrupt_one(image, kind="blur", amount=sigma), expected)


def test_pixelate_paints_each_block_in_its_mean_even_at_the_border():
    image = random_images(2, 7, 10, dtype=torch.float64)
    corrupted = corrupt_one(image, kind="pixelate", amount=4)
    for y in (0, 4):
        for x in (0, 4, 8):
            block = image[:, y : y + 4, x : x + 4]
            expected = block.mean((1, 2), keepdim=True).expand_as(block)
            torch.testing.assert_close(corrupted[:, y : y + 4, x : x + 4], expected)


@pytest.mark.parametrize(("share", "moved"), [(0.25, 3), (0.5, 6), (1.0, 12)])
def test_patch_shuffle_moves_the_share_of_patches_and_loses_none(share, moved):
    patches = torch.arange(12.0).reshape(1, 3, 4) / 12
    image = patches.repeat_interleave(2, 1).repeat_interleave(2, 2)
    image = torch.nn.functional.pad(image, (0, 1, 0, 1), value=1.0)  # a border of cut patches stays in place
    corrupted = corrupt_one(image, kind="patch_shuffle", amount=share, patch_size=2)
    assert (corrupted[:, :6, :8] != image[:, :6, :8]).sum() == moved * 4
    assert torch.equal(corrupted[:, 0:6:2, 0:8:2].flatten().sort().values, patches.flatten())
    assert torch.equal(corrupted[:, 6], image[:, 6])
    assert torch.equal(corrupted[:, :, 8], image[:, :, 8])


def test_other_image_is_the_next_prompts_and_wraps_around_whatever_the_order():
    images = random_images(3, 3, 6, 6)[[0, 0, 1, 2]]
    corrupted = corrupt_images(images, prompt_ids=torch.tensor([9, 9, 2, 5]), kind="other_image")
    assert torch.equal(corrupted, images[[2, 2, 3, 0]])
    flipped = corrupt_images(images.flip(0), prompt_ids=torch.tensor([5, 2, 9, 9]), kind="other_image")
    assert torch.equal(flipped.flip(0), corrupted)


def test_other_image_passes_over_the_same_image_with_another_question():
    images = random_images(2, 3, 6, 6)[[0, 0, 1]]
    corrupted = corrupt_images(images, prompt_ids=torch.tensor([1, 2, 3]), kind="other_image")
    assert torch.equal(corrupted, images[[2, 2, 0]])


def test_other_image_takes_the_image_of_the_same_index():
    images = random_images(4, 3, 6, 6)
    index = torch.tensor([1, 0, 0, 1])
    corrupted = corrupt_images(images, prompt_ids=torch.tensor([1, 1, 2, 2]), image_index=index, kind="other_image")
    assert torch.equal(corrupted, images[[3, 2, 1, 0]])


# What is refused


def test_images_that_did_not_change_are_named_unless_they_are_kept():
    images = random_images(4, 3, 8, 8)
    images[1] = 0.0  # one color: black cannot change it, so it is no sign of a mistake
    images[2:, :, ::2], images[2:, :, 1::2] = 0.25, 0.5
    images[2:] = images[2:].repeat_interleave(2, 2)[:, :, :8]  # blocks of 2 x 2 already
    ids = torch.tensor([0, 1, 3, 2])
    assert (corrupt_images(images, prompt_ids=ids, kind="black") == 0).all()
    with pytest.raises(ValueError, match=re.escape("kind='pixelate' left images [2, 3] as they were")):
        corrupt_images(images, prompt_ids=ids, kind="pixelate", amount=2)
    kept = corrupt_images(images, prompt_ids=ids, kind="pixelate", amount=2, unchanged="keep")
    assert torch.equal(kept[1:], images[1:])
    with pytest.raises(ValueError, match="batch with several prompts"):
        corrupt_images(images[:1], prompt_ids=ids[:1], kind="other_image")


def test_no_image_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="without its image placeholders"):
        corrupt_one(random_images(3, 8, 8), kind="none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 0.0}, r"^amount of kind 'patch_mask' must be in \(0, 1\], got 0"),
        ({"amount": 1.1}, r"must be in \(0, 1\], got 1.1"),
        ({"amount": math.nan}, r"must be in \(0, 1\], got nan"),
        ({"kind": "blur", "amount": math.inf}, "amount of kind 'blur'"),
        ({"kind": "pixelate", "amount": 2.5}, "whole number of pixels, at least 2, got 2.5"),
        ({"kind": "pixelate", "amount": 1}, "at least 2, got 1"),
        ({"kind": "gray", "amount": 0.5}, "amount has no meaning for kind 'gray'"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        corrupt_one(random_images(3, 8, 8), **options)


def test_unknown_kinds_and_pixels_of_the_wrong_sort_are_named():
    image = random_images(3, 8, 8)
    with pytest.raises(ValueError, match=r"kind must be one of 'patch_mask', .* got 'sepia'"):
        corrupt_one(image, kind="sepia")
    with pytest.raises(ValueError, match="unchanged must be one of 'raise', 'keep', got 'ignore'"):
        corrupt_one(image, unchanged="ignore")
    with pytest.raises(ValueError, match="divide by 255"):
        corrupt_one(image * 255)
    with pytest.raises(ValueError, match="must be in"):
        corrupt_one(image * math.nan)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        corrupt_one((image * 255).long())


def test_corrupt_images_of_an_empty_batch_is_empty():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert corrupt_images(torch.zeros(0, 3, 8, 8), prompt_ids=nothing).shape == (0, 3, 8, 8)


# What pixel_values.py is built on


def test_keys_of_images_are_their_prompt_and_their_place_in_it():
    prompts = torch.tensor([3, 3, -1])
    assert keys_of(prompts, None) == [Key(3, 0, 0), Key(3, 0, 0), Key(-1, 0, 0)]
    assert keys_of(prompts, torch.tensor([0, 1, 5])) == [Key(3, 0, 0), Key(3, 1, 0), Key(-1, 5, 0)]


@pytest.mark.parametrize("kind", KINDS)
def test_corrupt_views_of_several_sizes_are_those_of_each_alone(kind):
    views = [random_images(2, 3, *size, seed=seed) for seed, size in enumerate([(8, 8), (6, 10), (8, 8)])]
    keys, levels = [Key(1, 0, 0), Key(2, 0, 0), Key(1, 0, 1)], Levels(torch.tensor(0.0), torch.tensor(1.0))
    recipe = Recipe.of(kind, None, Sides(2, 2), "raise", 0, 0)
    together = write_views(views, keys, levels, recipe)
    assert [view.shape for view in together] == [view.shape for view in views]
    if kind != "other_image":
        for view, key, changed in zip(views, keys, together, strict=True):
            (alone,) = write_views([view], [key], levels, recipe)
            assert torch.equal(alone, changed)


@pytest.mark.parametrize("kind", KINDS)
def test_needs_levels_is_true_of_the_kinds_that_paint(kind):
    """Those that look the same whatever black and white are called do not need them."""
    image = random_images(1, 1, 3, 8, 8)
    views = [image[0], random_images(1, 3, 8, 8, seed=1)]
    keys, recipe = [Key(1, 0, 0), Key(2, 0, 0)], Recipe.of(kind, None, Sides(2, 2), "keep", 0, 0)
    one, other = (
        write_views(views, keys, Levels(torch.tensor(black), torch.tensor(white)), recipe)[0]
        for black, white in ((0.0, 1.0), (-3.0, 2.0))
    )
    assert torch.equal(one, other) != needs_levels(kind)


def test_distinct_parts_have_their_label_and_values_in_common():
    one, other = torch.ones(2, 3), torch.zeros(2, 3)
    assert distinct([one, other, one.clone(), one, other], ["a", "a", "a", "b", "a"]) == [0, 1, 0, 3, 1]
    assert distinct([], []) == []


def test_have_changed_of_no_pair_is_empty():
    one = torch.ones(2, 3)
    assert have_changed([], []) == []
    assert have_changed([one, one], [one.clone(), one + 1]) == [False, True]
