"""Corrupting what processors return: layouts that agree with the raw image, rows of a batch, and counting."""

import math
from functools import partial
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from helpers import random_images
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from srpo_core import ContextOptions, corrupt_images, corrupt_pixel_values, corruption
from srpo_core.corruption import Recipe
from srpo_core.options import CorruptionKind
from srpo_core.pixel_values import ImageFacts, corrupt_rows, count_images, images_without_padding

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
KINDS = sorted(set(get_args(CorruptionKind)) - {"none"})
RANDOM_KINDS: list[CorruptionKind] = ["patch_mask", "noise", "patch_shuffle"]
TEMPORAL, PATCH, MERGE = 2, 4, 2  # a small Qwen: one token sees 8 x 8 pixels
TOKEN = PATCH * MERGE
FACTS = ImageFacts(MEAN, STD, MERGE, TEMPORAL)


def normalize(images: Tensor) -> Tensor:
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


# Three layouts


@pytest.mark.parametrize("kind", KINDS)
def test_all_processor_layouts_agree_with_corrupting_the_raw_image_first(kind):
    images = random_images(3, 3, 16, 24)
    ids, paint = torch.tensor([3, 8, 8]), {"image_mean": MEAN, "image_std": STD}
    raw = corrupt_images(images, prompt_ids=ids, kind=kind, patch_size=TOKEN, seed=5, step=2)
    expected, options = normalize(raw), {"kind": kind, "seed": 5, "step": 2}

    flat = corrupt_qwen(*flatten_images(list(normalize(images))), ids.tolist(), **options)
    torch.testing.assert_close(flat, flatten_images(list(expected))[0])
    planes = corrupt_pixel_values(normalize(images), prompt_ids=ids, patch_size=TOKEN, **paint, **options)
    torch.testing.assert_close(planes, expected)
    tiled = corrupt_pixel_values(normalize(images)[:, None], prompt_ids=ids, patch_size=TOKEN, **paint, **options)
    torch.testing.assert_close(tiled[:, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["patch_mask", "black", "gray"])
def test_painting_rows_is_painting_pixels_to_the_last_bit(kind, dtype):
    images = normalize(random_images(3, 3, 20, 24))[:, :, :16].to(dtype)
    ids = torch.tensor([3, 8, 8])
    painted = corrupt_pixel_values(images, prompt_ids=ids, patch_size=TOKEN, kind=kind, image_mean=MEAN, image_std=STD)
    flat = corrupt_qwen(*flatten_images(list(images)), ids.tolist(), kind=kind)
    assert torch.equal(flat, flatten_images(list(painted))[0])


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


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_images_of_one_prompt_with_different_sizes_do_not_disturb_each_other(kind):
    images = [
        normalize(random_images(3, 16, 24)),
        normalize(random_images(3, 40, 8)),
        normalize(random_images(3, 8, 8)),
    ]
    pixels, grid = flatten_images(images)
    together = corrupt_qwen(pixels, grid, [1, 1, 2], kind=kind, unchanged="keep")
    counts = grid.prod(1).tolist()
    for rows, alone, size, prompt_id in zip(together.split(counts), pixels.split(counts), grid, [1, 1, 2], strict=True):
        assert torch.equal(rows, corrupt_qwen(alone, size[None], [prompt_id], kind=kind, unchanged="keep"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_corruption_on_the_gpu(kind):
    pixels, grid = flatten_images(list(normalize(random_images(4, 3, 16, 24))))
    ids = torch.tensor([0, 0, 1, 2])
    options = {"kind": kind, "image_mean": MEAN, "image_std": STD}
    expected = corrupt_pixel_values(pixels, prompt_ids=ids, image_grid_thw=grid, **options)
    state = torch.cuda.get_rng_state()
    corrupted = corrupt_pixel_values(pixels.cuda(), prompt_ids=ids.cuda(), image_grid_thw=grid.cuda(), **options)
    assert corrupted.is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.testing.assert_close(corrupted.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_patch_mask_hides_whole_language_model_tokens_in_the_flattened_layout(share):
    pixels, grid = flatten_images([normalize(random_images(3, 40, 24)), normalize(random_images(3, 16, 64))])
    corrupted = corrupt_qwen(pixels, grid, [0, 1], amount=share)
    black = flatten_images([normalize(torch.zeros(3, TOKEN, TOKEN))])[0][:1]
    hidden = (corrupted - black).abs().amax(1) < 1e-6
    assert torch.equal(corrupted[~hidden], pixels[~hidden])
    tokens = hidden.view(-1, MERGE**2)
    assert torch.equal(tokens.all(1), tokens.any(1))
    for image in tokens.all(1).split((grid.prod(1) // MERGE**2).tolist()):
        assert image.sum() == max(1, round(share * len(image)))


def test_black_and_gray_have_their_meaning_in_pixels():
    pixels = normalize(random_images(1, 3, 4, 6))
    options = {"prompt_ids": torch.tensor([0]), "image_mean": MEAN, "image_std": STD}
    levels: dict[CorruptionKind, float] = {"black": 0.0, "gray": 0.5}
    for kind, level in levels.items():
        expected = normalize(torch.full((1, 3, 4, 6), level))
        torch.testing.assert_close(corrupt_pixel_values(pixels, kind=kind, **options), expected)


def test_other_image_resizes_a_donor_of_another_size():
    images = [normalize(random_images(3, *size, seed=seed)) for seed, size in enumerate([(8, 8), (16, 24)])]
    corrupted = corrupt_qwen(*flatten_images(images), [1, 2], kind="other_image")
    resized = [
        torch.nn.functional.interpolate(donor[None], image.shape[1:], mode="bilinear", antialias=True)[0]
        for image, donor in zip(images, reversed(images), strict=True)
    ]
    torch.testing.assert_close(corrupted, flatten_images(resized)[0])


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_all_frames_of_a_video_share_the_draw(kind):
    frame = normalize(random_images(3, 24, 16))
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


# Padding inside the tensor


def canvas(*sizes: tuple[int, int], side: int = 320, top: int = 0, left: int = 0) -> tuple[Tensor, Tensor]:
    """Normalized images of these sizes on canvases of zeros, and where they are as a mask."""
    pixels, mask = torch.zeros(len(sizes), 3, side, side), torch.zeros(len(sizes), side, side, dtype=torch.int64)
    for image, (height, width) in enumerate(sizes):
        box = (slice(top, top + height), slice(left, left + width))
        pixels[image, :, *box] = normalize(random_images(3, height, width, seed=image))
        mask[image, *box] = 1
    return pixels, mask


@pytest.mark.parametrize("told_by", ["image_sizes", "pixel_attention_mask"])
def test_two_of_four_real_patches_are_hidden_whatever_the_draw(told_by):
    pixels, mask = canvas((32, 32))
    where = {"image_sizes": torch.tensor([[32, 32]]), "pixel_attention_mask": mask.bool()}
    for prompt in range(200):
        corrupted = corrupt_pixel_values(
            pixels, prompt_ids=torch.tensor([prompt]), patch_size=16, image_mean=MEAN, image_std=STD,
            **{told_by: where[told_by]},
        )  # fmt: skip
        changed = (corrupted != pixels)[0].any(0)
        patches = [bool(changed[y : y + 16, x : x + 16].any()) for y in (0, 16) for x in (0, 16)]
        assert sum(patches) == 2
        assert not changed[32:].any()
        assert not changed[:, 32:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["image_sizes", "mask", "mask in the middle", "tiles", "patches"])
def test_an_image_amid_padding_is_corrupted_as_it_is_alone(kind, layout):
    """In its canvas as cut out of it, and the padding, which holds NaN here so that nothing can read it, as it was."""
    sizes, ids = [(32, 48), (16, 32)], torch.tensor([3, 8])
    start = 16 if layout == "mask in the middle" else 0
    pixels, mask = canvas(*sizes, side=64, top=start, left=start)
    alone = [pixels[i, :, start : start + h, start : start + w] for i, (h, w) in enumerate(sizes)]
    options = {"kind": kind, "image_mean": MEAN, "image_std": STD, "patch_size": 16}
    if kind == "other_image":
        views = [
            torch.nn.functional.interpolate(donor[None], own.shape[1:], mode="bilinear", antialias=True)[0]
            for own, donor in zip(alone, reversed(alone), strict=True)
        ]
    else:
        views = [
            corrupt_pixel_values(image[None], prompt_ids=ids[i : i + 1], **options)[0] for i, image in enumerate(alone)
        ]
    where = {"image_sizes": {"image_sizes": torch.tensor(sizes)}}.get(layout, {"pixel_attention_mask": mask})
    if layout == "patches":
        cut = [image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).reshape(-1, 192) for image in alone]
        rows = torch.full((2, 40, 192), math.nan)
        for image, patches in enumerate(cut):
            rows[image, : len(patches)] = patches
        shapes = torch.tensor(sizes) // 8
        real = torch.arange(40) < shapes.prod(1)[:, None]
        where = {"spatial_shapes": shapes, "pixel_attention_mask": real.int()}
        corrupted = corrupt_pixel_values(rows, prompt_ids=ids, **where, **options)
        assert corrupted[~real].isnan().all()
        expected = [view.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).reshape(-1, 192) for view in views]
        torch.testing.assert_close(corrupted[real], torch.cat(expected))
        return
    pixels = torch.where(mask[:, None].bool(), pixels, math.nan)
    if layout == "tiles":
        where = {"pixel_attention_mask": mask[:, None]}
        corrupted = corrupt_pixel_values(pixels[:, None], prompt_ids=ids, **where, **options)[:, 0]
    else:
        corrupted = corrupt_pixel_values(pixels, prompt_ids=ids, **where, **options)
    for i, (h, w) in enumerate(sizes):
        torch.testing.assert_close(corrupted[i, :, start : start + h, start : start + w], views[i])
    assert corrupted.isnan().equal(pixels.isnan())


def test_an_unchanged_image_amid_padding_is_refused():
    pixels, _ = canvas((32, 32), (64, 64))
    pixels[0, :, :16, :32], pixels[0, :, 16:32, :32] = -1.0, 1.0
    options = {"prompt_ids": torch.tensor([0, 1]), "image_sizes": torch.tensor([[32, 32], [64, 64]])}
    with pytest.raises(ValueError, match=r"kind='pixelate' left images \[0\] as they were"):
        corrupt_pixel_values(pixels, kind="pixelate", amount=16, **options)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            {"image_sizes": torch.tensor([[8, 9]])},
            r"image_sizes must be height and width .* at most \[8, 8\], got \[8, 9\]",
        ),
        ({"image_sizes": torch.tensor([[0, 8]])}, "image_sizes must be height and width of each image inside"),
        ({"pixel_attention_mask": torch.ones(1, 4, 4)}, r"pixel_attention_mask must have the shape .* \(1, 8, 8\)"),
        ({"pixel_attention_mask": torch.eye(8)[None]}, "pixel_attention_mask must mark one rectangle"),
        ({"spatial_shapes": torch.tensor([[1, 1]])}, "spatial_shapes goes with 3 axes"),
        ({"second_axis": "frames"}, "second_axis='frames' goes with 5 axes"),
        ({"second_axis": "crops"}, "second_axis must be one of 'tiles', 'frames', got 'crops'"),
    ],
)
def test_corrupt_pixel_values_names_places_that_do_not_fit(where, message):
    with pytest.raises(ValueError, match=message):
        corrupt_pixel_values(
            random_images(1, 3, 8, 8), prompt_ids=torch.tensor([0]), image_mean=MEAN, image_std=STD, **where
        )


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({}, "3 with spatial_shapes"),
        ({"spatial_shapes": torch.tensor([[3, 2]])}, "rows and columns of at most 4 patches in all"),
        (
            {"spatial_shapes": torch.tensor([[1, 2]]), "pixel_attention_mask": torch.ones(1, 4)},
            "must be 1 at the first patches of each image, as many as spatial_shapes",
        ),
        ({"spatial_shapes": torch.tensor([[1, 2]]), "patch_size": 12}, "patch_size must be a multiple of 8, one patch"),
    ],
)
def test_corrupt_pixel_values_names_padded_patches_that_do_not_fit(where, message):
    with pytest.raises(ValueError, match=message):
        corrupt_pixel_values(
            torch.ones(1, 4, 192), prompt_ids=torch.tensor([0]), image_mean=MEAN, image_std=STD, **where
        )


