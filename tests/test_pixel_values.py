"""Corrupting what processors return: three layouts that agree with the raw image, rows of a batch, and counting."""

from functools import partial
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from helpers import random_images
from torch import Tensor

from srpo_core import ContextOptions, corrupt_images, corrupt_pixel_values
from srpo_core.options import CorruptionKind
from srpo_core.pixel_values import ImageFacts, corrupt_rows, count_images, image_facts

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
        ({"merge_size": 0}, "merge_size and temporal_patch_size must be at least 1"),
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


# What processors say of themselves


def test_image_facts_of_a_processor_and_of_an_image_processor():
    images = SimpleNamespace(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.2] * 3)
    for processor in (images, SimpleNamespace(image_processor=images, tokenizer=None)):
        assert image_facts(processor) == ([0.5] * 3, [0.2] * 3, 2, 2)
    images.merge_size, images.temporal_patch_size = 4, 1
    assert image_facts(images) == ([0.5] * 3, [0.2] * 3, 4, 1)
    images.do_normalize = False  # it rescales to [0, 1] only
    assert image_facts(images)[:2] == (0.0, 1.0)


def test_image_facts_of_a_tokenizer_are_none_and_of_half_a_processor_an_error():
    assert image_facts(SimpleNamespace(eos_token_id=0)) is None
    assert image_facts(SimpleNamespace(image_processor=None)) is None
    with pytest.raises(ValueError, match="SimpleNamespace has no image_mean and image_std, so black is not known"):
        image_facts(SimpleNamespace(do_normalize=True, image_mean=None, image_std=[0.2] * 3))


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


def test_corrupt_rows_of_what_no_image_processor_made_are_refused():
    row = qwen_row(random_images(3, 16, 16))
    with pytest.raises(ValueError, match="pixel_values must be a tensor made by an image processor, got list"):
        corrupt_rows([{"pixel_values": [1]}], [0], ContextOptions(), FACTS, step=0)
    with pytest.raises(ValueError, match="got Tensor and no image processor: SRPO cannot corrupt"):
        corrupt_rows([row], [0], ContextOptions(), None, step=0)
    assert corrupt_rows([{"input_ids": 3}, None], [0, 0], ContextOptions(), None, step=0)[0] == [{"input_ids": 3}, {}]
