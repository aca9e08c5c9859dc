"""Corruption: what each kind does, who shares a draw, and that the three processor layouts agree with the raw image."""

import math
import re
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srpo_core.corruption import CorruptionKind, corrupt_images, corrupt_pixel_values

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
KINDS = sorted(set(get_args(CorruptionKind)) - {"none"})
RANDOM_KINDS: list[CorruptionKind] = ["patch_mask", "noise", "patch_shuffle"]
TEMPORAL, PATCH, MERGE = 2, 4, 2  # a small Qwen: one token sees 8 x 8 pixels
TOKEN = PATCH * MERGE


def random_images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels away from black, white and gray, so that every painted pixel shows."""
    grays = torch.randint(20, 110, shape, generator=torch.Generator().manual_seed(seed))
    return grays.to(torch.uint8) if dtype == torch.uint8 else (grays / 255).to(dtype)


def normalise(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def flatten_as_qwen(frames: Tensor) -> tuple[Tensor, list[int]]:
    """Qwen2-VL's layout written out with loops: tokens, then the patches of a token; channel, frame, height, width."""
    count, _, height, width = frames.shape
    rows = []
    for t in range(0, count, TEMPORAL):
        for token_y in range(0, height, TOKEN):
            for token_x in range(0, width, TOKEN):
                for y in range(token_y, token_y + TOKEN, PATCH):
                    for x in range(token_x, token_x + TOKEN, PATCH):
                        patch = frames[t : t + TEMPORAL, :, y : y + PATCH, x : x + PATCH]
                        rows.append(torch.cat([patch[:, channel].flatten() for channel in range(3)]))
    return torch.stack(rows), [count // TEMPORAL, height // PATCH, width // PATCH]


def flatten_images(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Still images, each frame twice, as the processor repeats them."""
    flat = [flatten_as_qwen(torch.stack([image] * TEMPORAL)) for image in images]
    return torch.cat([rows for rows, _ in flat]), torch.tensor([grid for _, grid in flat])


def corrupt_qwen(pixels: Tensor, grid: Tensor, prompt_ids: list[int], **options) -> Tensor:
    options = {"image_mean": MEAN, "image_std": STD, "merge_size": MERGE, "temporal_patch_size": TEMPORAL, **options}
    return corrupt_pixel_values(pixels, prompt_ids=torch.tensor(prompt_ids), image_grid_thw=grid, **options)


def corrupt_one(image: Tensor, prompt_id: int = 0, **options) -> Tensor:
    return corrupt_images(image[None], prompt_ids=torch.tensor([prompt_id]), **options)[0]


# Every kind, on every layout


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    channels=st.integers(1, 4),
    height=st.integers(5, 20),
    width=st.integers(5, 20),
    seed=st.integers(-(2**63), 2**63),
)
def test_a_new_tensor_of_the_same_shape_dtype_and_range_and_nothing_else(kind, dtype, channels, height, width, seed):
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


@pytest.mark.parametrize("kind", KINDS)
def test_all_processor_layouts_agree_with_corrupting_the_raw_image_first(kind):
    images = random_images(3, 3, 16, 24)
    ids, paint = torch.tensor([3, 8, 8]), {"image_mean": MEAN, "image_std": STD}
    raw = corrupt_images(images, prompt_ids=ids, kind=kind, patch_size=TOKEN, seed=5, step=2)
    expected, options = normalise(raw), {"kind": kind, "seed": 5, "step": 2}

    flat = corrupt_qwen(*flatten_images(list(normalise(images))), ids.tolist(), **options)
    torch.testing.assert_close(flat, flatten_images(list(expected))[0])
    planes = corrupt_pixel_values(normalise(images), prompt_ids=ids, patch_size=TOKEN, **paint, **options)
    torch.testing.assert_close(planes, expected)
    tiled = corrupt_pixel_values(normalise(images)[:, None], prompt_ids=ids, patch_size=TOKEN, **paint, **options)
    torch.testing.assert_close(tiled[:, 0], expected)


def test_flattened_layout_is_that_of_the_transformers_processor():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=TEMPORAL, min_pixels=64, max_pixels=4096
    )
    images = [random_images(3, 16, 24, dtype=torch.uint8), random_images(3, 8, 32, seed=1, dtype=torch.uint8)]
    processed = processor(images=[image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    ours, grid = flatten_images([(image / 255 - mean) / std for image in images])
    torch.testing.assert_close(processed["pixel_values"], ours)
    assert torch.equal(processed["image_grid_thw"], grid)


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


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_images_of_one_prompt_with_different_sizes_do_not_disturb_each_other(kind):
    images = [
        normalise(random_images(3, 16, 24)),
        normalise(random_images(3, 40, 8)),
        normalise(random_images(3, 8, 8)),
    ]
    pixels, grid = flatten_images(images)
    together = corrupt_qwen(pixels, grid, [1, 1, 2], kind=kind, unchanged="keep")
    counts = grid.prod(1).tolist()
    for rows, alone, size, prompt_id in zip(together.split(counts), pixels.split(counts), grid, [1, 1, 2], strict=True):
        assert torch.equal(rows, corrupt_qwen(alone, size[None], [prompt_id], kind=kind, unchanged="keep"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_draw_does_not_depend_on_the_dtype(dtype):
    images = torch.randint(20, 110, (2, 3, 16, 16)) / 128  # exact in every dtype
    ids = torch.tensor([0, 1])
    for kind in RANDOM_KINDS:
        expected = corrupt_images(images, prompt_ids=ids, kind=kind, patch_size=4)
        corrupted = corrupt_images(images.to(dtype), prompt_ids=ids, kind=kind, patch_size=4)
        tolerance = 0.0 if kind != "noise" else torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
        torch.testing.assert_close(corrupted.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_corruption_on_the_gpu(kind):
    pixels, grid = flatten_images(list(normalise(random_images(4, 3, 16, 24))))
    ids = torch.tensor([0, 0, 1, 2])
    options = {"kind": kind, "image_mean": MEAN, "image_std": STD}
    expected = corrupt_pixel_values(pixels, prompt_ids=ids, image_grid_thw=grid, **options)
    state = torch.cuda.get_rng_state()
    corrupted = corrupt_pixel_values(pixels.cuda(), prompt_ids=ids.cuda(), image_grid_thw=grid.cuda(), **options)
    assert corrupted.is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.testing.assert_close(corrupted.cpu(), expected, rtol=1e-4, atol=1e-4)


# What each kind does


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0.01, 1.0), side=st.integers(1, 7), height=st.integers(1, 30), width=st.integers(1, 30))
def test_patch_mask_paints_the_share_of_whole_patches_black(share, side, height, width):
    masked = corrupt_one(random_images(3, height, width), strength=share, patch_size=side) == 0
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


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_patch_mask_hides_whole_language_model_tokens_in_the_flattened_layout(share):
    pixels, grid = flatten_images([normalise(random_images(3, 40, 24)), normalise(random_images(3, 16, 64))])
    corrupted = corrupt_qwen(pixels, grid, [0, 1], strength=share)
    black = flatten_images([normalise(torch.zeros(3, TOKEN, TOKEN))])[0][:1]
    hidden = (corrupted - black).abs().amax(1) < 1e-6
    assert torch.equal(corrupted[~hidden], pixels[~hidden])
    tokens = hidden.view(-1, MERGE**2)
    assert torch.equal(tokens.all(1), tokens.any(1))
    for image in tokens.all(1).split((grid.prod(1) // MERGE**2).tolist()):
        assert image.sum() == max(1, round(share * len(image)))


def test_black_and_gray_have_their_meaning_in_pixels():
    image = random_images(3, 4, 6, dtype=torch.uint8)
    assert (corrupt_one(image, kind="black") == 0).all()
    assert (corrupt_one(image, kind="gray") == 128).all()
    pixels = normalise(image[None] / 255)
    options = {"prompt_ids": torch.tensor([0]), "image_mean": MEAN, "image_std": STD}
    levels: dict[CorruptionKind, float] = {"black": 0.0, "gray": 0.5}
    for kind, level in levels.items():
        expected = normalise(torch.full((1, 3, 4, 6), level))
        torch.testing.assert_close(corrupt_pixel_values(pixels, kind=kind, **options), expected)


def test_noise_has_the_stated_standard_deviation_in_pixels():
    options = {"prompt_ids": torch.tensor([0]), "kind": "noise", "strength": 0.1}
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
    torch.testing.assert_close(corrupt_one(image, kind="blur", strength=sigma), expected)


def test_pixelate_paints_each_block_in_its_mean_even_at_the_border():
    image = random_images(2, 7, 10, dtype=torch.float64)
    corrupted = corrupt_one(image, kind="pixelate", strength=4)
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
    corrupted = corrupt_one(image, kind="patch_shuffle", strength=share, patch_size=2)
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


def test_other_image_resizes_a_donor_of_another_size():
    images = [normalise(random_images(3, *size, seed=seed)) for seed, size in enumerate([(8, 8), (16, 24)])]
    corrupted = corrupt_qwen(*flatten_images(images), [1, 2], kind="other_image")
    resized = [
        torch.nn.functional.interpolate(donor[None], image.shape[1:], mode="bilinear", antialias=True)[0]
        for image, donor in zip(images, reversed(images), strict=True)
    ]
    torch.testing.assert_close(corrupted, flatten_images(resized)[0])


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_all_frames_of_a_video_share_the_draw(kind):
    frame = normalise(random_images(3, 24, 16))
    still, _ = flatten_as_qwen(torch.stack([frame] * TEMPORAL))
    video, grid = flatten_as_qwen(torch.stack([frame] * TEMPORAL * 3))
    corrupted = corrupt_qwen(video, torch.tensor([grid]), [0], kind=kind)
    assert torch.equal(corrupted, corrupt_qwen(still, torch.tensor([[1, *grid[1:]]]), [0], kind=kind).repeat(3, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_tiles_stay_zero_and_real_tiles_never_become_zero(kind):
    tiles = random_images(2, 3, 3, 8, 8).mul(2).sub(1)  # mean = std = 0.5: mid-gray is exactly 0
    tiles[0, 2] = 0.0
    tiles[1, 1:] = 0.0
    corrupted = corrupt_pixel_values(
        tiles, prompt_ids=torch.tensor([0, 1]), kind=kind, patch_size=4, image_mean=0.5, image_std=0.5
    )
    assert torch.equal((corrupted == 0).flatten(2).all(2), (tiles == 0).flatten(2).all(2))
    assert (corrupted[0, :2] != tiles[0, :2]).flatten(1).any(1).all()


def test_tiles_have_draws_of_their_own_that_padding_does_not_move():
    tiles = random_images(1, 1, 3, 16, 16).expand(1, 2, -1, -1, -1)
    options = {"prompt_ids": torch.tensor([0]), "patch_size": 2, "image_mean": 0.0, "image_std": 1.0}
    corrupted = corrupt_pixel_values(tiles, **options)
    assert not torch.equal(corrupted[0, 0], corrupted[0, 1])
    padded = torch.cat([tiles, torch.zeros(1, 2, 3, 16, 16)], 1)
    assert torch.equal(corrupt_pixel_values(padded, **options)[:, :2], corrupted)


# What is refused


def test_images_that_did_not_change_are_named_unless_they_are_kept():
    images = random_images(4, 3, 8, 8)
    images[1] = 0.0  # one colour: black cannot change it, so it is no sign of a mistake
    images[2:, :, ::2], images[2:, :, 1::2] = 0.25, 0.5
    images[2:] = images[2:].repeat_interleave(2, 2)[:, :, :8]  # blocks of 2 x 2 already
    ids = torch.tensor([0, 1, 3, 2])
    assert (corrupt_images(images, prompt_ids=ids, kind="black") == 0).all()
    with pytest.raises(ValueError, match=re.escape("kind='pixelate' left images [2, 3] as they were")):
        corrupt_images(images, prompt_ids=ids, kind="pixelate", strength=2)
    kept = corrupt_images(images, prompt_ids=ids, kind="pixelate", strength=2, unchanged="keep")
    assert torch.equal(kept[1:], images[1:])
    with pytest.raises(ValueError, match="batch with several prompts"):
        corrupt_images(images[:1], prompt_ids=ids[:1], kind="other_image")


@pytest.mark.parametrize("kind", ["patch_mask", "black", "gray", "noise"])
def test_kinds_that_need_to_know_black_do_not_guess_it(kind):
    with pytest.raises(ValueError, match="pass the image processor's image_mean and image_std"):
        corrupt_pixel_values(torch.randn(1, 3, 16, 16), prompt_ids=torch.tensor([0]), kind=kind, image_mean=MEAN)


def test_no_image_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="without its image placeholders"):
        corrupt_one(random_images(3, 8, 8), kind="none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, r"strength of kind='patch_mask' must be in \(0, 1\], got 0"),
        ({"strength": 1.1}, r"must be in \(0, 1\], got 1.1"),
        ({"strength": math.nan}, r"must be in \(0, 1\], got nan"),
        ({"kind": "blur", "strength": math.inf}, "strength of kind='blur'"),
        ({"kind": "pixelate", "strength": 2.5}, "whole number of pixels, at least 2, got 2.5"),
        ({"kind": "pixelate", "strength": 1}, "at least 2, got 1"),
        ({"kind": "gray", "strength": 0.5}, "strength has no meaning for kind='gray'"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        corrupt_one(random_images(3, 8, 8), **options)


def test_unknown_kinds_and_pixels_of_the_wrong_sort_are_named():
    image = random_images(3, 8, 8)
    with pytest.raises((TypeError, ValueError), match=r"kind must be one of 'patch_mask', .* got 'sepia'"):
        corrupt_one(image, kind="sepia")
    with pytest.raises(ValueError, match="divide by 255"):
        corrupt_one(image * 255)
    with pytest.raises(ValueError, match="must be in"):
        corrupt_one(image * math.nan)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        corrupt_one((image * 255).long())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid_thw": None}, "got no grid for 2 axes"),
        ({"image_grid_thw": torch.tensor([[1, 4, 4]])}, "describes 16 rows, but pixel_values has 24"),
        ({"image_grid_thw": torch.tensor([[1, 3, 8]])}, r"multiples of merge_size=2, got \[1, 3, 8\] for image 0"),
        ({"image_grid_thw": torch.tensor([[0, 4, 6]])}, "must hold positive sizes"),
        ({"temporal_patch_size": 3}, r"temporal_patch_size=3 \* patch_size\*\*2 features, got 96"),
        ({"merge_size": 0}, "merge_size and temporal_patch_size must be at least 1"),
        ({"patch_size": 12}, "patch_size must be a multiple of 8, one token's pixels, got 12"),
        ({"image_std": 0.0}, "image_std must be above 0"),
        ({"image_mean": (0.5, 0.5)}, "image_mean must be one number or one for each of 3 channels, got 2"),
        ({"pixel_values": torch.randn(24, 96)[None]}, "pixel_values must have 2 axes"),
        ({"pixel_values": torch.randn(1, 3, 8, 8)}, "got a grid for 4 axes"),
        ({"pixel_values": torch.randn(2, 3, 8, 8), "image_grid_thw": None}, r"one entry per image \(2\), got 1"),
    ],
)
def test_layouts_that_do_not_fit_are_named(changes, message):
    pixels, grid = flatten_images([normalise(random_images(3, 16, 24))])
    arguments = {
        "pixel_values": pixels,
        "prompt_ids": torch.tensor([0]),
        "image_grid_thw": grid,
        "image_mean": MEAN,
        "image_std": STD,
    }
    with pytest.raises(ValueError, match=message):
        corrupt_pixel_values(**{**arguments, **changes})


def test_a_batch_without_images_comes_back_empty():
    nothing = torch.zeros(0, dtype=torch.int64)
    options = {"prompt_ids": nothing, "image_mean": MEAN, "image_std": STD}
    assert corrupt_images(torch.zeros(0, 3, 8, 8), prompt_ids=nothing).shape == (0, 3, 8, 8)
    assert corrupt_pixel_values(torch.zeros(0, 3, 8, 8), **options).shape == (0, 3, 8, 8)
    assert corrupt_pixel_values(torch.zeros(0, 4, 3, 8, 8), **options).shape == (0, 4, 3, 8, 8)
    grid = torch.zeros(0, 3, dtype=torch.int64)
    assert corrupt_pixel_values(torch.zeros(0, 1176), image_grid_thw=grid, **options).shape == (0, 1176)