def test_images_without_padding_are_the_same_on_every_canvas():
    sizes = torch.tensor([[32, 48], [16, 32]])
    (small, mask), (large, large_mask) = (canvas((32, 48), (16, 32), side=side) for side in (48, 96))
    expected = [small[image, :, :height, :width] for image, (height, width) in enumerate(sizes.tolist())]
    tiles = torch.nn.functional.pad(large[:, None], (0, 0, 0, 0, 0, 0, 0, 2))  # and two tiles of zeros
    tile_mask = torch.nn.functional.pad(large_mask[:, None], (0, 0, 0, 0, 0, 2))
    for found in (
        images_without_padding(small, {"image_sizes": sizes}),
        images_without_padding(large, {"image_sizes": sizes}),
        images_without_padding(large, {"pixel_attention_mask": large_mask}),
        images_without_padding(small[:, None], {"pixel_attention_mask": mask[:, None]}),
        images_without_padding(tiles, {"pixel_attention_mask": tile_mask}),
    ):
        assert [len(parts) for parts in found] == [1, 1]
        assert all(torch.equal(part[0], image) for [part], image in zip(found, expected, strict=True))
    flat, grid = flatten_images(expected)
    assert torch.equal(torch.cat([part for [part] in images_without_padding(flat, {"image_grid_thw": grid})]), flat)
    patches = torch.arange(12.0).reshape(2, 2, 3)
    shapes = torch.tensor([[1, 1], [1, 2]])
    assert [len(part) for [part] in images_without_padding(patches, {"spatial_shapes": shapes})] == [1, 2]


