"""What processors return beside pixels and say about themselves -> arguments of the corruption.

Processors and configs hold one fact as number, pair, list, array, tensor or dict, and under several names:
``patch_size`` alone is an int in Qwen2-VL, a pair in InternVL and ``{"height": 16, "width": 16}`` in Pixtral.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "PIXEL_NAMES", "ImageFacts", "Sides", "channel_numbers", "image_facts", "image_token_id_of",
    "refuse_unknown_pixels", "sides", "vision_patch_size", "where_images_are", "whole_number",
]  # fmt: skip

#: Names under which pixels are corrupted.
PIXEL_NAMES = ("pixel_values", "pixel_values_videos")
# Parts of the names under which models of transformers and of remote code take other pixels.
_VISUAL = ("pixel_values", "image", "video", "frame", "patches")


class Sides(NamedTuple):
    """Height and width of a patch, in pixels."""

    height: int
    width: int


class ImageFacts(NamedTuple):
    """What a processor did to images, as far as :func:`corrupt_pixel_values` needs to know it.

    Attributes:
        image_mean: What was subtracted after rescaling to [0, 1], one number or one per channel.
        image_std: What the result was divided by.
        merge_size: Patches that the model merges into one token along each side, in the flattened layouts.
        temporal_patch_size: Frames that one row of the flattened layout holds.
    """

    image_mean: float | Sequence[float]
    image_std: float | Sequence[float]
    merge_size: int
    temporal_patch_size: int


def image_facts(processor: Any) -> ImageFacts | None:
    """The facts of a processor of transformers, or of an image processor; None where there is no image processor.

    A video processor works as well. Numbers may have any form in which processors hold them.

    Raises:
        ValueError: If the image processor normalizes but does not say by what, or a fact is no number.

    Example:
        >>> class ImageProcessor:
        ...     do_normalize, image_mean, image_std, merge_size = True, [0.5] * 3, [0.5] * 3, 2
        >>> image_facts(ImageProcessor())
        ImageFacts(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], merge_size=2, temporal_patch_size=2)
    """
    images = getattr(processor, "image_processor", processor)
    if images is None or not any(hasattr(images, name) for name in ("do_normalize", "image_mean", "image_std")):
        return None
    mean, std = (
        (getattr(images, "image_mean", None), getattr(images, "image_std", None))
        if getattr(images, "do_normalize", True)
        else (0.0, 1.0)
    )
    if mean is None or std is None:
        raise ValueError(
            f"{type(images).__name__} has no image_mean and image_std, so black is not known: add them to "
            "preprocessor_config.json of the model"
        )
    means, stds = channel_numbers("image_mean", mean), channel_numbers("image_std", std)
    return ImageFacts(
        means if len(means) > 1 else means[0],
        stds if len(stds) > 1 else stds[0],
        # The names of the same fact in Qwen-VL, LFM2-VL and Gemma 4.
        _first_number(images, ("merge_size", "downsample_factor", "pooling_kernel_size")),
        _first_number(images, ("temporal_patch_size",)),
    )


def _first_number(holder: Any, names: Sequence[str]) -> int:
    found = [(name, value) for name in names if (value := getattr(holder, name, None)) is not None]
    return whole_number(*found[0]) if found else 2


def vision_patch_size(config: Any) -> Sides | None:
    """Height and width of a patch of a model's vision encoder, or None if its config, an object or dict, has none.

    Example:
        >>> from srpo_core.pixel_values import vision_patch_size
        >>> vision_patch_size({"vision_config": {"patch_size": (14, 14)}})
        Sides(height=14, width=14)
    """
    for name in ("vision_config", "patch_size"):
        config = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return None if config is None else sides("vision_config.patch_size", config)


def image_token_id_of(config: Any, *, needed_by: str | None = None) -> int | None:
    """The id of the image placeholder in a prompt, or None where a model's config does not name it.

    Args:
        config: Of the model.
        needed_by: What cannot do without it, as the user wrote it.

    Raises:
        ValueError: If it is needed and not named.

    Example:
        >>> from types import SimpleNamespace
        >>> from srpo_core.pixel_values import image_token_id_of
        >>> image_token_id_of(SimpleNamespace(image_token_index=32000))
        32000
    """
    for name in ("image_token_id", "image_token_index"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    if needed_by is not None:
        raise ValueError(
            f"{needed_by} has to know the image placeholder, but the config of {config.model_type!r} has neither "
            "image_token_id nor image_token_index: choose another corruption"
        )
    return None


def where_images_are(name: str, pixels: Tensor, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :func:`corrupt_pixel_values` that say where images are, from what a processor returned.

    Args:
        name: ``pixel_values`` or ``pixel_values_videos``.
        pixels: The tensor with that name.
        inputs: Everything that the processor returned.

    Raises:
        ValueError: If these are videos in a layout that no argument describes.

    Example:
        >>> from srpo_core.pixel_values import where_images_are
        >>> where_images_are("pixel_values", torch.ones(1, 3, 64, 64), {"image_sizes": [[32, 48]], "input_ids": 3})
        {'image_sizes': tensor([[32, 48]])}
    """
    is_video, axes = name == "pixel_values_videos", pixels.ndim
    if is_video and axes not in (2, 5):
        raise ValueError(
            "pixel_values_videos must have 2 axes with video_grid_thw or 5 (videos, frames, channels, height, width), "
            f"got shape {tuple(pixels.shape)}: SRPO cannot corrupt this model's videos"
        )
    given: dict[str, Any] = {}
    if axes == 2:
        given["image_grid_thw"] = inputs.get("video_grid_thw" if is_video else "image_grid_thw")
    elif is_video:
        return {"second_axis": "frames"}
    elif axes == 3:
        given["spatial_shapes"] = inputs.get("spatial_shapes")
        positions = [inputs[key] for key in ("image_position_ids", "pixel_position_ids") if inputs.get(key) is not None]
        if given["spatial_shapes"] is None and positions:
            given["spatial_shapes"] = _shapes_of_positions(torch.as_tensor(positions[0]))
    elif axes == 4:
        given["image_sizes"] = inputs.get("image_sizes")
    if axes > 2:
        masks = [inputs[key] for key in ("pixel_attention_mask", "pixel_mask") if inputs.get(key) is not None]
        given["pixel_attention_mask"] = masks[0] if masks else None
    return {key: torch.as_tensor(value) for key, value in given.items() if value is not None}


