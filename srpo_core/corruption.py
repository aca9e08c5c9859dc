"""Images and processor outputs -> the same with less to see in them: seeded, and the same for a whole group.

================= =================================================== ====================================== =======
kind              what is done to the image                           ``amount``: unit and range             default
================= =================================================== ====================================== =======
``patch_mask``    a share of its patches is painted black             share of patches, (0, 1]               0.6
``black``         it becomes black                                    none
``gray``          it becomes mid-gray                                 none
``noise``         Gaussian noise is added, cut off at black and white s.d. in black-to-white ranges, above 0 0.5
``blur``          it is blurred by a Gaussian                         s.d. in pixels, above 0                10
``pixelate``      it becomes square blocks, each in its mean color    side of a block, whole pixels from 2   28
``patch_shuffle`` a share of its patches changes places               share of patches, (0, 1]               1
``other_image``   another prompt's image takes its place              none
``none``          refused: no pixel tensor says "there is no image"   none
================= =================================================== ====================================== =======

Patches are drawn without replacement: an image loses ``round(amount * patches)`` of them, at least one. Kinds and
amounts are choices of this project, because SRPO's own are not public; the share of 0.6 follows PAPO. A blank image can
be a valid image ("how many? 0"). With ``black`` and ``gray`` a true zero then looks like a token that does not depend
on the image.

**One draw per image of a prompt.** The private generator is keyed on (seed, step, prompt id, image of the prompt, tile
of the image) and draws on the CPU, so that a group's rollouts see the identical corruption whatever the batch, the
device or the dtype, and PyTorch's global random state stays as it was. All frames of a video share the draw, so that no
frame shows what another one hides. ``other_image`` draws nothing; which image it takes depends on the batch.
"""

import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Int, Real
from torch import Generator, Tensor

from srpo_core.checked import choose
from srpo_core.options import AMOUNTS, CorruptionKind, problem_of_amount
from srpo_core.processor_values import Sides, sides
from srpo_core.typechecking import typechecked

__all__ = [
    "Key", "Levels", "Recipe", "corrupt_images", "corrupt_views", "distinct", "have_changed", "hidden_cells", "keys_of",
    "needs_levels", "paints", "refuse_unchanged",
]  # fmt: skip


@typechecked
def corrupt_images(
    images: Real[Tensor, "batch channel height width"],
    *,
    prompt_ids: Int[Tensor, " batch"],
    image_index: Int[Tensor, " batch"] | None = None,
    kind: CorruptionKind = "patch_mask",
    amount: float | None = None,
    patch_size: Any = 14,
    unchanged: Literal["raise", "keep"] = "raise",
    seed: int = 0,
    step: int = 0,
) -> Real[Tensor, "batch channel height width"]:
    """Corrupted copies of images, made before a processor sees them.

    Args:
        images: Pixels: uint8 in 0..255 or floating point in [0, 1]. Black is 0.
        prompt_ids: The prompt that each image belongs to: any integers that name the same prompt everywhere, such as
            its place in the dataset. Images with the same id share one draw.
        image_index: Which of its prompt's images each one is, so that the images of one prompt are corrupted
            differently. None: 0 for all.
        kind: The corruption, see the module's table.
        amount: The amount of the corruption, in the unit of its kind (see the table). None: the kind's default.
        patch_size: The side of a patch in pixels (``patch_mask``, ``patch_shuffle``): what one token of the language
            model sees. One number, or height and width in any form in which configs hold them. Patches at the right and
            bottom border may be cut off; ``patch_shuffle`` leaves those in place.
        unchanged: What to do when the corruption leaves an image of more than one color as it was, because all masked
            patches were black already, because it is a single patch, or because the batch holds no other image for
            ``other_image``. "raise" is an error; "keep" accepts the image, whose contrast is then 0.
        seed: The first part of the key of the draw; any integer.
        step: The second part of the key: each optimizer step has a new draw.

    Returns:
        A new tensor of the same shape, dtype and device. With ``other_image`` each image becomes a different image of
        the batch, that of the next larger prompt id, or of the smallest id after the largest. It is resized where sizes
        differ, and its frames are repeated or dropped.

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
    recipe = Recipe.of(kind, amount, sides("patch_size", patch_size), unchanged, seed, step)
    pixels = images.detach()
    result = torch.empty_like(pixels, memory_format=torch.contiguous_format)
    views = list(pixels[:, None])
    moved = corrupt_views(views, list(result[:, None]), keys, levels, recipe)
    refuse_unchanged(recipe, ((image, views[image]) for image, has_moved in enumerate(moved) if not has_moved))
    return result


class Key(NamedTuple):
    """What a draw belongs to. Views with equal keys and shapes are corrupted identically."""

    prompt: int
    image: int
    tile: int


class Recipe(NamedTuple):
    """What the caller chose, checked, with the amount filled in."""

    kind: str
    amount: float
    patch: Sides
    unchanged: str
    seed: int
    step: int

    @classmethod
    def of(cls, kind: str, amount: float | None, patch: Sides, unchanged: str, seed: int, step: int) -> "Recipe":
        if kind == "none":
            raise ValueError(
                "kind='none' is a pass without any image, which no pixel tensor can express: build the prompt without "
                "its image placeholders and call the model without pixel_values, or choose 'gray' for a blank image"
            )
        choose("kind", kind, {**_PAINTS, **_KINDS})
        choose("unchanged", unchanged, {"raise": None, "keep": None})
        if (problem := problem_of_amount(kind, amount)) is not None:
            raise ValueError(f"amount {problem}")
        if amount is None:
            amount = AMOUNTS[kind][0] if kind in AMOUNTS else 0.0
        return cls(kind, amount, patch, unchanged, seed, step)

    def generator(self, key: Key) -> Generator:
        # Hashed, not added: seed 0 at step 1 must not repeat seed 1 at step 0.
        digest = hashlib.blake2b(repr((self.seed, self.step, *key)).encode(), digest_size=8).digest()
        return Generator().manual_seed(int.from_bytes(digest, "little"))


class Levels(NamedTuple):
    """Values that stand for black and white in an image tensor, each of shape [] or [channel, 1, 1]."""

    black: Tensor
    white: Tensor

    def like(self, pixels: Tensor) -> "Levels":
        """On the pixels' device, in at least float32."""
        dtype = torch.promote_types(pixels.dtype, torch.float32)
        return Levels(self.black.to(pixels.device, dtype), self.white.to(pixels.device, dtype))

    def paint(self, kind: str, pixels: Tensor) -> Tensor:
        """What the kind paints with, in the dtype of the pixels."""
        black, white = self.like(pixels)
        return _rounded((black + white) / 2 if kind == "gray" else black, pixels)