# Frames and tiles


def test_frames_share_a_draw_and_tiles_do_not():
    """Of 16 patches 10 are hidden: in all four frames together too, while four tiles show nearly all."""
    frames = normalize(random_images(2, 4, 3, 16, 16)).abs() + 1  # nothing is black
    options = {"prompt_ids": torch.tensor([0, 1]), "patch_size": 4, "image_mean": MEAN, "image_std": STD}
    for axis, hidden_in_all in (("frames", {10}), ("tiles", set(range(6)))):
        changed = (corrupt_pixel_values(frames, second_axis=axis, **options) != frames).all(2)[:, :, ::4, ::4]
        assert changed.sum((-1, -2)).eq(10).all()
        assert set(changed.all(1).sum((-1, -2)).tolist()) <= hidden_in_all


@pytest.mark.parametrize("kind", KINDS)
def test_last_frames_of_zeros_are_padding(kind):
    frames = random_images(2, 3, 3, 8, 8) + 0.25
    frames[0, 2] = 0.0
    options = {"prompt_ids": torch.tensor([0, 1]), "patch_size": 4, "image_mean": 0.0, "image_std": 2.0, "kind": kind}
    corrupted = corrupt_pixel_values(frames, second_axis="frames", **options)
    assert not corrupted[0, 2].any()
    assert (corrupted[0, :2] != frames[0, :2]).flatten(1).any(1).all()


