"""What image processors return -> the same with less to see in it, in each of the layouts that models take."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from srpo_core.checked import choose
from srpo_core.corruption import Key, Levels, Recipe, have_changed, keys_of, needs_levels
from srpo_core.options import ContextOptions, CorruptionKind
from srpo_core.pixel_layouts import Dense, Patches, corrupt_dense, corrupt_patches
from srpo_core.processor_values import (
    PIXEL_NAMES,
    ImageFacts,
    Sides,
    channel_numbers,
    image_facts,
    image_token_id_of,
    refuse_unknown_pixels,
    sides,
    vision_patch_size,
    where_images_are,
    whole_number,
)
from srpo_core.typechecking import typechecked

__all__ = [
    "ImageFacts", "corrupt_pixel_values", "corrupt_rows", "count_images", "image_facts", "image_token_id_of",
    "images_without_padding", "refuse_unknown_pixels", "vision_patch_size", "where_images_are",
]  # fmt: skip

_RGB = 3


@typechecked
def corrupt_pixel_values(
    pixel_values: Float[Tensor, "..."],
    *,
    prompt_ids: Int[Tensor, " images"],
    image_grid_thw: Int[Tensor, "images 3"] | None = None,
    image_index: Int[Tensor, " images"] | None = None,
    image_sizes: Int[Tensor, "images 2"] | None = None,
    pixel_attention_mask: Shaped[Tensor, "images ..."] | None = None,
    spatial_shapes: Int[Tensor, "images 2"] | None = None,
    second_axis: Literal["tiles", "frames"] = "tiles",
    kind: CorruptionKind = "patch_mask",
    amount: float | None = None,
    patch_size: Any = None,
    merge_size: Any = 2,
    temporal_patch_size: Any = 2,
    image_mean: Any = None,
    image_std: Any = None,
    unchanged: Literal["raise", "keep"] = "raise",
    seed: int = 0,
    step: int = 0,
) -> Float[Tensor, "..."]:
    """A corrupted copy of what an image processor returned, as if the image had been corrupted before processing.

    Five layouts, told apart by the number of axes and by ``second_axis``; :mod:`srpo_core.pixel_layouts` says which
    families have which. Only the image itself is corrupted: padding around it stays as it was, is no part of the draw,
    and is not read.

    - ``[patches, features]`` with ``image_grid_thw``, as Qwen-VL flattens images and videos: ``merge_size**2``
      consecutive rows are one token of the language model, features run over (channel, frame, height, width);
    - ``[images, patches, features]`` with ``spatial_shapes``, padded at the end; rows in reading order, features over
      (height, width, channel);
    - ``[images, channels, height, width]``;
    - ``[images, tiles, channels, height, width]``, each tile with a draw of its own. A tile of zeros is padding and
      stays. If the tiles show the same scene twice (a thumbnail and its crops), what one hides the other may show:
      corrupt such images before the processor, with :func:`~srpo_core.corrupt_images`;
    - ``[videos, frames, channels, height, width]`` with ``second_axis="frames"``, all frames with one draw.

    The shape and the number of placeholder tokens stay the same, so leave the grid, the token ids and the attention
    masks as they are.

    Args:
        pixel_values: The processor's output, in one of the layouts above.
        prompt_ids: The prompt of each image (first axis, or row of the grid), as in :func:`~srpo_core.corrupt_images`.
        image_grid_thw: Frames, height and width of each image in rows of ``pixel_values``; layout of 2 axes. For videos
            pass ``video_grid_thw``.
        image_index: Which of its prompt's images each one is. None: 0 for all.
        image_sizes: Height and width of each image in pixels, from the top left; layout of 4 axes. None: no padding.
        pixel_attention_mask: Nonzero at pixels of the image, which fill one rectangle: the shape of ``pixel_values``
            without channels, or [images, patches] in the layout of 3 axes. It takes precedence over ``image_sizes``.
        spatial_shapes: Rows and columns of patches of each image; layout of 3 axes.
        second_axis: What the second of 5 axes holds.
        kind: The corruption, see :mod:`srpo_core.corruption`. For "none", a pass without any image, build the prompt
            without its image placeholders and call the model without ``pixel_values``.
        amount: The amount of the corruption, in the unit of its kind. None: the kind's default.
        patch_size: Side of a patch in pixels; one number, or height and width as a pair, a dict or anything else in
            which configs hold them. None: 14, or what one language-model token sees in the layouts of 2 and 3 axes; a
            multiple of that in 2 axes, of a patch's side in 3.
        merge_size: Patches that the model merges into one token along each side; layouts of 2 and 3 axes.
        temporal_patch_size: Frames in a row of the layout of 2 axes.
        image_mean: The processor's ``image_mean``, one number or one per channel, in any form.
        image_std: The processor's ``image_std``, above 0. Both say where black and white are after normalization:
            ``patch_mask``, ``black``, ``gray`` and ``noise`` need them and do not guess. 0.0 and 1.0 if the processor
            only rescales to [0, 1].
        unchanged: What to do when the corruption leaves an image of more than one color as it was.
        seed: The first part of the key of the draw; any integer.
        step: The second part of the key: each optimizer step has a new draw.

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
    choose("second_axis", second_axis, {"tiles": None, "frames": None})
    where = _Where(image_grid_thw, image_sizes, pixel_attention_mask, spatial_shapes, second_axis)
    keys = keys_of(prompt_ids, image_index)
    facts = (image_mean, image_std, merge_size, temporal_patch_size)
    recipe = (kind, amount, patch_size, unchanged, seed, step)
    return _corrupt(pixel_values.detach(), keys, where, facts, recipe)[0]