def keys_of(prompt_ids: Tensor, image_index: Tensor | None) -> list[Key]:
    index = torch.zeros_like(prompt_ids) if image_index is None else image_index
    return [Key(prompt, image, 0) for prompt, image in zip(prompt_ids.tolist(), index.tolist(), strict=True)]


def distinct(parts: Sequence[Tensor], labels: Sequence[Hashable]) -> list[int]:
    """Of each part the first one with its label and its values: the rollouts of a prompt show one image."""
    firsts: dict[Hashable, list[int]] = {}
    found = []
    for at, (part, label) in enumerate(zip(parts, labels, strict=True)):
        known = firsts.setdefault(label, [])
        first = next((first for first in known if torch.equal(parts[first], part)), at)
        if first == at:
            known.append(at)
        found.append(first)
    return found


def have_changed(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[bool]:
    """Of each pair whether it differs anywhere; on a CPU read up to the first difference only."""
    pairs = list(zip(before, after, strict=True))
    if all(each.device.type == "cpu" for each in before):
        return [not torch.equal(*pair) for pair in pairs]
    return torch.stack([(one != other).any() for one, other in pairs]).tolist()  # one wait, not one for each


def hidden_cells(rows: int, columns: int, key: Key, recipe: Recipe) -> Tensor:
    """Which cells of a grid a painting kind hides, bool [rows, columns], on the CPU."""
    if recipe.kind != "patch_mask":
        return torch.ones(rows, columns, dtype=torch.bool)
    order = torch.randperm(rows * columns, generator=recipe.generator(key))
    return (order < max(1, round(recipe.amount * len(order)))).reshape(rows, columns)


def corrupt_views(
    views: Sequence[Tensor], targets: Sequence[Tensor], keys: Sequence[Key], levels: Levels, recipe: Recipe
) -> list[bool]:
    """The one implementation for views of shape [frame, channel, height, width], of any sizes.

    Args:
        views: Real pixels only; all frames of a view share a draw.
        targets: Where to write, of the views' shapes.
        keys: Of each view.
        levels: Black and white.
        recipe: What to do.

    Returns:
        Of each view whether it changed.
    """
    if paints(recipe.kind):
        drawn: dict[Hashable, Tensor] = {}
        for view, target, key in zip(views, targets, keys, strict=True):
            if (key, view.shape) not in drawn:
                drawn[key, view.shape] = _hidden_pixels(view, key, recipe).to(view.device)
            torch.where(drawn[key, view.shape], levels.paint(recipe.kind, view), view, out=target)
        return have_changed(views, targets)
    # Painting costs no more than a comparison; everything else is done once for equal images.
    firsts = distinct(views, [(key, view.shape) for key, view in zip(keys, views, strict=True)])
    for at, (first, view, target) in enumerate(zip(firsts, views, targets, strict=True)):
        if first != at:
            target.copy_(targets[first])
            continue
        donor = _donor(at, keys, views) if recipe.kind == "other_image" else view
        pixels = view.to(torch.promote_types(view.dtype, torch.float32))
        settings = _Settings(*levels.like(view), recipe.amount, recipe.patch, recipe.generator(keys[at]), donor)
        target.copy_(_rounded(_KINDS[recipe.kind](pixels, settings), view))
    return have_changed(views, targets)


def refuse_unchanged(recipe: Recipe, still: Iterable[tuple[int, Tensor]]) -> None:
    """Raise if images may not stay as they were: a no-op must not pass for "the image did not matter".

    Args:
        recipe: Whether they may.
        still: Those that did: which image, and it as [frame, channel, height, width].
    """
    if recipe.unchanged == "keep":
        return
    # An image of one color has nothing that could go.
    same = sorted({image for image, view in still if (view != view[:1, :, :1, :1]).any()})
    if same:
        raise ValueError(
            f"kind={recipe.kind!r} left images {same} as they were: "
            "raise amount, lower patch_size, choose another kind, give 'other_image' a batch with several "
            'prompts, or accept a contrast of 0 with unchanged="keep"'
        )


def _rounded(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype) if like.is_floating_point() else values.round().clamp(0, 255).to(like.dtype)


def _hidden_pixels(view: Tensor, key: Key, recipe: Recipe) -> Tensor:
    height, width = view.shape[-2:]
    rows, columns = -(-height // recipe.patch.height), -(-width // recipe.patch.width)
    cells = hidden_cells(rows, columns, key, recipe)
    hidden = repeat(cells, "row column -> (row ph) (column pw)", ph=recipe.patch.height, pw=recipe.patch.width)
    return hidden[:height, :width]


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
    patch: Sides
    generator: Generator
    donor: Tensor


# From here on, images are [frame, channel, height, width]; all frames share one draw.


def _noise(images: Tensor, settings: _Settings) -> Tensor:
    noise = torch.randn(images.shape[1:], generator=settings.generator).to(images)
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
    means = F.avg_pool2d(images, block, ceil_mode=True)  # blocks cut off at the border: mean of the rest
    blocks = repeat(means, "frame channel h w -> frame channel (h bh) (w bw)", bh=block[0], bw=block[1])
    return blocks[..., :height, :width]


def _patch_shuffle(images: Tensor, settings: _Settings) -> Tensor:
    high, wide = settings.patch
    rows, columns = images.shape[-2] // high, images.shape[-1] // wide
    order = torch.randperm(rows * columns, generator=settings.generator)
    moving = order[: round(settings.amount * len(order))]
    if len(moving) < 2:
        return images
    # One random cycle: unlike a random permutation it leaves none of the moving patches where it was.
    source = torch.arange(len(order))
    source[moving] = moving.roll(1)
    result = images.clone()
    whole = result[..., : rows * high, : columns * wide]
    patches = rearrange(
        whole, "frame channel (h ph) (w pw) -> (h w) frame channel ph pw", ph=high, pw=wide
    )[source.to(images.device)]  # fmt: skip
    whole.copy_(rearrange(patches, "(h w) frame channel ph pw -> frame channel (h ph) (w pw)", h=rows))
    return result


def _other_image(images: Tensor, settings: _Settings) -> Tensor:
    donor, frames = settings.donor.to(images), len(images)
    if donor.shape[-2:] != images.shape[-2:]:
        donor = F.interpolate(donor, images.shape[-2:], mode="bilinear", antialias=True)
    return donor[torch.arange(frames, device=donor.device) % len(donor)]


# These put one color over some of the patches and leave the others: nothing has to be computed for a pixel.
_PAINTS = dict.fromkeys(("patch_mask", "black", "gray"))
_KINDS: dict[str, Callable[[Tensor, _Settings], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "pixelate": _pixelate,
    "patch_shuffle": _patch_shuffle,
    "other_image": _other_image,
}


def paints(kind: str) -> bool:
    """Whether a kind of corruption puts one color over some patches."""
    return kind in _PAINTS


def needs_levels(kind: str) -> bool:
    """Whether a kind of corruption has to know which values are black and white."""
    return paints(kind) or kind == "noise"