def test_masks_of_frames_that_differ_are_refused():
    mask = torch.ones(1, 2, 8, 8)
    mask[0, 1, 4:] = 0
    with pytest.raises(ValueError, match="pixel_attention_mask must be the same for all frames of a video"):
        corrupt_pixel_values(
            torch.ones(1, 2, 3, 8, 8), prompt_ids=torch.tensor([0]), kind="blur", second_axis="frames",
            pixel_attention_mask=mask,
        )  # fmt: skip


# What processors and configs hold


@pytest.mark.parametrize(
    "form", [14, (14, 14), [14, 14], torch.tensor([14, 14]), np.array([14, 14]), np.int64(14), 14.0,
             {"height": 14, "width": 14}, SimpleNamespace(height=14, width=14)],
)  # fmt: skip
def test_corrupt_pixel_values_takes_patch_sizes_of_any_form(form):
    pixels = normalize(random_images(2, 3, 28, 42))
    options = {"prompt_ids": torch.tensor([0, 1]), "image_mean": MEAN, "image_std": STD}
    expected = corrupt_pixel_values(pixels, patch_size=14, **options)
    assert torch.equal(corrupt_pixel_values(pixels, patch_size=form, **options), expected)
    raw = random_images(1, 3, 28, 42)
    one = {"prompt_ids": torch.tensor([0])}
    assert torch.equal(corrupt_images(raw, patch_size=form, **one), corrupt_images(raw, patch_size=14, **one))


def test_patches_may_be_rectangles():
    pixels = normalize(random_images(1, 3, 32, 32)).abs() + 1
    options = {"prompt_ids": torch.tensor([0]), "image_mean": MEAN, "image_std": STD}
    changed = corrupt_pixel_values(pixels, patch_size={"height": 8, "width": 16}, **options) != pixels
    cells = [changed[0, :, y : y + 8, x : x + 16].float().mean().item() for y in range(0, 32, 8) for x in (0, 16)]
    assert sorted(cells) == [0.0] * 3 + [1.0] * 5  # round(0.6 * 8)