def _shapes_of_positions(positions: Tensor) -> Tensor:
    """Rows and columns of patches out of [images, patches, (column, row)], -1 at padding, as Gemma 4 has them."""
    shapes = (positions.amax(1) + 1).flip(-1)
    length = torch.arange(positions.shape[1], device=positions.device)
    rows, columns = length // shapes[:, 1:].clamp(min=1), length % shapes[:, 1:].clamp(min=1)
    expected = torch.stack([columns, rows], -1)
    expected = torch.where((length < shapes.prod(1, keepdim=True))[..., None], expected, -1)
    if not torch.equal(expected, positions.to(expected.dtype)):
        raise ValueError(
            "image_position_ids must number the patches of an image in reading order, padding -1 at the end: SRPO "
            "cannot corrupt this model's images"
        )
    return shapes


def refuse_unknown_pixels(inputs: Mapping[str, Any]) -> None:
    """Raise if a model gets images or videos under a name that is not corrupted, because it would then see them.

    Raises:
        ValueError: Naming the input.
    """
    for name, value in inputs.items():
        if name in PIXEL_NAMES or "mask" in name or not any(part in name for part in _VISUAL):
            continue
        values = value if isinstance(value, list | tuple) else [value]
        kinds = [str(each.dtype) for each in values if getattr(each, "ndim", 0) > 1]
        if any("float" in kind or "uint8" in kind for kind in kinds):
            raise ValueError(
                f"{name} seems to hold images, but SRPO corrupts only pixel_values and pixel_values_videos, and would "
                "leave them to be seen: this model is not supported"
            )


# Numbers in any form


def sides(argument: str, value: Any) -> Sides:
    """Height and width from one whole number, a pair, or a mapping or object with ``height`` and ``width``.

    Raises:
        ValueError: Naming the argument, if it is none of these or below 1.

    Example:
        >>> from srpo_core.processor_values import sides
        >>> sides("patch_size", 14), sides("patch_size", {"height": 16, "width": 8})
        (Sides(height=14, width=14), Sides(height=16, width=8))
    """
    leaves = _listed(value)
    numbers = [number for each in leaves if (number := _whole(each)) is not None]
    if len(numbers) not in (1, 2) or len(numbers) != len(leaves):
        raise ValueError(
            f"{argument} must be a whole number of pixels, a pair of height and width, or a dict with 'height' and "
            f"'width', got {value!r}"
        )
    if min(numbers) < 1:
        raise ValueError(f"{argument} must be at least 1, got {value!r}")
    return Sides(numbers[0], numbers[-1])


def whole_number(argument: str, value: Any) -> int:
    """One whole number, also where it is wrapped in an array or repeated in a pair.

    Raises:
        ValueError: Naming the argument, if it is not one number of at least 1.
    """
    numbers = {_whole(each) for each in _listed(value)}
    number = numbers.pop() if len(numbers) == 1 else None
    if number is None:
        raise ValueError(f"{argument} must be one whole number, the same for height and width, got {value!r}")
    if number < 1:
        raise ValueError(f"{argument} must be at least 1, got {value!r}")
    return number


def channel_numbers(argument: str, value: Any) -> list[float]:
    """One finite number, or one for each channel, as a list.

    Raises:
        ValueError: Naming the argument.
    """
    leaves = _listed(value)
    numbers = [number for each in leaves if (number := _number(each)) is not None and math.isfinite(number)]
    if not numbers or len(numbers) != len(leaves):
        raise ValueError(f"{argument} must be one number or one for each channel, got {value!r}")
    return numbers


def _listed(value: Any) -> list[Any]:
    """The leaves, in order; height before width."""
    if isinstance(value, Mapping):
        return [value["height"], value["width"]] if {"height", "width"} <= value.keys() else [value]
    if hasattr(value, "tolist"):  # a tensor, or an array or number of numpy
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in _listed(each)]
    if getattr(value, "height", None) is not None and getattr(value, "width", None) is not None:
        return [value.height, value.width]  # transformers' SizeDict
    return [value]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or not number.is_integer() else int(number)
