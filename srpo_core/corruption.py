"""Images and processor outputs -> the same with less to see in them: seeded, shared by a group, shape-preserving.

================= =================================================== ====================================== =======
kind              what is left of the image                           ``strength``: unit and range           default
================= =================================================== ====================================== =======
``patch_mask``    that share of its patches is painted black          share of patches, (0, 1]               0.6
``black``         a black image                                       none
``gray``          a mid-gray image                                    none
``noise``         Gaussian noise is added, cut off at black and white s.d. in black-to-white ranges, above 0 0.5
``blur``          Gaussian blur                                       s.d. in pixels, above 0                10
``pixelate``      square blocks, each in its mean colour              side of a block, whole pixels from 2   28
``patch_shuffle`` that share of its patches changes places            share of patches, (0, 1]               1
``other_image``   another prompt's image instead                      none
``none``          refused: no pixel tensor says "there is no image"   none
================= =================================================== ====================================== =======

Patches are drawn without replacement: an image loses ``round(strength * patches)`` of them, at least one. Kinds and
strengths are this project's choice, as SRPO's are not published with it; masking a share of 0.6 follows PAPO.
A blank image can be a valid one ("how many? 0"): ``black`` and ``gray`` then make true zeros look like filler.

**One draw per image of a prompt.** The private generator is keyed on (seed, step, prompt id, image of the prompt,
tile of the image) and draws on the CPU, so that a group's rollouts see the identical corruption whatever the batch,
the device or the dtype, and PyTorch's global random state stays as it was. All frames of a video share the draw: what
one frame hides, the next does not give away. ``other_image`` draws nothing; what it puts there depends on the batch.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int, Real
from torch import Generator, Tensor

from srpo_core.typechecking import choose, typechecked

__all__ = ["corrupt_images", "corrupt_pixel_values"]

CorruptionKind = Literal[
    "patch_mask", "black", "gray", "noise", "blur", "pixelate", "patch_shuffle", "other_image", "none"
]
_RGB = 3
# Idefics-like models recognise a padding tile by its being zero throughout. No real tile may turn into one (mid-gray
# is exactly 0 where mean = std = 0.5), so it is lifted by less than a grey level, but not too little for float16.
_NOT_PADDING = 2.0**-12


@typechecked
def corrupt_images(
    images: Real[Tensor, "batch channel height width"],
    *,
    prompt_ids: Int[Tensor, " batch"],
    image_index: Int[Tensor, " batch"] | None = None,
    kind: CorruptionKind = "patch_mask",
    strength: float | None = None,
    patch_size: int = 14,
    unchanged: Literal["raise", "keep"] = "raise",
    seed: int = 0,
    step: int = 0,
) -> Real[Tensor, "batch channel height width"]:
    """Corrupted copies of images that no processor has touched yet.

    Args:
        images: Pixels: uint8 in 0..255 or floating point in [0, 1]. Black is 0.
        prompt_ids: The prompt that each image belongs to; any integers that name a prompt wherever it turns up, such
            as its place in the dataset. Images with the same id share one draw.
        image_index: Which of its prompt's images each one is, so that the images of one prompt are corrupted
            differently. None: 0 for all.
        kind: The corruption, see the module's table.
        strength: How much of it, in the kind's own unit, see the table. None: the kind's default.
        patch_size: Side of a patch in pixels (``patch_mask``, ``patch_shuffle``): what one token of the language model
            sees. Patches at the right and bottom border may be cut off; ``patch_shuffle`` leaves those in place.
        unchanged: What to do when an image of more than one colour comes out as it went in: all masked patches were
            black already, it is a single patch, or the batch holds no other image for ``other_image``. "keep" accepts
            it; its contrast is then 0.
        seed: First part of the key of the draw; any integer.
        step: Second part: a new optimiser step, a new draw.

    Returns:
        A new tensor of the same shape, dtype and device. ``other_image`` takes the image of the next larger prompt id
        in the batch, the smallest after the largest, that differs; resized if need be, its frames repeated or dropped.

    Raises:
        TypeError: If the images are integers other than uint8.
        ValueError: If an option is out of range, floating-point pixels are outside [0, 1], or ``unchanged="raise"`` and
            an image did not change. These checks wait for the device.

    Example:
        >>> images, prompt_ids = torch.ones(2, 3, 28, 28), torch.tensor([7, 7])
        >>> corrupt_images(images, prompt_ids=prompt_ids, strength=0.5).mean((1, 2, 3))
        tensor([0.5000, 0.5000])

    References:
        Masked patches as the uninformative view: PAPO, arXiv:2507.06448.
    """
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be uint8 in 0..255 or floating point in [0, 1], got {images.dtype}")
    if images.is_floating_point() and not ((images >= 0) & (images <= 1)).all():
        raise ValueError(
            "images of a floating dtype must be in [0, 1]: divide by 255, or pass what a processor normalised to "
            "corrupt_pixel_values"
        )
    keys = _keys(prompt_ids, image_index)
    levels = _Levels(torch.tensor(0.0), torch.tensor(1.0 if images.is_floating_point() else 255.0))
    options = _Options(kind, strength, patch_size, unchanged, seed, step)
    return _concatenate(_corrupt(list(images.detach()[:, None]), keys, levels, options), like=images)


@typechecked
def corrupt_pixel_values(
    pixel_values: Float[Tensor, "..."],
    *,
    prompt_ids: Int[Tensor, " images"],
    image_grid_thw: Int[Tensor, "images 3"] | None = None,
    image_index: Int[Tensor, " images"] | None = None,
    kind: CorruptionKind = "patch_mask",
    strength: float | None = None,
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
      corrupt such images before the processor, with :func:`corrupt_images`;
    - ``[patches, features]`` with ``image_grid_thw``, as Qwen-VL flattens images and videos: ``merge_size**2``
      consecutive rows are one token of the language model, features run over (channel, frame, height, width).

    The number of placeholder tokens stays right, as the shape does: leave grid, ids and attention masks alone.

    Args:
        pixel_values: The processor's output, in one of the layouts above.
        prompt_ids: The prompt of each image (first axis, or row of the grid), as in :func:`corrupt_images`.
        image_grid_thw: Frames, height and width of each image in rows of ``pixel_values``; flattened layout only.
        image_index: As in :func:`corrupt_images`.
        kind: The corruption, see the module's table. For "none", a pass without any image, build the prompt without
            its image placeholders and call the model without ``pixel_values``.
        strength: As in :func:`corrupt_images`.
        patch_size: Side of a patch in pixels. None: 14, or what one language-model token sees in the flattened layout,
            of which it must be a multiple.
        merge_size: Patches that the model merges into one token along each side; flattened layout only.
        temporal_patch_size: Frames in a row of the flattened layout.
        image_mean: The processor's ``image_mean``, one number or one per channel.
        image_std: The processor's ``image_std``, above 0. Both say where black and white are after normalisation:
            ``patch_mask``, ``black``, ``gray`` and ``noise`` need them and do not guess. 0.0 and 1.0 if the processor
            only rescales to [0, 1].
        unchanged: As in :func:`corrupt_images`.
        seed: As in :func:`corrupt_images`.
        step: As in :func:`corrupt_images`.

    Returns:
        A new tensor of the same shape, dtype and device.

    Raises:
        ValueError: If the layout does not fit the options, mean and standard deviation are missing, an option is out
            of range, or ``unchanged="raise"`` and an image did not change.

    Example:
        Two rollouts of one prompt, each with a 28 x 56 image: two language-model tokens of four rows.

        >>> flattened, grid = torch.ones(16, 3 * 2 * 14 * 14), torch.tensor([[1, 2, 4], [1, 2, 4]])
        >>> masked = corrupt_pixel_values(flattened, prompt_ids=torch.tensor([7, 7]), image_grid_thw=grid, strength=0.5,
        ...                               image_mean=0.5, image_std=0.5)
        >>> (masked == -1).all(1).int()
        tensor([0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.int32)

    References:
        The flattened layout: ``Qwen2VLImageProcessor`` in transformers; Qwen2-VL, arXiv:2409.12191.
    """
    pixels = pixel_values.detach()
    keys = _keys(prompt_ids, image_index)
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
    levels = _normalised_levels(kind, image_mean, image_std, channels)
    options = _Options(kind, strength, 14 if patch_size is None else patch_size, unchanged, seed, step)

    if image_grid_thw is not None:
        views, token_size = _unflatten(pixels, image_grid_thw, merge_size, temporal_patch_size)
        options = options._replace(patch_size=token_size if patch_size is None else patch_size)
        if options.patch_size % token_size:
            raise ValueError(f"patch_size must be a multiple of {token_size}, one token's pixels, got {patch_size}")
        corrupted = _corrupt(views, keys, levels, options)
        rows = [_flatten(view, token_size // merge_size, merge_size, temporal_patch_size) for view in corrupted]
        return _concatenate(rows, like=pixels)
    if pixels.ndim == 4:
        return _concatenate(_corrupt(list(pixels[:, None]), keys, levels, options), like=pixels)
    real = (pixels != 0).flatten(2).any(-1).nonzero().tolist()
    views = [pixels[image, tile, None] for image, tile in real]
    tile_keys = [keys[image]._replace(tile=tile) for image, tile in real]
    result = pixels.clone()
    for (image, tile), view in zip(real, _corrupt(views, tile_keys, levels, options), strict=True):
        result[image, tile] = torch.where((view != 0).any(), view[0], _NOT_PADDING)
    return result


class _Key(NamedTuple):
    """What a draw belongs to. Views with equal keys and shapes are corrupted identically."""

    prompt: int
    image: int
    tile: int


class _Options(NamedTuple):
    """What the caller chose, unchecked."""

    kind: str
    strength: float | None
    patch_size: int
    unchanged: str
    seed: int
    step: int


class _Levels(NamedTuple):
    """Values that stand for black and white in an image tensor, each of shape [] or [channel, 1, 1]."""

    black: Tensor
    white: Tensor


def _keys(prompt_ids: Tensor, image_index: Tensor | None) -> list[_Key]:
    index = torch.zeros_like(prompt_ids) if image_index is None else image_index
    return [_Key(prompt, image, 0) for prompt, image in zip(prompt_ids.tolist(), index.tolist(), strict=True)]


def _generator(seed: int, step: int, key: _Key) -> Generator:
    # Hashed, not added: seed 0 at step 1 must not repeat seed 1 at step 0.
    digest = hashlib.blake2b(repr((seed, step, *key)).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little"))


def _normalised_levels(
    kind: str, mean: float | Sequence[float] | None, std: float | Sequence[float] | None, channels: int
) -> _Levels:
    if mean is None or std is None:
        if kind in _KINDS and _KINDS[kind].needs_levels:
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
    return _Levels(-mean_ / std_, (1 - mean_) / std_)


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


def _concatenate(views: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(views) if views else like.clone()


def _corrupt(views: Sequence[Tensor], keys: Sequence[_Key], levels: _Levels, options: _Options) -> list[Tensor]:
    """The one implementation: views of shape [frame, channel, height, width], of any sizes, to the same."""
    kind, strength, patch_size, unchanged, seed, step = options
    if kind == "none":
        raise ValueError(
            "kind='none' is a pass without any image, which no pixel tensor can express: build the prompt without its "
            "image placeholders and call the model without pixel_values, or choose 'gray' for a blank image"
        )
    chosen = choose("kind", kind, _KINDS)
    choose("unchanged", unchanged, {"raise": None, "keep": None})
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    strength = _checked_strength(kind, strength, chosen)

    groups: dict[tuple[_Key, torch.Size], list[int]] = defaultdict(list)
    for row, (key, view) in enumerate(zip(keys, views, strict=True)):
        groups[key, view.shape].append(row)
    corrupted = list(views)
    moved: list[Tensor] = [torch.empty(0)] * len(views)
    for (key, _), rows in groups.items():
        stack = torch.stack([views[row] for row in rows])
        dtype = torch.promote_types(stack.dtype, torch.float32)
        settings = _Settings(
            black=levels.black.to(stack.device, dtype),
            white=levels.white.to(stack.device, dtype),
            strength=strength,
            patch_size=patch_size,
            generator=_generator(seed, step, key),
            donor=_donor(rows[0], keys, views) if kind == "other_image" else stack[0],
        )
        result = chosen.act(stack.to(dtype), settings)
        result = result.to(stack.dtype) if stack.is_floating_point() else result.round().clamp(0, 255).to(stack.dtype)
        for row, view, has_moved in zip(rows, result, (result != stack).flatten(1).any(1), strict=True):
            corrupted[row], moved[row] = view, has_moved
    if unchanged == "raise" and moved and not torch.stack(moved).all():
        # A no-op must not pass for "the image did not matter". An image of one colour has nothing that could go.
        colourful = [row for row, view in enumerate(views) if (view != view[:1, :, :1, :1]).any()]
        same = [row for row in colourful if not moved[row]]
        if same:
            raise ValueError(
                f"kind={kind!r} left images {same} as they were: "
                "raise strength, lower patch_size, choose another kind, give 'other_image' a batch with several "
                'prompts, or accept a contrast of 0 with unchanged="keep"'
            )
    return corrupted


def _donor(row: int, keys: Sequence[_Key], views: Sequence[Tensor]) -> Tensor:
    """The next prompt's image that differs from this one, of the same index if it has one. Without any: this one."""
    own = keys[row]
    holders = {key: holder for holder, key in enumerate(keys)}
    # Larger prompt ids first, then the smaller ones; in each prompt the same image and tile first.
    others = sorted((key.prompt < own.prompt, key.prompt, key[1:] != own[1:], key) for key in holders)
    for *_, key in others:
        donor = views[holders[key]]
        if key.prompt != own.prompt and not torch.equal(donor, views[row]):
            return donor
    return views[row]


class _Settings(NamedTuple):
    black: Tensor
    white: Tensor
    strength: float
    patch_size: int
    generator: Generator
    donor: Tensor


# From here on, images are [row, frame, channel, height, width]; all rows and frames share one draw.


def _patch_mask(images: Tensor, settings: _Settings) -> Tensor:
    height, width, side = *images.shape[-2:], settings.patch_size
    rows, columns = -(-height // side), -(-width // side)
    order = torch.randperm(rows * columns, generator=settings.generator)
    hidden = order < max(1, round(settings.strength * len(order)))
    hidden = repeat(hidden, "(row column) -> (row ph) (column pw)", row=rows, ph=side, pw=side)
    return torch.where(hidden[:height, :width].to(images.device), settings.black, images)


def _black(images: Tensor, settings: _Settings) -> Tensor:
    return settings.black.expand_as(images).clone()


def _gray(images: Tensor, settings: _Settings) -> Tensor:
    return ((settings.black + settings.white) / 2).expand_as(images).clone()


def _noise(images: Tensor, settings: _Settings) -> Tensor:
    noise = torch.randn(images.shape[2:], generator=settings.generator).to(images)
    noisy = images + settings.strength * (settings.white - settings.black) * noise
    return noisy.clamp(settings.black, settings.white)


def _blur(images: Tensor, settings: _Settings) -> Tensor:
    down, across = (_blur_matrix(size, settings.strength).to(images) for size in images.shape[-2:])
    return down @ images @ across.T


def _blur_matrix(size: int, sigma: float) -> Tensor:
    """Gaussian means along one side as a matrix: on a CPU three times faster than convolving this widely."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1)
    kernel = (-(offsets.double() ** 2) / (2 * sigma**2)).softmax(0)
    taps = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)  # beyond the border, the border's own colour
    return kernel.new_zeros(size, size).scatter_add_(1, taps, kernel.expand_as(taps))


def _pixelate(images: Tensor, settings: _Settings) -> Tensor:
    height, width = images.shape[-2:]
    block = (min(int(settings.strength), height), min(int(settings.strength), width))
    means = F.avg_pool2d(images.flatten(0, 1), block, ceil_mode=True)  # blocks cut off at the border: mean of the rest
    blocks = repeat(means, "image channel h w -> image channel (h bh) (w bw)", bh=block[0], bw=block[1])
    return blocks[..., :height, :width].reshape(images.shape)


def _patch_shuffle(images: Tensor, settings: _Settings) -> Tensor:
    side = settings.patch_size
    rows, columns = (size // side for size in images.shape[-2:])
    order = torch.randperm(rows * columns, generator=settings.generator)
    moving = order[: round(settings.strength * len(order))]
    if len(moving) < 2:
        return images
    # One random cycle: unlike a random permutation it leaves none of the moving patches where it was.
    source = torch.arange(len(order))
    source[moving] = moving.roll(1)
    result = images.clone()
    whole = result[..., : rows * side, : columns * side]
    patches = rearrange(
        whole, "row frame channel (h ph) (w pw) -> (h w) row frame channel ph pw", ph=side, pw=side
    )[source.to(images.device)]  # fmt: skip
    whole.copy_(rearrange(patches, "(h w) row frame channel ph pw -> row frame channel (h ph) (w pw)", h=rows))
    return result


def _other_image(images: Tensor, settings: _Settings) -> Tensor:
    donor, frames = settings.donor.to(images), images.shape[1]
    if donor.shape[-2:] != images.shape[-2:]:
        donor = F.interpolate(donor, images.shape[-2:], mode="bilinear", antialias=True)
    return donor[torch.arange(frames) % len(donor)].expand_as(images).clone()


class _Kind(NamedTuple):
    act: Callable[[Tensor, _Settings], Tensor]
    default: float | None = None  # None: the kind takes no strength
    most: float = math.inf
    whole: bool = False  # whole numbers from 2
    needs_levels: bool = False


_KINDS: dict[str, _Kind] = {
    "patch_mask": _Kind(_patch_mask, default=0.6, most=1.0, needs_levels=True),
    "black": _Kind(_black, needs_levels=True),
    "gray": _Kind(_gray, needs_levels=True),
    "noise": _Kind(_noise, default=0.5, needs_levels=True),
    "blur": _Kind(_blur, default=10.0),
    "pixelate": _Kind(_pixelate, default=28.0, whole=True),
    "patch_shuffle": _Kind(_patch_shuffle, default=1.0, most=1.0),
    "other_image": _Kind(_other_image),
}


def _checked_strength(kind: str, strength: float | None, chosen: _Kind) -> float:
    if strength is None:
        return 0.0 if chosen.default is None else chosen.default
    if chosen.default is None:
        raise ValueError(f"strength has no meaning for kind={kind!r}: leave it out, got {strength}")
    if chosen.whole and not (strength >= 2 and float(strength).is_integer()):
        raise ValueError(f"strength of kind={kind!r} must be a whole number of pixels, at least 2, got {strength}")
    if not 0.0 < strength <= chosen.most or math.isinf(strength):
        raise ValueError(f"strength of kind={kind!r} must be in (0, {chosen.most:g}], got {strength}")
    return strength