class _Where(NamedTuple):
    """What tells where in a pixel tensor the images are."""

    image_grid_thw: Tensor | None = None
    image_sizes: Tensor | None = None
    pixel_attention_mask: Tensor | None = None
    spatial_shapes: Tensor | None = None
    second_axis: Literal["tiles", "frames"] = "tiles"


def _corrupt(
    pixels: Tensor, keys: Sequence[Key], where: _Where, facts: tuple[Any, ...], recipe: tuple[Any, ...]
) -> tuple[Tensor, list[bool]]:
    """Corrupted pixels, and of each image whether it changed."""
    _check_layout(pixels, where)
    images = len(pixels) if where.image_grid_thw is None else len(where.image_grid_thw)
    if images != len(keys):
        raise ValueError(f"prompt_ids must have one entry per image ({images}), got {len(keys)}")
    mean, std, merge_size, temporal_patch_size = facts
    kind, amount, patch_size, *rest = recipe
    levels = _normalized_levels(kind, mean, std, _RGB if pixels.ndim < 4 else pixels.shape[-3])
    patch = Sides(14, 14) if patch_size is None else sides("patch_size", patch_size)
    if pixels.ndim < 4:
        merge_size = whole_number("merge_size", merge_size)
        if where.image_grid_thw is not None:
            frames = whole_number("temporal_patch_size", temporal_patch_size)
            patches, rows = Patches.of_qwen(pixels, where.image_grid_thw, merge_size, frames), pixels
        else:
            assert where.spatial_shapes is not None
            patches = Patches.of_naflex(pixels, where.spatial_shapes, where.pixel_attention_mask, merge_size)
            rows = pixels.flatten(0, 1)
        if patch_size is None:
            patch = Sides(patches.token_side, patches.token_side)
        changed, moved = corrupt_patches(rows, patches, keys, levels, Recipe.of(kind, amount, patch, *rest))
        return changed.view_as(pixels), moved
    tiles, dense = _dense(pixels, where)
    checked = Recipe.of(kind, amount, patch, *rest)
    changed, moved = corrupt_dense(tiles, dense, keys, levels, checked, is_tiled=pixels.ndim == 5)
    return changed.view_as(pixels), moved