@pytest.mark.parametrize("form", [tuple, list, np.array, torch.tensor, lambda value: np.array(value)[:, None, None]])
def test_corrupt_pixel_values_takes_means_and_sizes_of_any_form(form):
    pixels, grid = flatten_images([normalize(random_images(3, 16, 24))])
    wrapped = {
        "image_mean": form(MEAN),
        "image_std": form(STD),
        "merge_size": (2, 2),
        "temporal_patch_size": np.array(2),
    }
    torch.testing.assert_close(corrupt_qwen(pixels, grid, [0], **wrapped), corrupt_qwen(pixels, grid, [0]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch_size": "14"}, "patch_size must be a whole number of pixels, a pair .* got '14'"),
        ({"patch_size": (1, 14, 14)}, "patch_size must be a whole number of pixels"),
        ({"patch_size": 14.5}, "patch_size must be a whole number of pixels"),
        ({"patch_size": True}, "patch_size must be a whole number of pixels"),
        ({"patch_size": {"shortest_edge": 14}}, "patch_size must be a whole number of pixels"),
        ({"merge_size": (2, 1)}, r"merge_size must be one whole number, the same for height and width, got \(2, 1\)"),
        ({"temporal_patch_size": None}, "temporal_patch_size must be one whole number"),
        ({"image_mean": {"r": 0.5}}, "image_mean must be one number or one for each channel, got {'r': 0.5}"),
        ({"image_std": "0.5"}, "image_std must be one number or one for each channel, got '0.5'"),
        ({"image_mean": math.nan}, "image_mean must be one number or one for each channel, got nan"),
    ],
)
def test_corrupt_pixel_values_refuses_other_forms_in_a_sentence(wrong, message):
    pixels, grid = flatten_images([normalize(random_images(3, 16, 24))])
    with pytest.raises(ValueError, match=message):
        corrupt_qwen(pixels, grid, [0], **wrong)


# What it costs


