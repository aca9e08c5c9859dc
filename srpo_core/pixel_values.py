"""What image processors return -> the same with less to see in it, in each of the layouts that models take."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from srpo_core.corruption import Levels, Recipe, concatenate, corrupt_views, keys_of, needs_levels
from srpo_core.options import ContextOptions, CorruptionKind
from srpo_core.typechecking import typechecked

__all__ = ["ImageFacts", "corrupt_pixel_values", "corrupt_rows", "count_images", "image_facts"]

_RGB = 3
# Idefics-like models recognize a padding tile by its being zero throughout. No real tile may turn into one (mid-gray
# is exactly 0 where mean = std = 0.5), so it is lifted by less than a gray level, but not too little for float16.
_NOT_PADDING = 2.0**-12


class ImageFacts(NamedTuple):
    """What a processor did to images, as :func:`corrupt_pixel_values` asks for it.

    Attributes:
        image_mean: Subtracted after rescaling to [0, 1], one number or one per channel.
        image_std: What that was divided by.
        merge_size: Patches that the model merges into one token along each side, in the flattened layout.
        temporal_patch_size: Frames in a row of the flattened layout.
    """

    image_mean: float | Sequence[float]
    image_std: float | Sequence[float]
    merge_size: int
    temporal_patch_size: int


def image_facts(processor: Any) -> ImageFacts | None:
    """The facts of a processor of transformers, or of an image processor; None where there is no image processor.

    Raises:
        ValueError: If the image processor normalizes but does not say by what.

    Example:
        >>> class ImageProcessor:
        ...     do_normalize, image_mean, image_std, merge_size = True, [0.5] * 3, [0.5] * 3, 2
        >>> image_facts(ImageProcessor())
        ImageFacts(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], merge_size=2, temporal_patch_size=2)
    """
    images = getattr(processor, "image_processor", processor)
    if images is None or not hasattr(images, "do_normalize"):
        return None
    mean, std = (
        (getattr(images, "image_mean", None), getattr(images, "image_std", None)) if images.do_normalize else (0.0, 1.0)
    )
    if mean is None or std is None:
        raise ValueError(
            f"{type(images).__name__} has no image_mean and image_std, so black is not known: add them to "
            "preprocessor_config.json of the model"
        )
    return ImageFacts(mean, std, getattr(images, "merge_size", 2), getattr(images, "temporal_patch_size", 2))


@typechecked
def corrupt_pixel_values(
    pixel_values: Float[Tensor, "..."],
    *,
    prompt_ids: Int[Tensor, " images"],
    image_grid_thw: Int[Tensor, "images 3"] | None = None,
    image_index: Int[Tensor, " images"] | None = None,
    kind: CorruptionKind = "patch_mask",
    amount: float | None = None,
    patch_size: int | None = None,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
    image_mean: float | Sequence[float] | None = None,
    image_std: float | Sequence[float] | None = None,
    unchanged: Literal["raise", "keep"] = "raise",
    seed: int = 0,
    step: int = 0,
) -> Float[Tensor, "..."]:
    """Corrupted copy of what an image processor returned: corrupting first and then processing gives the same.

    Three layouts, told apart by the number of axes:

    - ``[images, channels, height, width]``;
    - ``[images, tiles, channels, height, width]``, each tile with a draw of its own. A tile of zeros is padding and
      stays. If the tiles show the same scene twice (a thumbnail and its crops), what one hides the other may show:
      corrupt such images before the processor, with :func:`~srpo_core.corrupt_images`;
    - ``[patches, features]`` with ``image_grid_thw``, as Qwen-VL flattens images and videos: ``merge_size**2``
      consecutive rows are one token of the language model, features run over (channel, frame, height, width).

    The number of placeholder tokens stays right, as the shape does: leave grid, ids and attention masks alone.

    Args:
        pixel_values: The processor's output, in one of the layouts above.
        prompt_ids: The prompt of each image (first axis, or row of the grid), as in :func:`~srpo_core.corrupt_images`.
        image_grid_thw: Frames, height and width of each image in rows of ``pixel_values``; flattened layout only.
        image_index: Which of its prompt's images each one is. None: 0 for all.
        kind: The corruption, see :mod:`srpo_core.corruption`. For "none", a pass without any image, build the prompt
            without its image placeholders and call the model without ``pixel_values``.
        amount: How much of it, in the kind's own unit. None: the kind's default.
        patch_size: Side of a patch in pixels. None: 14, or what one language-model token sees in the flattened layout,
            of which it must be a multiple.
        merge_size: Patches that the model merges into one token along each side; flattened layout only.
        temporal_patch_size: Frames in a row of the flattened layout.
        image_mean: The processor's ``image_mean``, one number or one per channel.
        image_std: The processor's ``image_std``, above 0. Both say where black and white are after normalization:
            ``patch_mask``, ``black``, ``gray`` and ``noise`` need them and do not guess. 0.0 and 1.0 if the processor
            only rescales to [0, 1].
        unchanged: What to do when an image of more than one color comes out as it went in.
        seed: First part of the key of the draw; any integer.
        step: Second part: a new optimizer step, a new draw.

    Returns:
        A new tensor of the same shape, dtype and device.

    Raises:
        ValueError: If the layout does not fit the arguments, mean and standard deviation are missing, an option is out
            of range, or ``unchanged="raise"`` and an image did not change.

    Example:
        Two rollouts of one prompt, each with a 28 x 56 image: two language-model tokens of four rows.

        >>> flattened, grid = torch.ones(16, 3 * 2 * 14 * 14), torch.tensor([[1, 2, 4], [1, 2, 4]])
        >>> masked = corrupt_pixel_values(flattened, prompt_ids=torch.tensor([7, 7]), image_grid_thw=grid, amount=0.5,
        ...                               image_mean=0.5, image_std=0.5)
        >>> (masked == -1).all(1).int()
        tensor([0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.int32)

    References:
        The flattened layout: ``Qwen2VLImageProcessor`` in transformers; Qwen2-VL, arXiv:2409.12191.
    """
    pixels = pixel_values.detach()
    keys = keys_of(prompt_ids, image_index)
    if pixels.ndim not in (2, 4, 5):
        raise ValueError(
            "pixel_values must have 2 axes (patches, features), 4 (images, channels, height, width) or 5 (images, "
            f"tiles, channels, height, width), got shape {tuple(pixels.shape)}"
        )
    if (pixels.ndim == 2) != (image_grid_thw is not None):
        raise ValueError(
            "image_grid_thw goes with flattened pixel_values of 2 axes, and only with them: "
            f"got {'no grid' if image_grid_thw is None else 'a grid'} for {pixels.ndim} axes"
        )
    if image_grid_thw is None and len(keys) != len(pixels):
        raise ValueError(f"prompt_ids must have one entry per image ({len(pixels)}), got {len(keys)}")
    channels = _RGB if pixels.ndim == 2 else pixels.shape[-3]
    levels = _normalized_levels(kind, image_mean, image_std, channels)
    recipe = Recipe(kind, amount, 14 if patch_size is None else patch_size, unchanged, seed, step)

    if image_grid_thw is not None:
        views, token_size = _unflatten(pixels, image_grid_thw, merge_size, temporal_patch_size)
        recipe = recipe._replace(patch_size=token_size if patch_size is None else patch_size)
        if recipe.patch_size % token_size:
            raise ValueError(f"patch_size must be a multiple of {token_size}, one token's pixels, got {patch_size}")
        corrupted = corrupt_views(views, keys, levels, recipe)
        rows = [_flatten(view, token_size // merge_size, merge_size, temporal_patch_size) for view in corrupted]
        return concatenate(rows, like=pixels)
    if pixels.ndim == 4:
        return concatenate(corrupt_views(list(pixels[:, None]), keys, levels, recipe), like=pixels)
    real = (pixels != 0).flatten(2).any(-1).nonzero().tolist()
    views = [pixels[image, tile, None] for image, tile in real]
    tile_keys = [keys[image]._replace(tile=tile) for image, tile in real]
    result = pixels.clone()
    for (image, tile), view in zip(real, corrupt_views(views, tile_keys, levels, recipe), strict=True):
        result[image, tile] = torch.where((view != 0).any(), view[0], _NOT_PADDING)
    return result


def count_images(
    pixel_values: Tensor,
    corrupted: Tensor,
    *,
    images_per_row: Sequence[int],
    image_grid_thw: Tensor | None = None,
) -> Int[Tensor, "rows 2"]:
    """Of each row of a batch its images, and how many of them the corruption left as they were.

    Args:
        pixel_values: What the processor returned, in one of the layouts of :func:`corrupt_pixel_values`.
        corrupted: What became of it.
        images_per_row: How many images each row has, in order.
        image_grid_thw: Of the flattened layout.

    Example:
        >>> from srpo_core.pixel_values import count_images
        >>> pixels = torch.ones(3, 3, 2, 2)
        >>> count_images(pixels, torch.cat([0 * pixels[:2], pixels[2:]]), images_per_row=[1, 2])
        tensor([[1, 0],
                [2, 1]])
    """
    sizes = [1] * len(pixel_values) if image_grid_thw is None else image_grid_thw.prod(1).tolist()
    pairs = zip(pixel_values.split(sizes), corrupted.split(sizes), strict=True)
    unchanged = torch.tensor([torch.equal(before, after) for before, after in pairs], dtype=torch.int64)
    same = [part.sum().item() for part in unchanged.split(list(images_per_row))]
    counts = torch.tensor([*zip(images_per_row, same, strict=True)], dtype=torch.int64).reshape(-1, 2)
    return counts.to(pixel_values.device)


_PIXELS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))


def corrupt_rows(
    rows: Sequence[Mapping[str, Any] | None],
    prompt_ids: Sequence[int],
    options: ContextOptions,
    facts: ImageFacts | None,
    *,
    step: int,
) -> tuple[list[dict[str, Any]], Int[Tensor, "rows 2"]]:
    """The processor's outputs of each row with corrupted pixels; grids and all else are shared with the originals.

    Rows of one prompt share a draw, and where their pixels are equal the corrupted tensor.

    Args:
        rows: Of each row what the processor made of its images, by name; empty or None for a row without images.
        prompt_ids: The prompt of each row, see :func:`~srpo_core.corrupt_images`.
        options: Which corruption.
        facts: From :func:`image_facts`.
        step: A new one, a new draw.

    Returns:
        The new rows, and of each its images and how many of them the corruption left as they were.

    Raises:
        ValueError: If pixels are in no layout that :func:`corrupt_pixel_values` knows.
    """
    distinct: list[_Images] = []
    places: list[dict[str, int]] = []  # of each row, where in `distinct` the pixels under each name are
    of_prompt: dict[tuple[int, str], list[int]] = defaultdict(list)
    for row, prompt in zip(rows, prompt_ids, strict=True):
        inputs, place = row or {}, {}
        for name, grid_name in _PIXELS:
            if (values := inputs.get(name)) is None:
                continue
            if not isinstance(values, Tensor) or facts is None:
                raise ValueError(
                    f"{name} must be a tensor made by an image processor, got {type(values).__name__}"
                    f"{' and no image processor' if facts is None else ''}: SRPO cannot corrupt this model's images"
                )
            pixels = _Images(name, prompt, values, inputs.get(grid_name))
            known = of_prompt[prompt, name]
            if (at := next((at for at in known if distinct[at].equals(pixels)), None)) is None:
                at = len(distinct)
                known.append(at)
                distinct.append(pixels)
            place[name] = at
        places.append(place)

    # All of one layout at once, so that `other_image` finds the images of the other prompts.
    changed: dict[int, tuple[Tensor, list[int]]] = {}
    by_layout: dict[tuple[str, torch.Size], list[int]] = defaultdict(list)
    for at, pixels in enumerate(distinct):
        by_layout[pixels.name, pixels.values.shape[1:]].append(at)
    for members in by_layout.values():
        changed |= zip(members, _corrupt([distinct[at] for at in members], options, facts, step=step), strict=True)

    corrupted = [
        dict(row or {}) | {name: changed[at][0] for name, at in place.items()}
        for row, place in zip(rows, places, strict=True)
    ]
    counts = [[sum(changed[at][1][k] for at in place.values()) for k in (0, 1)] for place in places]
    return corrupted, torch.tensor(counts, dtype=torch.int64).reshape(-1, 2)


class _Images(NamedTuple):
    name: str
    prompt: int
    values: Tensor
    grid: Tensor | None

    def equals(self, other: "_Images") -> bool:
        """Whether both show the same; the grid counts, because blank images of other sides have the same rows."""
        if self.values is not other.values and not torch.equal(self.values, other.values):
            return False
        return self.grid is other.grid or (
            self.grid is not None and other.grid is not None and torch.equal(self.grid, other.grid)
        )


def _corrupt(
    pixels: Sequence[_Images], options: ContextOptions, facts: ImageFacts | None, *, step: int
) -> list[tuple[Tensor, list[int]]]:
    """Of each the corrupted pixels, its images, and how many of these are as they were. All are of one layout."""
    values = torch.cat([each.values for each in pixels])
    grids = [each.grid for each in pixels if each.grid is not None]
    grid = torch.cat(grids) if grids else None
    images = [len(each.values) if each.grid is None else len(each.grid) for each in pixels]
    # Beside a video of the same prompt, an image draws for itself.
    first = 0 if pixels[0].name == "pixel_values" else 2**16
    changed = corrupt_pixel_values(
        values,
        prompt_ids=torch.tensor([each.prompt for each, n in zip(pixels, images, strict=True) for _ in range(n)]),
        image_index=torch.cat([torch.arange(n) + first for n in images]),
        image_grid_thw=grid,
        kind=options.corruption,
        amount=options.corruption_amount,
        seed=options.seed,
        step=step,
        unchanged="keep",
        **({} if facts is None else facts._asdict()),
    )
    counts = count_images(values, changed, images_per_row=images, image_grid_thw=grid).tolist()
    return list(zip(changed.split([len(each.values) for each in pixels]), counts, strict=True))


def _normalized_levels(
    kind: str, mean: float | Sequence[float] | None, std: float | Sequence[float] | None, channels: int
) -> Levels:
    if mean is None or std is None:
        if needs_levels(kind):
            raise ValueError(
                f"kind={kind!r} has to know what black is: pass the image processor's image_mean and image_std "
                "(processor.image_processor.image_mean, .image_std; 0.0 and 1.0 if it only rescales to [0, 1])"
            )
        mean, std = 0.0, 1.0
    mean_, std_ = (torch.tensor(value, dtype=torch.float64).reshape(-1, 1, 1) for value in (mean, std))
    for argument, value in (("image_mean", mean_), ("image_std", std_)):
        if len(value) not in (1, channels):
            raise ValueError(f"{argument} must be one number or one for each of {channels} channels, got {len(value)}")
    if not (std_ > 0).all():
        raise ValueError(f"image_std must be above 0, got {std}")
    return Levels(-mean_ / std_, (1 - mean_) / std_)


def _unflatten(pixels: Tensor, grid_thw: Tensor, merge_size: int, frames: int) -> tuple[list[Tensor], int]:
    """Qwen's rows -> one [frame, channel, height, width] per image, and the side in pixels of what one token sees."""
    if merge_size < 1 or frames < 1:
        raise ValueError(f"merge_size and temporal_patch_size must be at least 1, got {merge_size} and {frames}")
    patch_size = math.isqrt(pixels.shape[1] // (_RGB * frames))
    if patch_size < 1 or _RGB * frames * patch_size**2 != pixels.shape[1]:
        raise ValueError(
            f"pixel_values must have {_RGB} channels * temporal_patch_size={frames} * patch_size**2 features, "
            f"got {pixels.shape[1]}"
        )
    grids = grid_thw.tolist()
    for image, (t, height, width) in enumerate(grids):
        if min(t, height, width) < 1 or height % merge_size or width % merge_size:
            raise ValueError(
                "image_grid_thw must hold positive sizes, height and width in multiples of "
                f"merge_size={merge_size}, got {[t, height, width]} for image {image}"
            )
    counts = [math.prod(grid) for grid in grids]
    if sum(counts) != len(pixels):
        raise ValueError(f"image_grid_thw describes {sum(counts)} rows, but pixel_values has {len(pixels)}")
    views = [
        rearrange(
            rows,
            "(t h w mh mw) (channel frame ph pw) -> (t frame) channel (h mh ph) (w mw pw)",
            t=t, h=height // merge_size, mh=merge_size, mw=merge_size, frame=frames, ph=patch_size, pw=patch_size,
        )
        for rows, (t, height, _) in zip(pixels.split(counts), grids, strict=True)
    ]  # fmt: skip
    return views, patch_size * merge_size


def _flatten(view: Tensor, patch_size: int, merge_size: int, frames: int) -> Tensor:
    return rearrange(
        view,
        "(t frame) channel (h mh ph) (w mw pw) -> (t h w mh mw) (channel frame ph pw)",
        frame=frames, mh=merge_size, mw=merge_size, ph=patch_size, pw=patch_size,
    )  # fmt: skip
