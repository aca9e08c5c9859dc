"""Where the images are in what a processor returned: layouts to views, and the regions of padding.

============================================= =================================== ========================
layout of ``pixel_values``                    what tells where the image is       families
============================================= =================================== ========================
``[patches, features]``                       ``image_grid_thw``                  Qwen2-VL to 3-VL, GLM-4V
``[images, patches, features]``               ``spatial_shapes``: rows, columns   LFM2-VL, Gemma 4
``[images, channels, height, width]``         ``image_sizes``: height, width      Pixtral, Mistral 3, Emu3
the same                                      ``pixel_attention_mask``            Aria
the same                                      nothing: all of it is image         LLaVA, Gemma 3, InternVL
``[images, tiles, channels, height, width]``  ``pixel_attention_mask``            Idefics 2 and 3, SmolVLM
the same                                      nothing: a tile of zeros is padding LLaVA-NeXT, -OneVision
``[videos, frames, channels, height, width]`` nothing: last frames of zeros       LLaVA videos
============================================= =================================== ========================

``image_sizes`` are in pixels from the top left; a mask has the shape of the pixels without channels. With five axes
``image_sizes`` are the sizes of the images before they were cut into tiles, and say nothing about padding.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from srpo_core.corruption import (
    Key,
    Levels,
    Recipe,
    corrupt_views,
    distinct,
    have_changed,
    hidden_cells,
    paints,
    refuse_unchanged,
)

__all__ = ["Dense", "Patches", "corrupt_dense", "corrupt_patches"]

_RGB = 3
# Idefics-like models recognize a padding tile by its being zero throughout. No real tile may turn into one (mid-gray
# is exactly 0 where mean = std = 0.5), so it is lifted by less than a gray level, but not too little for float16.
_NOT_PADDING = 2.0**-12


# Flattened patches


class Patches(NamedTuple):
    """Images as rows, one for each patch: where in a tensor of rows each image is, and how a row is laid out."""

    grids: list[tuple[int, int, int]]  # frames (of rows), height and width in patches
    rows: list[slice]
    side: int  # of a patch, in pixels
    merge_size: int  # patches of a token along each side
    temporal_patch_size: int
    is_naflex: bool  # features are (height, width, channel) and rows in reading order

    @classmethod
    def of_qwen(cls, pixels: Tensor, grid_thw: Tensor, merge_size: int, temporal_patch_size: int) -> "Patches":
        """Rows of all images, one after the other, the patches of one token together."""
        side = math.isqrt(pixels.shape[1] // (_RGB * temporal_patch_size))
        if side < 1 or _RGB * temporal_patch_size * side**2 != pixels.shape[1]:
            raise ValueError(
                f"pixel_values must have {_RGB} channels * temporal_patch_size={temporal_patch_size} * patch_size**2 "
                f"features, got {pixels.shape[1]}"
            )
        grids = [(t, height, width) for t, height, width in grid_thw.tolist()]
        for image, (t, height, width) in enumerate(grids):
            if min(t, height, width) < 1 or height % merge_size or width % merge_size:
                raise ValueError(
                    "image_grid_thw must hold positive sizes, height and width in multiples of "
                    f"merge_size={merge_size}, got {[t, height, width]} for image {image}"
                )
        counts = [math.prod(grid) for grid in grids]
        if sum(counts) != len(pixels):
            raise ValueError(f"image_grid_thw describes {sum(counts)} rows, but pixel_values has {len(pixels)}")
        ends = torch.tensor(counts).cumsum(0).tolist()
        rows = [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]
        return cls(grids, rows, side, merge_size, temporal_patch_size, is_naflex=False)

    @classmethod
    def of_naflex(cls, pixels: Tensor, spatial_shapes: Tensor, mask: Tensor | None, merge_size: int) -> "Patches":
        """Rows of each image in reading order, padded at the end: of ``pixels.flatten(0, 1)``."""
        _, length, features = pixels.shape
        side = math.isqrt(features // _RGB)
        if side < 1 or _RGB * side**2 != features:
            raise ValueError(f"pixel_values must have {_RGB} channels * patch_size**2 features, got {features}")
        shapes = [(height, width) for height, width in spatial_shapes.tolist()]
        for image, (height, width) in enumerate(shapes):
            if min(height, width) < 1 or height * width > length:
                raise ValueError(
                    f"spatial_shapes must hold rows and columns of at most {length} patches in all, got "
                    f"{[height, width]} for image {image}"
                )
        if mask is not None:
            real = spatial_shapes.prod(1)[:, None] > torch.arange(length, device=spatial_shapes.device)
            if mask.shape != real.shape or not torch.equal(mask.bool(), real.to(mask.device)):
                raise ValueError(
                    "pixel_attention_mask must be 1 at the first patches of each image, as many as spatial_shapes "
                    "says, and 0 after: pass both as the processor returned them"
                )
        rows = [slice(image * length, image * length + math.prod(shape)) for image, shape in enumerate(shapes)]
        return cls([(1, *shape) for shape in shapes], rows, side, merge_size, 1, is_naflex=True)

    @property
    def token_side(self) -> int:
        """Of what one token sees, in pixels."""
        return self.side * self.merge_size

    def view(self, rows: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """One image as [frame, channel, height, width]."""
        t, height, width = grid
        if self.is_naflex:
            return rearrange(
                rows,
                "(h w) (ph pw channel) -> 1 channel (h ph) (w pw)",
                h=height, w=width, ph=self.side, pw=self.side,
            )  # fmt: skip
        return rearrange(
            rows,
            "(t h w mh mw) (channel frame ph pw) -> (t frame) channel (h mh ph) (w mw pw)",
            t=t, h=height // self.merge_size, mh=self.merge_size, mw=self.merge_size,
            frame=self.temporal_patch_size, ph=self.side, pw=self.side,
        )  # fmt: skip

    def flatten(self, view: Tensor) -> Tensor:
        """The rows of an image, the reverse of :meth:`view`."""
        if self.is_naflex:
            return rearrange(view, "1 channel (h ph) (w pw) -> (h w) (ph pw channel)", ph=self.side, pw=self.side)
        return rearrange(
            view,
            "(t frame) channel (h mh ph) (w mw pw) -> (t h w mh mw) (channel frame ph pw)",
            frame=self.temporal_patch_size, mh=self.merge_size, mw=self.merge_size, ph=self.side, pw=self.side,
        )  # fmt: skip

    def hidden_rows(self, grid: tuple[int, int, int], key: Key, recipe: Recipe) -> Tensor:
        """Which rows of an image a painting kind hides, bool; all frames of a video hide the same."""
        t, height, width = grid
        high, wide = (side // self.side for side in recipe.patch)  # of a cell, in patches
        cells = hidden_cells(-(-height // high), -(-width // wide), key, recipe)
        patches = repeat(cells, "row column -> (row ch) (column cw)", ch=high, cw=wide)[:height, :width]
        merge = 1 if self.is_naflex else self.merge_size
        return repeat(patches, "(h mh) (w mw) -> (t h w mh mw)", t=t, mh=merge, mw=merge)

    def row_of(self, color: Tensor) -> Tensor:
        """A patch of one color, [features]; the color is one number or of shape [channel, 1, 1]."""
        patch = color.reshape(-1, 1, 1).expand(_RGB, self.side, self.side)
        if self.is_naflex:
            return rearrange(patch, "channel ph pw -> (ph pw channel)")
        return repeat(patch, "channel ph pw -> (channel frame ph pw)", frame=self.temporal_patch_size)


def corrupt_patches(
    rows: Tensor, patches: Patches, keys: Sequence[Key], levels: Levels, recipe: Recipe
) -> tuple[Tensor, list[bool]]:
    """Corrupted rows, and of each image whether it changed."""
    unit, name = (patches.side, "one patch") if patches.is_naflex else (patches.token_side, "one token's pixels")
    if any(side % unit for side in recipe.patch):
        got = recipe.patch.height if recipe.patch.height == recipe.patch.width else tuple(recipe.patch)
        raise ValueError(f"patch_size must be a multiple of {unit}, {name}, got {got}")
    result = rows.clone(memory_format=torch.contiguous_format)
    before, after = ([each[part] for part in patches.rows] for each in (rows, result))
    if paints(recipe.kind):
        moved = _paint_rows(rows, result, patches, keys, levels, recipe)
    else:
        firsts = distinct(before, list(zip(keys, patches.grids, strict=True)))
        once = sorted(set(firsts))
        views = [patches.view(before[at], patches.grids[at]) for at in once]
        targets = [torch.empty_like(view) for view in views]
        corrupt_views(views, targets, [keys[at] for at in once], levels, recipe)
        for at, target in zip(once, targets, strict=True):
            after[at].copy_(patches.flatten(target))
        for at, first in enumerate(firsts):
            if first != at:
                after[at].copy_(after[first])
        moved = have_changed(before, after)
    still = (image for image, has_moved in enumerate(moved) if not has_moved)
    refuse_unchanged(recipe, ((image, patches.view(before[image], patches.grids[image])) for image in still))
    return result, moved


def _paint_rows(
    rows: Tensor, result: Tensor, patches: Patches, keys: Sequence[Key], levels: Levels, recipe: Recipe
) -> list[bool]:
    """Write the color over the hidden rows of `result`, and nothing else; the draw is made once for equal keys."""
    color = patches.row_of(levels.paint(recipe.kind, rows))
    drawn: dict[tuple[Key, tuple[int, int, int]], Tensor] = {}
    places = []
    for key, grid, part in zip(keys, patches.grids, patches.rows, strict=True):
        if (key, grid) not in drawn:
            drawn[key, grid] = patches.hidden_rows(grid, key, recipe).nonzero()[:, 0]
        places.append(drawn[key, grid] + part.start)
    if not places:
        return []
    hidden = torch.cat(places).to(rows.device)
    result[hidden] = color
    # The first hidden row of an image nearly always had another color: only where it had not, the rest is read.
    firsts = torch.tensor([int(place[0]) for place in places], device=rows.device)
    moved = (rows[firsts] != color).any(1).tolist()
    for image, (has_moved, part) in enumerate(zip(moved, patches.rows, strict=True)):
        moved[image] = has_moved or not torch.equal(rows[part], result[part])
    return moved


# Dense images


class Dense(NamedTuple):
    """Where the views are in pixels of five axes: (image, tiles or frames, rows of pixels, columns of pixels)."""

    places: list[tuple[int, slice, slice, slice]]

    @classmethod
    def of(
        cls, pixels: Tensor, *, sizes: Tensor | None, mask: Tensor | None, has_frames: bool, is_tiled: bool
    ) -> "Dense":
        """Of [images, tiles, channels, height, width].

        Args:
            pixels: A tile that is zero throughout is padding if `is_tiled`.
            sizes: [images, 2] in pixels, from the top left.
            mask: [images, tiles, height, width].
            has_frames: Whether the second axis holds the frames of a video, which make one view together.
            is_tiled: Whether the second axis was there, and not put in for images without tiles.
        """
        images, tiles, _, height, width = pixels.shape
        real = _real_tiles(pixels) if is_tiled else torch.ones(images, tiles, dtype=torch.bool)
        regions: dict[tuple[int, int], tuple[slice, slice]] = {}
        if mask is not None:
            regions = _regions_of_mask(mask)
            real = real & torch.tensor([[(i, t) in regions for t in range(tiles)] for i in range(images)]).reshape(
                images, tiles
            )
        elif sizes is not None:
            regions = _regions_of_sizes(sizes, height, width)
        whole = (slice(0, height), slice(0, width))
        places = []
        for image, tiles_of_image in enumerate(real.tolist()):
            found = [tile for tile, is_real in enumerate(tiles_of_image) if is_real]
            if has_frames and found:
                last = found[-1]
                region = regions.get((image, last), whole)
                if any(regions.get((image, frame), whole) != region for frame in found):
                    raise ValueError(
                        f"pixel_attention_mask must be the same for all frames of a video, which it is not for {image}"
                    )
                places.append((image, slice(0, last + 1), *region))
            elif not has_frames:
                places += [(image, slice(t, t + 1), *regions.get((image, t), whole)) for t in found]
        return cls(places)

    def views(self, pixels: Tensor) -> list[Tensor]:
        return [pixels[image, tiles, :, rows, columns] for image, tiles, rows, columns in self.places]

    def keys(self, keys: Sequence[Key]) -> list[Key]:
        return [keys[image]._replace(tile=tiles.start) for image, tiles, *_ in self.places]


def corrupt_dense(
    pixels: Tensor, dense: Dense, keys: Sequence[Key], levels: Levels, recipe: Recipe, *, is_tiled: bool
) -> tuple[Tensor, list[bool]]:
    """Corrupted [images, tiles, channels, height, width], and of each image whether any of it changed."""
    views = dense.views(pixels)
    is_full = sum(view.numel() for view in views) == pixels.numel()
    new = torch.contiguous_format
    result = torch.empty_like(pixels, memory_format=new) if is_full else pixels.clone(memory_format=new)
    targets = dense.views(result)
    moved = corrupt_views(views, targets, dense.keys(keys), levels, recipe)
    if is_tiled:
        _keep_real([tile for target in targets for tile in target])
    changes = [False] * len(pixels)
    for (image, *_), has_moved in zip(dense.places, moved, strict=True):
        changes[image] |= has_moved
    parts = zip(dense.places, views, moved, strict=True)
    refuse_unchanged(recipe, ((place[0], view) for place, view, has_moved in parts if not has_moved))
    return result, changes


def _real_tiles(pixels: Tensor) -> Tensor:
    """Bool [images, tiles], on the CPU. Padding is at the bottom right, so the first pixel nearly always tells."""
    real = (pixels[..., 0, 0] != 0).any(-1).cpu() if pixels.numel() else torch.zeros(pixels.shape[:2], dtype=torch.bool)
    for image, tile in (~real).nonzero().tolist():
        real[image, tile] = bool((pixels[image, tile] != 0).any())
    return real


def _keep_real(tiles: Sequence[Tensor]) -> None:
    """Lift tiles that became zero, in place."""
    if not tiles:
        return
    has_color = torch.stack([(tile[..., :1, :1] != 0).any() for tile in tiles]).tolist()
    for tile, is_real in zip(tiles, has_color, strict=True):
        if not (is_real or (tile != 0).any()):
            tile.fill_(_NOT_PADDING)


def _regions_of_mask(mask: Tensor) -> dict[tuple[int, int], tuple[slice, slice]]:
    """Of each image and tile with any real pixel the rectangle that these fill."""
    mask = mask.bool()
    ends = []
    for axis in (-1, -2):
        line = mask.any(axis).int()
        size = line.shape[-1]
        ends += [line.argmax(-1), size - line.flip(-1).argmax(-1)]
    found = {}
    numbers = torch.stack([*ends, mask.sum((-1, -2))], dim=-1).tolist()
    for image, tiles in enumerate(numbers):
        for tile, (top, bottom, left, right, count) in enumerate(tiles):
            if count and count != (bottom - top) * (right - left):
                raise ValueError(
                    f"pixel_attention_mask must mark one rectangle of real pixels in each image, got {count} pixels "
                    f"within {bottom - top} x {right - left} for image {image}"
                )
            if count:
                found[image, tile] = (slice(top, bottom), slice(left, right))
    return found


def _regions_of_sizes(sizes: Tensor, height: int, width: int) -> dict[tuple[int, int], tuple[slice, slice]]:
    found = {}
    for image, (high, wide) in enumerate(sizes.tolist()):
        if not (1 <= high <= height and 1 <= wide <= width):
            raise ValueError(
                f"image_sizes must be height and width of each image inside pixel_values, at most {[height, width]}, "
                f"got {[high, wide]} for image {image}: leave out sizes from before resizing"
            )
        found[image, 0] = (slice(0, high), slice(0, wide))
    return found