def _dense(pixels: Tensor, where: _Where) -> tuple[Tensor, Dense]:
    """Pixels of 4 or 5 axes as five, and where the images are in them."""
    is_tiled, mask = pixels.ndim == 5, where.pixel_attention_mask
    if not is_tiled:
        pixels, mask = pixels[:, None], None if mask is None else mask[:, None]
    has_frames = where.second_axis == "frames"
    return pixels, Dense.of(pixels, sizes=where.image_sizes, mask=mask, has_frames=has_frames, is_tiled=is_tiled)


def images_without_padding(pixels: Tensor, where: Mapping[str, Any]) -> list[list[Tensor]]:
    """The real pixels of each image, tile by tile, as views of the tensor; they do not depend on the padding.

    Args:
        pixels: Pixels in one of the layouts of :func:`corrupt_pixel_values`.
        where: Where the images are, from :func:`where_images_are`.

    Example:
        >>> from srpo_core.pixel_values import images_without_padding
        >>> sizes = torch.tensor([[2, 3], [4, 4]])
        >>> [part.shape for [part] in images_without_padding(torch.ones(2, 3, 4, 4), {"image_sizes": sizes})]
        [torch.Size([1, 3, 2, 3]), torch.Size([1, 3, 4, 4])]
    """
    places = _Where(**where)
    _check_layout(pixels, places)
    if places.image_grid_thw is not None:
        return [[rows] for rows in pixels.split(places.image_grid_thw.prod(1).tolist())]
    if places.spatial_shapes is not None:
        lengths = places.spatial_shapes.prod(1).tolist()
        return [[rows[:length]] for rows, length in zip(pixels, lengths, strict=True)]
    tiles, dense = _dense(pixels, places)
    found: list[list[Tensor]] = [[] for _ in pixels]
    for (image, *_), view in zip(dense.places, dense.views(tiles), strict=True):
        found[image].append(view)
    return found


def _check_layout(pixels: Tensor, where: _Where) -> None:
    axes = pixels.ndim
    if axes not in (2, 3, 4, 5) or (axes == 3 and where.spatial_shapes is None):
        raise ValueError(
            "pixel_values must have 2 axes (patches, features), 3 with spatial_shapes (images, patches, features), 4 "
            "(images, channels, height, width) or 5 (images, tiles, channels, height, width), got shape "
            f"{tuple(pixels.shape)}"
        )
    if (axes == 2) != (where.image_grid_thw is not None):
        raise ValueError(
            "image_grid_thw goes with flattened pixel_values of 2 axes, and only with them: "
            f"got {'no grid' if where.image_grid_thw is None else 'a grid'} for {axes} axes"
        )
    if where.spatial_shapes is not None and axes != 3:
        raise ValueError(f"spatial_shapes goes with 3 axes (images, patches, features), got {axes} axes")
    if where.image_sizes is not None and axes != 4:
        raise ValueError(
            "image_sizes goes with pixel_values of 4 axes, whose padding it tells from the image: leave it out for "
            f"{axes} axes"
        )
    if where.second_axis == "frames" and axes != 5:
        raise ValueError(
            f"second_axis='frames' goes with 5 axes (videos, frames, channels, height, width), got {axes} axes"
        )
    if (mask := where.pixel_attention_mask) is not None:
        wanted = pixels.shape[:2] if axes == 3 else pixels.shape[:-3] + pixels.shape[-2:]
        if axes == 2:
            raise ValueError(
                "pixel_attention_mask does not go with flattened pixel_values of 2 axes, whose patches are all real: "
                f"leave it out, got {tuple(mask.shape)}"
            )
        if mask.shape != wanted:
            raise ValueError(
                f"pixel_attention_mask must have the shape of pixel_values without channels, {tuple(wanted)}, "
                f"got {tuple(mask.shape)}"
            )