class Written(TorchDispatchMode):
    """How many elements of new tensors operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            each.untyped_storage().data_ptr() for each in (*args, *(kwargs or {}).values()) if isinstance(each, Tensor)
        }
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.elements += result.numel()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["flattened", "images", "tiles"])
@pytest.mark.parametrize("kind", ["patch_mask", "black", "gray"])
def test_painting_writes_one_tensor_and_draws_once_for_each_prompt(monkeypatch, kind, layout, dtype):
    """16 rollouts of two prompts. benchmarks/corruption.py measures the time."""
    draws = []
    generator = Recipe.generator
    monkeypatch.setattr(Recipe, "generator", lambda self, key: draws.append(key) or generator(self, key))
    images = normalize(random_images(2, 3, 64, 64)).repeat_interleave(8, 0)
    options = {"prompt_ids": torch.arange(2).repeat_interleave(8), "kind": kind, "image_mean": MEAN, "image_std": STD}
    if layout == "flattened":
        pixels, grid = flatten_images(list(images))
        options["image_grid_thw"] = grid
    else:
        pixels = images if layout == "images" else images[:, None]
    with Written() as written:
        corrupt_pixel_values(pixels.to(dtype), **options)
    own_copy = 0 if dtype == torch.float32 else pixels.numel()  # .to(dtype) above
    assert written.elements - own_copy <= 1.4 * pixels.numel()
    assert len(draws) == (2 if kind == "patch_mask" else 0)


@pytest.mark.parametrize("kind", ["noise", "blur", "pixelate", "patch_shuffle", "other_image"])
def test_the_other_kinds_are_computed_once_for_each_distinct_image(monkeypatch, kind):
    calls = []
    act = corruption._KINDS[kind]
    monkeypatch.setitem(corruption._KINDS, kind, lambda *args: calls.append(1) or act(*args))
    pixels, grid = flatten_images(list(normalize(random_images(2, 3, 16, 24)).repeat_interleave(4, 0)))
    corrupted = corrupt_qwen(pixels, grid, [0] * 4 + [1] * 4, kind=kind)
    assert len(calls) == 2
    assert torch.equal(corrupted[:24], corrupted[24:48])


# Black and white


@pytest.mark.parametrize("kind", ["patch_mask", "black", "gray", "noise"])
def test_kinds_that_need_to_know_black_do_not_guess_it(kind):
    with pytest.raises(ValueError, match="pass the image processor's image_mean and image_std"):
        corrupt_pixel_values(torch.randn(1, 3, 16, 16), prompt_ids=torch.tensor([0]), kind=kind, image_mean=MEAN)


def test_kinds_that_paint_nothing_need_not_know_black():
    corrupt = partial(corrupt_pixel_values, normalize(random_images(2, 3, 16, 16)), prompt_ids=torch.tensor([0, 1]))
    for kind in ("blur", "pixelate", "patch_shuffle", "other_image"):
        blind = corrupt(kind=kind, patch_size=4)
        assert torch.equal(blind, corrupt(kind=kind, patch_size=4, image_mean=MEAN, image_std=STD))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid_thw": None}, "got no grid for 2 axes"),
        ({"image_grid_thw": torch.tensor([[1, 4, 4]])}, "describes 16 rows, but pixel_values has 24"),
        ({"image_grid_thw": torch.tensor([[1, 3, 8]])}, r"multiples of merge_size=2, got \[1, 3, 8\] for image 0"),
        ({"image_grid_thw": torch.tensor([[0, 4, 6]])}, "must hold positive sizes"),
        ({"temporal_patch_size": 3}, r"temporal_patch_size=3 \* patch_size\*\*2 features, got 96"),
        ({"merge_size": 0}, "merge_size must be at least 1, got 0"),
        ({"temporal_patch_size": 0}, "temporal_patch_size must be at least 1, got 0"),
        ({"patch_size": 12}, "patch_size must be a multiple of 8, one token's pixels, got 12"),
        ({"image_std": 0.0}, "image_std must be above 0"),
        ({"image_mean": (0.5, 0.5)}, "image_mean must be one number or one for each of 3 channels, got 2"),
        ({"pixel_values": torch.randn(24, 96)[None]}, "pixel_values must have 2 axes"),
        ({"pixel_values": torch.randn(1, 3, 8, 8)}, "got a grid for 4 axes"),
        ({"pixel_values": torch.randn(2, 3, 8, 8), "image_grid_thw": None}, r"one entry per image \(2\), got 1"),
    ],
)
def test_corrupt_pixel_values_names_layouts_that_do_not_fit(changes, message):
    pixels, grid = flatten_images([normalize(random_images(3, 16, 24))])
    arguments = {
        "pixel_values": pixels,
        "prompt_ids": torch.tensor([0]),
        "image_grid_thw": grid,
        "image_mean": MEAN,
        "image_std": STD,
    }
    with pytest.raises(ValueError, match=message):
        corrupt_pixel_values(**{**arguments, **changes})


def test_corrupt_pixel_values_of_an_empty_batch_is_empty():
    nothing = torch.zeros(0, dtype=torch.int64)
    options = {"prompt_ids": nothing, "image_mean": MEAN, "image_std": STD}
    assert corrupt_pixel_values(torch.zeros(0, 3, 8, 8), **options).shape == (0, 3, 8, 8)
    assert corrupt_pixel_values(torch.zeros(0, 4, 3, 8, 8), **options).shape == (0, 4, 3, 8, 8)
    grid = torch.zeros(0, 3, dtype=torch.int64)
    assert corrupt_pixel_values(torch.zeros(0, 1176), image_grid_thw=grid, **options).shape == (0, 1176)


def test_image_facts_are_arguments_of_corrupt_pixel_values():
    pixels, grid = flatten_images([normalize(random_images(3, 16, 24))])
    changed = corrupt_pixel_values(pixels, prompt_ids=torch.tensor([0]), image_grid_thw=grid, **FACTS._asdict())
    assert torch.equal(changed, corrupt_qwen(pixels, grid, [0]))


# Counting


def test_count_images_of_each_layout():
    planes = random_images(4, 3, 8, 8)
    changed = planes.clone()
    changed[1], changed[3] = 0.0, 0.0
    count = partial(count_images, images_per_row=[1, 0, 3])
    assert count(planes, changed).tolist() == [[1, 1], [0, 0], [3, 1]]
    assert count(planes[:, None], changed[:, None]).tolist() == [[1, 1], [0, 0], [3, 1]]
    flat, grid = flatten_images(list(planes))
    assert count(flat, flatten_images(list(changed))[0], image_grid_thw=grid).tolist() == [[1, 1], [0, 0], [3, 1]]
    assert count_images(planes[:0], planes[:0], images_per_row=[0, 0]).tolist() == [[0, 0]] * 2
    assert count_images(planes[:0], planes[:0], images_per_row=[]).shape == (0, 2)


# Rows of a batch, each with its own processor output


def qwen_row(*images: Tensor) -> dict[str, Tensor]:
    pixels, grid = flatten_images([normalize(image) for image in images])
    return {"pixel_values": pixels, "image_grid_thw": grid}


def test_corrupt_rows_equals_one_call_for_each_prompt():
    a, b, c = (random_images(3, *size, seed=seed) for seed, size in enumerate([(16, 24), (8, 32), (16, 16)]))
    rows = [qwen_row(a, b), None, qwen_row(c), {}, qwen_row(a, b)]
    before = [{name: value.clone() for name, value in (row or {}).items()} for row in rows]
    options = ContextOptions(corruption="noise", corruption_amount=0.2, seed=3)
    changed, counts = corrupt_rows(rows, [7, 7, 9, 9, 7], options, FACTS, step=5)
    assert counts.tolist() == [[2, 0], [0, 0], [1, 0], [0, 0], [2, 0]]
    assert changed[1] == changed[3] == {}
    for place, prompt in ((0, 7), (2, 9), (4, 7)):
        pixels, grid = rows[place].values()
        expected = corrupt_qwen(
            pixels, grid, [prompt] * len(grid), kind="noise", amount=0.2, seed=3, step=5,
            image_index=torch.arange(len(grid)),
        )  # fmt: skip
        assert torch.equal(changed[place]["pixel_values"], expected)
        assert changed[place]["image_grid_thw"] is grid
        for name, value in before[place].items():
            assert torch.equal(rows[place][name], value)


def test_corrupt_rows_of_equal_pixels_share_one_tensor():
    image, other = random_images(3, 16, 16), random_images(3, 16, 16, seed=1)
    changed, _ = corrupt_rows(
        [qwen_row(image), qwen_row(image), qwen_row(other)], [1, 1, 1], ContextOptions(), FACTS, step=0
    )
    one, same, another = (row["pixel_values"] for row in changed)
    assert one.data_ptr() == same.data_ptr() != another.data_ptr()


def test_corrupt_rows_tells_equal_pixels_of_other_shapes_apart():
    """A blank image of 8 x 32 pixels has the very rows of one of 32 x 8, and other patches."""
    wide, high = (qwen_row(torch.full((3, *size), 0.3)) for size in ((8, 32), (32, 8)))
    assert torch.equal(wide["pixel_values"], high["pixel_values"])
    options = ContextOptions(corruption="noise")
    together, _ = corrupt_rows([wide, high], [1, 1], options, FACTS, step=0)
    for row, changed in zip((wide, high), together, strict=True):
        (alone,), _ = corrupt_rows([row], [1], options, FACTS, step=0)
        assert torch.equal(changed["pixel_values"], alone["pixel_values"])


def test_corrupt_rows_finds_the_images_of_other_prompts():
    a, b = random_images(3, 16, 16), random_images(3, 16, 16, seed=1)
    rows, options = [qwen_row(a), qwen_row(b)], ContextOptions(corruption="other_image")
    changed, counts = corrupt_rows(rows, [1, 2], options, FACTS, step=0)
    for row, other in zip(changed, reversed(rows), strict=True):
        torch.testing.assert_close(row["pixel_values"], other["pixel_values"])
    assert counts.tolist() == [[1, 0], [1, 0]]
    (alone,), counts = corrupt_rows(rows[:1], [1], options, FACTS, step=0)  # kept and counted, not refused
    assert torch.equal(alone["pixel_values"], rows[0]["pixel_values"])
    assert counts.tolist() == [[1, 1]]


def test_corrupt_rows_with_videos_beside_images_draws_for_each():
    frames = torch.stack([normalize(random_images(3, 16, 16))] * 2 * TEMPORAL)
    video, grid = flatten_as_qwen(frames)
    row = qwen_row(random_images(3, 16, 16)) | {"pixel_values_videos": video, "video_grid_thw": torch.tensor([grid])}
    (changed,), counts = corrupt_rows([row], [1], ContextOptions(corruption="noise"), FACTS, step=0)
    assert counts.tolist() == [[2, 0]]
    image_noise = changed["pixel_values"] - row["pixel_values"]
    first_frames, last_frames = (changed["pixel_values_videos"] - video).chunk(2)
    torch.testing.assert_close(first_frames, last_frames)
    assert not torch.allclose(image_noise, first_frames)


def test_corrupt_rows_passes_on_whatever_tells_where_images_are():
    """Rows as Pixtral, Idefics, Aria, LFM2-VL and Gemma 4 have them, the last two in the same pixels."""
    options, facts = ContextOptions(corruption="black"), FACTS
    pixels, mask = canvas((32, 32), side=64)
    patches, real = torch.ones(1, 9, 192), torch.tensor([[1] * 6 + [0] * 3])
    positions = torch.tensor([[[x, y] for y in range(2) for x in range(3)] + [[-1, -1]] * 3])
    for row in (
        {"pixel_values": pixels, "image_sizes": [[32, 32]]},
        {"pixel_values": pixels, "pixel_mask": mask},
        {"pixel_values": pixels[:, None], "pixel_attention_mask": mask[:, None], "image_sizes": torch.tensor([[9, 9]])},
        {"pixel_values": patches, "pixel_attention_mask": real, "spatial_shapes": torch.tensor([[2, 3]])},
        {"pixel_values": patches, "image_position_ids": positions},
    ):
        (changed,), counts = corrupt_rows([row], [1], options, facts, step=0)
        values = row["pixel_values"]
        where = real.bool() if values.ndim == 3 else mask.bool() if values.ndim == 4 else mask[:, None].bool()
        moved = (changed["pixel_values"] != values).any(-1 if values.ndim == 3 else -3)
        assert torch.equal(moved, where)
        assert counts.tolist() == [[1, 0]]


def test_corrupt_rows_keeps_canvases_of_other_sizes_and_rows_without_sizes_apart():
    (a, _), (b, _) = canvas((32, 32), side=64), canvas((16, 48), side=48)
    rows = [
        {"pixel_values": a, "image_sizes": torch.tensor([[32, 32]])},
        {"pixel_values": b, "image_sizes": torch.tensor([[16, 48]])},
        {"pixel_values": a},
    ]
    changed, _ = corrupt_rows(rows, [1, 2, 1], ContextOptions(), FACTS, step=0, patch_size=(16, 16))
    hidden = [(new["pixel_values"] != old["pixel_values"]).any(1)[0] for new, old in zip(changed, rows, strict=True)]
    assert [mask.sum().item() // 256 for mask in hidden[:2]] == [2, 2]  # of 4 and of 3
    assert not hidden[0][32:].any()


def test_corrupt_rows_of_dense_videos_hides_the_same_of_each_frame():
    video = normalize(random_images(1, 4, 3, 40, 40)).abs() + 1
    (changed,), counts = corrupt_rows(
        [{"pixel_values_videos": video}], [1], ContextOptions(), FACTS, step=0, patch_size=10
    )
    hidden = (changed["pixel_values_videos"] != video).all(2)[0, :, ::10, ::10]
    assert hidden.sum((1, 2)).tolist() == [10] * 4
    assert hidden.all(0).sum() == 10
    assert counts.tolist() == [[1, 0]]


def test_corrupt_rows_reads_videos_by_the_video_processors_facts():
    """VideoLLaMA 3 merges patches of videos, and not of images."""
    frames = torch.stack([normalize(random_images(3, 16, 16))] * TEMPORAL)
    video, grid = flatten_as_qwen(frames)
    row = {"pixel_values_videos": video, "video_grid_thw": torch.tensor([grid])}
    other = FACTS._replace(merge_size=1)
    (expected,), _ = corrupt_rows([row], [1], ContextOptions(), FACTS, step=0)
    (changed,), _ = corrupt_rows([row], [1], ContextOptions(), other, step=0, video_facts=FACTS)
    assert torch.equal(changed["pixel_values_videos"], expected["pixel_values_videos"])
    (as_images,), _ = corrupt_rows([row], [1], ContextOptions(), other, step=0)
    assert not torch.equal(as_images["pixel_values_videos"], expected["pixel_values_videos"])


def test_corrupt_rows_of_what_no_image_processor_made_are_refused():
    row = qwen_row(random_images(3, 16, 16))
    with pytest.raises(ValueError, match="pixel_values must be a tensor made by an image processor, got list"):
        corrupt_rows([{"pixel_values": [1]}], [0], ContextOptions(), FACTS, step=0)
    with pytest.raises(ValueError, match="got Tensor and no image processor: SRPO cannot corrupt"):
        corrupt_rows([row], [0], ContextOptions(), None, step=0)
    with pytest.raises(ValueError, match="image_patches seems to hold images"):
        corrupt_rows([row | {"image_patches": torch.zeros(1, 3, 8)}], [0], ContextOptions(), FACTS, step=0)
    with pytest.raises(ValueError, match="pixel_values_videos must have 2 axes with video_grid_thw or 5"):
        corrupt_rows([{"pixel_values_videos": torch.zeros(1, 8, 9, 192)}], [0], ContextOptions(), FACTS, step=0)
    sound = {"input_features": torch.zeros(1, 80, 30)}
    (changed,), _ = corrupt_rows([row | sound], [0], ContextOptions(), FACTS, step=0)
    assert changed["input_features"] is sound["input_features"]
    assert corrupt_rows([{"input_ids": 3}, None], [0, 0], ContextOptions(), None, step=0)[0] == [{"input_ids": 3}, {}]
