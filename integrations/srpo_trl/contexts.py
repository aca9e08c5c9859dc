"""What responses are scored under: a batch of TRL -> prompts and pixels -> the same with the image corrupted."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo_core import SRPOConfig, corrupt_pixel_values

__all__ = ["VISION_KEYS", "Context", "context_of", "corrupted_context", "scoring_inputs", "without_images"]

#: What TRL's batches carry beside token ids, and its log-prob function takes by the same names.
VISION_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
    "pixel_position_ids",  # its name in TRL 1.0
)
# These have one entry per token of prompt and response, so they change with either.
_TYPE_KEYS = ("token_type_ids", "mm_token_type_ids")


class Context(NamedTuple):
    """Prompts, left-padded, and what the model sees beside them.

    Attributes:
        prompt_ids: [batch, prompt_time].
        prompt_mask: [batch, prompt_time], 1 at real tokens.
        vision: Keyword arguments of TRL's log-prob function, images in the order of the rows.
        token_types: [batch, prompt_time + time] of each key in use; all 0 over sampled tokens.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    vision: dict[str, Any]
    token_types: dict[str, Tensor]


def context_of(batch: dict[str, Any]) -> Context:
    """The context that the responses of a batch were sampled in. Shares the batch's tensors: do not write to them."""
    known = {key: batch[key] for key in VISION_KEYS if key in batch}
    types = {key: known.pop(key) for key in _TYPE_KEYS if key in known}
    return Context(batch["prompt_ids"], batch["prompt_mask"], known, types)


def corrupted_context(
    context: Context,
    options: SRPOConfig,
    *,
    processor: Any,
    model_config: Any,
    group_ids: Tensor,
    step: int,
    is_first: bool,
) -> Context:
    """The same prompts with less to see in their images.

    Args:
        context: Holds ``pixel_values``.
        options: Which corruption.
        processor: TRL's processing class; its image processor knows how pixels were normalised.
        model_config: Knows the size of a patch and the id of the image placeholder.
        group_ids: The prompt of each row, unique over ranks: rollouts of one prompt share a draw.
        step: Optimiser step; a new one, a new draw.
        is_first: Whether an image that comes out unchanged is an error (a wrong setting) or accepted (an odd image).
    """
    if options.corruption == "none":
        return without_images(context, _image_token_id(model_config))
    pixels = context.vision["pixel_values"]
    counts = torch.tensor(_images_per_row(context), device=group_ids.device)
    first_of_row = (counts.cumsum(0) - counts).repeat_interleave(counts)
    images = processor.image_processor
    normalised = getattr(images, "do_normalize", True)
    corrupted = corrupt_pixel_values(
        pixels,
        prompt_ids=group_ids.repeat_interleave(counts),
        image_index=torch.arange(len(first_of_row), device=group_ids.device) - first_of_row,
        image_grid_thw=context.vision.get("image_grid_thw"),
        kind=options.corruption,
        strength=options.corruption_strength,
        patch_size=None if pixels.ndim == 2 else getattr(model_config.vision_config, "patch_size", None),
        merge_size=getattr(images, "merge_size", 2),
        temporal_patch_size=getattr(images, "temporal_patch_size", 2),
        image_mean=getattr(images, "image_mean", None) if normalised else 0.0,
        image_std=getattr(images, "image_std", None) if normalised else 1.0,
        unchanged="raise" if is_first else "keep",
        seed=options.seed,
        step=step,
    )
    return context._replace(vision=context.vision | {"pixel_values": corrupted})


def without_images(context: Context, image_token_id: int) -> Context:
    """The same prompts without images: placeholders removed, what marks their place (``<|vision_start|>``) left."""
    keep = context.prompt_mask.bool() & (context.prompt_ids != image_token_id)
    order = keep.long().argsort(dim=1, stable=True)  # padding and placeholders to the left, the rest as it was
    prompt_time = order.shape[1]
    types = {
        key: torch.cat([(value[:, :prompt_time] * keep).gather(1, order), value[:, prompt_time:]], dim=1)
        for key, value in context.token_types.items()
    }
    # A placeholder id may not stay even where it is masked: models count them.
    text = torch.where(keep, context.prompt_ids, context.prompt_ids.new_zeros(()))
    return Context(text.gather(1, order), keep.to(context.prompt_mask.dtype).gather(1, order), {}, types)


def scoring_inputs(
    context: Context, response_ids: Tensor, attention_mask: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Token ids, attention mask and keyword arguments for TRL's log-prob function.

    Args:
        context: What the responses follow.
        response_ids: [batch, new_time], right-padded.
        attention_mask: [batch, new_time], True where a token may be attended.
        positions: Where each original token sits in the new responses (:class:`~srpo_core.CounterfactualResponses`);
            None if nothing moved.
    """
    token_ids = torch.cat([context.prompt_ids, response_ids], dim=1)
    mask = torch.cat([context.prompt_mask, attention_mask.to(context.prompt_mask.dtype)], dim=1)
    prompt_time = context.prompt_ids.shape[1]
    types = context.token_types
    if positions is not None:
        width = response_ids.shape[1]
        where = torch.where(positions < 0, width, positions)  # removed tokens fall into an extra column, cut off
        types = {}
        for key, value in context.token_types.items():
            moved = value.new_zeros(len(value), width + 1).scatter(1, where, value[:, prompt_time:])
            types[key] = torch.cat([value[:, :prompt_time], moved[:, :width]], dim=1)
    return token_ids, mask, context.vision | types


def _images_per_row(context: Context) -> list[int]:
    """Entries of the pixel tensor, or of its grid, that belong to each row."""
    rows, pixels = len(context.prompt_ids), context.vision["pixel_values"]
    if "num_tiles" in context.vision:
        return list(context.vision["num_tiles"])
    images = list(context.vision.get("num_images") or [1] * rows)
    is_padded_per_row = "image_grid_thw" not in context.vision and len(pixels) != sum(images)
    return [1] * rows if is_padded_per_row else images


def _image_token_id(model_config: Any) -> int:
    for name in ("image_token_id", "image_token_index"):
        if getattr(model_config, name, None) is not None:
            return getattr(model_config, name)
    raise ValueError(
        f"srpo_corruption='none' has to know the image placeholder, but the config of {model_config.model_type!r} has "
        "neither image_token_id nor image_token_index: choose another corruption"
    )