def count_images(
    pixel_values: Tensor,
    corrupted: Tensor,
    *,
    images_per_row: Sequence[int],
    image_grid_thw: Tensor | None = None,
) -> Int[Tensor, "rows 2"]:
    """How many images each row of a batch has, and how many of them the corruption left as they were.

    Args:
        pixel_values: What the processor returned, in one of the layouts of :func:`corrupt_pixel_values`.
        corrupted: The same after the corruption.
        images_per_row: How many images each row has, in order.
        image_grid_thw: The grid of the images, in the flattened layout.

    Example:
        >>> from srpo_core.pixel_values import count_images
        >>> pixels = torch.ones(3, 3, 2, 2)
        >>> count_images(pixels, torch.cat([0 * pixels[:2], pixels[2:]]), images_per_row=[1, 2])
        tensor([[1, 0],
                [2, 1]])
    """
    sizes = [1] * len(pixel_values) if image_grid_thw is None else image_grid_thw.prod(1).tolist()
    moved = have_changed(pixel_values.split(sizes), corrupted.split(sizes))
    return _counts(moved, images_per_row).to(pixel_values.device)


def _counts(moved: Sequence[bool], images_per_row: Sequence[int]) -> Int[Tensor, "rows 2"]:
    same = [part.sum().item() for part in (~torch.tensor(moved, dtype=torch.bool)).split(list(images_per_row))]
    return torch.tensor([*zip(images_per_row, same, strict=True)], dtype=torch.int64).reshape(-1, 2)


def corrupt_rows(
    rows: Sequence[Mapping[str, Any] | None],
    prompt_ids: Sequence[int],
    options: ContextOptions,
    facts: ImageFacts | None,
    *,
    step: int,
    video_facts: ImageFacts | None = None,
    patch_size: Any = None,
) -> tuple[list[dict[str, Any]], Int[Tensor, "rows 2"]]:
    """The processor's outputs for each row, with corrupted pixels; everything else is shared with the originals.

    ``pixel_values`` and ``pixel_values_videos`` are corrupted at the places where the row has images (see
    :func:`where_images_are`); sound stays as it is. Rows of one prompt share a draw, and rows whose pixels are equal
    share the corrupted tensor.

    Args:
        rows: What the processor returned for the images of each row, by name; empty or None for a row without images.
        prompt_ids: The prompt of each row, see :func:`~srpo_core.corrupt_images`.
        options: Which corruption, with its amount and its seed.
        facts: From :func:`image_facts`.
        step: The optimizer step; each step has a new draw.
        video_facts: The facts of the video processor. None: those of the image processor.
        patch_size: The patch of the model's vision encoder, from :func:`vision_patch_size`; read in the layouts of 4
            and 5 axes.

    Returns:
        The new rows, and for each row the number of its images and of those that the corruption left as they were.

    Raises:
        ValueError: If pixels are in no layout that :func:`corrupt_pixel_values` knows, or under another name.
    """
    facts_of = {"pixel_values": facts, "pixel_values_videos": video_facts or facts}
    found: list[_Images] = []
    places: list[dict[str, int]] = []  # of each row, where in `found` the pixels under each name are
    of_prompt: dict[tuple[int, str], list[int]] = defaultdict(list)
    for row, prompt in zip(rows, prompt_ids, strict=True):
        inputs, place = row or {}, {}
        refuse_unknown_pixels(inputs)
        for name in PIXEL_NAMES:
            if (values := inputs.get(name)) is None:
                continue
            pixels = _Images.of(name, prompt, values, inputs, facts_of[name])
            known = of_prompt[prompt, name]
            if (at := next((at for at in known if found[at].equals(pixels)), None)) is None:
                at = len(found)
                known.append(at)
                found.append(pixels)
            place[name] = at
        places.append(place)

    # All of one layout at once, so that `other_image` finds the images of the other prompts.
    changed: dict[int, tuple[Tensor, list[int]]] = {}
    by_layout: dict[Any, list[int]] = defaultdict(list)
    for at, pixels in enumerate(found):
        by_layout[pixels.layout].append(at)
    for members in by_layout.values():
        images = [found[at] for at in members]
        changed |= zip(
            members,
            _corrupt_together(images, options, facts_of[images[0].name], step=step, patch_size=patch_size),
            strict=True,
        )

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
    where: dict[str, Any]

    @classmethod
    def of(cls, name: str, prompt: int, values: Any, inputs: Mapping[str, Any], facts: ImageFacts | None) -> "_Images":
        if not isinstance(values, Tensor) or not values.is_floating_point() or facts is None:
            got = f"{values.dtype}" if isinstance(values, Tensor) and facts is not None else type(values).__name__
            raise ValueError(
                f"{name} must be a tensor made by an image processor, got {got}"
                f"{' and no image processor' if facts is None else ''}: SRPO cannot corrupt this model's images"
            )
        return cls(name, prompt, values, where_images_are(name, values, inputs))

    @property
    def images(self) -> int:
        return len(self.where.get("image_grid_thw", self.values))

    @property
    def layout(self) -> tuple[Any, ...]:
        return self.name, self.values.shape[1:], *sorted(self.where)

    def equals(self, other: "_Images") -> bool:
        """Whether both show the same; grids count, because blank images of other sides have the same rows."""
        return self.layout == other.layout and all(
            one is two or (torch.equal(one, two) if isinstance(one, Tensor) else one == two)
            for one, two in [(self.values, other.values), *((self.where[key], other.where[key]) for key in self.where)]
        )


