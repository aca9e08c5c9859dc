"""Images and processor outputs -> the same with less to see in them: seeded, shared by a group, shape-preserving.

================= =================================================== ====================================== =======
kind              what is left of the image                           ``amount``: unit and range             default
================= =================================================== ====================================== =======
``patch_mask``    that share of its patches is painted black          share of patches, (0, 1]               0.6
``black``         a black image                                       none
``gray``          a mid-gray image                                    none
``noise``         Gaussian noise is added, cut off at black and white s.d. in black-to-white ranges, above 0 0.5
``blur``          Gaussian blur                                       s.d. in pixels, above 0                10
``pixelate``      square blocks, each in its mean color               side of a block, whole pixels from 2   28
``patch_shuffle`` that share of its patches changes places            share of patches, (0, 1]               1
``other_image``   another prompt's image instead                      none
``none``          refused: no pixel tensor says "there is no image"   none
================= =================================================== ====================================== =======

Patches are drawn without replacement: an image loses ``round(amount * patches)`` of them, at least one. Kinds and
amounts are this project's choice, as SRPO's are not published with it; masking a share of 0.6 follows PAPO.
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
from jaxtyping import Int, Real
from torch import Generator, Tensor

from srpo_core.checked import choose
from srpo_core.options import AMOUNTS, CorruptionKind, problem_of_amount
from srpo_core.typechecking import typechecked

__all__ = ["Key", "Levels", "Recipe", "concatenate", "corrupt_images", "corrupt_views", "keys_of", "needs_levels"]


@typechecked
def corrupt_images(
    images: Real[Tensor, "batch channel height width"],
    *,
    prompt_ids: Int[Tensor, " batch"],
    image_index: Int[Tensor, " batch"] | None = None,
    kind: CorruptionKind = "patch_mask",
    amount: float | None = None,
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
        amount: How much of it, in the kind's own unit, see the table. None: the kind's default.
        patch_size: Side of a patch in pixels (``patch_mask``, ``patch_shuffle``): what one token of the language model
            sees. Patches at the right and bottom border may be cut off; ``patch_shuffle`` leaves those in place.
        unchanged: What to do when an image of more than one color comes out as it went in: all masked patches were
            black already, it is a single patch, or the batch holds no other image for ``other_image``. "keep" accepts
            it; its contrast is then 0.
        seed: First part of the key of the draw; any integer.
        step: Second part: a new optimizer step, a new draw.

    Returns:
        A new tensor of the same shape, dtype and device. ``other_image`` takes the image of the next larger prompt id
        in the batch, the smallest after the largest, that differs; resized if need be, its frames repeated or dropped.

    Raises:
        TypeError: If the images are integers other than uint8.
        ValueError: If an option is out of range, floating-point pixels are outside [0, 1], or ``unchanged="raise"`` and
            an image did not change. These checks wait for the device.

    Example:
        >>> images, prompt_ids = torch.ones(2, 3, 28, 28), torch.tensor([7, 7])
        >>> corrupt_images(images, prompt_ids=prompt_ids, amount=0.5).mean((1, 2, 3))
        tensor([0.5000, 0.5000])

    References:
        Masked patches as the uninformative view: PAPO, arXiv:2507.06448.
    """
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be uint8 in 0..255 or floating point in [0, 1], got {images.dtype}")
    if images.is_floating_point() and not ((images >= 0) & (images <= 1)).all():
        raise ValueError(
            "images of a floating dtype must be in [0, 1]: divide by 255, or pass what a processor normalized to "
            "corrupt_pixel_values"
        )
    keys = keys_of(prompt_ids, image_index)
    levels = Levels(torch.tensor(0.0), torch.tensor(1.0 if images.is_floating_point() else 255.0))
    recipe = Recipe(kind, amount, patch_size, unchanged, seed, step)
    return concatenate(corrupt_views(list(images.detach()[:, None]), keys, levels, recipe), like=images)


class Key(NamedTuple):
    """What a draw belongs to. Views with equal keys and shapes are corrupted identically."""

    prompt: int
    image: int
    tile: int


class Recipe(NamedTuple):
    """What the caller chose, unchecked."""

    kind: str
    amount: float | None
    patch_size: int
    unchanged: str
    seed: int
    step: int


class Levels(NamedTuple):
    """Values that stand for black and white in an image tensor, each of shape [] or [channel, 1, 1]."""

    black: Tensor
    white: Tensor


def keys_of(prompt_ids: Tensor, image_index: Tensor | None) -> list[Key]:
    index = torch.zeros_like(prompt_ids) if image_index is None else image_index
    return [Key(prompt, image, 0) for prompt, image in zip(prompt_ids.tolist(), index.tolist(), strict=True)]


def _generator(seed: int, step: int, key: Key) -> Generator:
    # Hashed, not added: seed 0 at step 1 must not repeat seed 1 at step 0.
    digest = hashlib.blake2b(repr((seed, step, *key)).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little"))


def concatenate(views: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(views) if views else like.clone()


def corrupt_views(views: Sequence[Tensor], keys: Sequence[Key], levels: Levels, recipe: Recipe) -> list[Tensor]:
    """The one implementation: views of shape [frame, channel, height, width], of any sizes, to the same."""
    kind, amount, patch_size, unchanged, seed, step = recipe
    if kind == "none":
        raise ValueError(
            "kind='none' is a pass without any image, which no pixel tensor can express: build the prompt without its "
            "image placeholders and call the model without pixel_values, or choose 'gray' for a blank image"
        )
    act = choose("kind", kind, _KINDS)
    choose("unchanged", unchanged, {"raise": None, "keep": None})
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    if (problem := problem_of_amount(kind, amount)) is not None:
        raise ValueError(f"amount {problem}")
    if amount is None:
        amount = AMOUNTS[kind][0] if kind in AMOUNTS else 0.0

    groups: dict[tuple[Key, torch.Size], list[int]] = defaultdict(list)
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
            amount=amount,
            patch_size=patch_size,
            generator=_generator(seed, step, key),
            donor=_donor(rows[0], keys, views) if kind == "other_image" else stack[0],
        )
        result = act(stack.to(dtype), settings)
        result = result.to(stack.dtype) if stack.is_floating_point() else result.round().clamp(0, 255).to(stack.dtype)
        for row, view, has_moved in zip(rows, result, (result != stack).flatten(1).any(1), strict=True):
            corrupted[row], moved[row] = view, has_moved
    if unchanged == "raise" and moved and not torch.stack(moved).all():
        # A no-op must not pass for "the image did not matter". An image of one color has nothing that could go.
        colorful = [row for row, view in enumerate(views) if (view != view[:1, :, :1, :1]).any()]
        same = [row for row in colorful if not moved[row]]
        if same:
            raise ValueError(
                f"kind={kind!r} left images {same} as they were: "
                "raise amount, lower patch_size, choose another kind, give 'other_image' a batch with several "
                'prompts, or accept a contrast of 0 with unchanged="keep"'
            )
    return corrupted


def _donor(row: int, keys: Sequence[Key], views: Sequence[Tensor]) -> Tensor:
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
    amount: float
    patch_size: int
    generator: Generator
    donor: Tensor


# From here on, images are [row, frame, channel, height, width]; all rows and frames share one draw.


def _patch_mask(images: Tensor, settings: _Settings) -> Tensor:
    height, width, side = *images.shape[-2:], settings.patch_size
    rows, columns = -(-height // side), -(-width // side)
    order = torch.randperm(rows * columns, generator=settings.generator)
    hidden = order < max(1, round(settings.amount * len(order)))
    hidden = repeat(hidden, "(row column) -> (row ph) (column pw)", row=rows, ph=side, pw=side)
    return torch.where(hidden[:height, :width].to(images.device), settings.black, images)


def _black(images: Tensor, settings: _Settings) -> Tensor:
    return settings.black.expand_as(images).clone()


def _gray(images: Tensor, settings: _Settings) -> Tensor:
    return ((settings.black + settings.white) / 2).expand_as(images).clone()


def _noise(images: Tensor, settings: _Settings) -> Tensor:
    noise = torch.randn(images.shape[2:], generator=settings.generator).to(images)
    noisy = images + settings.amount * (settings.white - settings.black) * noise
    return noisy.clamp(settings.black, settings.white)


def _blur(images: Tensor, settings: _Settings) -> Tensor:
    down, across = (_blur_matrix(size, settings.amount).to(images) for size in images.shape[-2:])
    return down @ images @ across.T


def _blur_matrix(size: int, sigma: float) -> Tensor:
    """Gaussian means along one side as a matrix: on a CPU three times faster than convolving this widely."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1)
    kernel = (-(offsets.double() ** 2) / (2 * sigma**2)).softmax(0)
    taps = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)  # beyond the border, the border's own color
    return kernel.new_zeros(size, size).scatter_add_(1, taps, kernel.expand_as(taps))


def _pixelate(images: Tensor, settings: _Settings) -> Tensor:
    height, width = images.shape[-2:]
    block = (min(int(settings.amount), height), min(int(settings.amount), width))
    means = F.avg_pool2d(images.flatten(0, 1), block, ceil_mode=True)  # blocks cut off at the border: mean of the rest
    blocks = repeat(means, "image channel h w -> image channel (h bh) (w bw)", bh=block[0], bw=block[1])
    return blocks[..., :height, :width].reshape(images.shape)


def _patch_shuffle(images: Tensor, settings: _Settings) -> Tensor:
    side = settings.patch_size
    rows, columns = (size // side for size in images.shape[-2:])
    order = torch.randperm(rows * columns, generator=settings.generator)
    moving = order[: round(settings.amount * len(order))]
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


_KINDS: dict[str, Callable[[Tensor, _Settings], Tensor]] = {
    "patch_mask": _patch_mask,
    "black": _black,
    "gray": _gray,
    "noise": _noise,
    "blur": _blur,
    "pixelate": _pixelate,
    "patch_shuffle": _patch_shuffle,
    "other_image": _other_image,
}


def needs_levels(kind: str) -> bool:
    """Whether a kind of corruption has to know which values are black and white."""
    return kind in ("patch_mask", "black", "gray", "noise")