def _corrupt_together(
    pixels: Sequence[_Images], options: ContextOptions, facts: ImageFacts | None, *, step: int, patch_size: Any
) -> list[tuple[Tensor, list[int]]]:
    """Of each the corrupted pixels, its images, and how many of these are as they were. All are of one layout."""
    values = torch.cat([each.values for each in pixels]) if len(pixels) > 1 else pixels[0].values
    where: dict[str, Any] = {
        key: torch.cat([each.where[key] for each in pixels]) if isinstance(value, Tensor) else value
        for key, value in pixels[0].where.items()
    }
    # Beside a video of the same prompt, an image draws for itself.
    first = 0 if pixels[0].name == "pixel_values" else 2**16
    keys = [Key(each.prompt, first + image, 0) for each in pixels for image in range(each.images)]
    patch = patch_size if values.ndim > 3 else None
    recipe = (options.corruption, options.corruption_amount, patch, "keep", options.seed, step)
    changed, moved = _corrupt(values.detach(), keys, _Where(**where), tuple(facts or (None, None, 2, 2)), recipe)
    counts = _counts(moved, [each.images for each in pixels]).tolist()
    return list(zip(changed.split([len(each.values) for each in pixels]), counts, strict=True))


def _normalized_levels(kind: str, mean: Any, std: Any, channels: int) -> Levels:
    if mean is None or std is None:
        if needs_levels(kind):
            raise ValueError(
                f"kind={kind!r} has to know what black is: pass the image processor's image_mean and image_std "
                "(processor.image_processor.image_mean, .image_std; 0.0 and 1.0 if it only rescales to [0, 1])"
            )
        mean, std = 0.0, 1.0
    tensors = []
    for argument, value in (("image_mean", mean), ("image_std", std)):
        numbers = channel_numbers(argument, value)
        if len(numbers) not in (1, channels):
            raise ValueError(
                f"{argument} must be one number or one for each of {channels} channels, got {len(numbers)}"
            )
        tensors.append(torch.tensor(numbers, dtype=torch.float64).reshape(-1, 1, 1))
    mean_, std_ = tensors
    if not (std_ > 0).all():
        raise ValueError(f"image_std must be above 0, got {std}")
    return Levels(-mean_ / std_, (1 - mean_) / std_)
