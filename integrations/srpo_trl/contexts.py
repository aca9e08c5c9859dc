"""What responses are scored under: a batch of TRL -> prompts and pixels -> the same with the image corrupted."""

from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo_core import SRPOConfig, corrupt_pixel_values
from srpo_core.batch import prompt_id
from srpo_core.pixel_values import (
    count_images,
    image_facts,
    image_token_id_of,
    images_without_padding,
    refuse_unknown_pixels,
    vision_patch_size,
    where_images_are,
)
from srpo_trl.upstream import VISION_KEYS

__all__ = ["Context", "contexts_of", "prompt_ids_of", "scoring_inputs"]

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


def contexts_of(
    batch: dict[str, Any], options: SRPOConfig, *, processor: Any, model_config: Any, group_ids: Tensor, step: int
) -> tuple[dict[str, Context], Tensor | None]:
    """What the responses of a batch are scored under, by the image in it: "original", and "corrupted" if there is one.

    They share the batch's tensors: do not write to them.

    Args:
        batch: From TRL.
        options: Which corruption.
        processor: TRL's processing class; its image processor knows how pixels were normalized.
        model_config: Knows the size of a patch, in any form, and the id of the image placeholder.
        group_ids: The prompt of each row, unique over ranks: rollouts of one prompt share a draw.
        step: Optimizer step; a new one, a new draw.

    Returns:
        The contexts; and of each row its images and how many of them the corruption left as they were.
    """
    original = _original(batch)
    vision = original.vision
    if "pixel_values_videos" in batch:
        raise ValueError("pixel_values_videos: TRL's log-prob function takes no videos, so SRPO has none to corrupt")
    refuse_unknown_pixels(batch)
    if "pixel_values" not in vision:
        return {"original": original}, None
    images = torch.tensor(_images_per_row(original), device=group_ids.device)
    if options.corruption == "none":
        corrupted = _without_images(original, image_token_id_of(model_config, needed_by="srpo_corruption='none'"))
        return {"original": original, "corrupted": corrupted}, torch.stack([images, 0 * images], dim=1)
    pixels, facts = vision["pixel_values"], image_facts(processor)
    first_of_row = (images.cumsum(0) - images).repeat_interleave(images)
    changed = corrupt_pixel_values(
        pixels,
        prompt_ids=group_ids.repeat_interleave(images),
        image_index=torch.arange(len(first_of_row), device=group_ids.device) - first_of_row,
        **where_images_are("pixel_values", pixels, vision),
        kind=options.corruption,
        amount=options.corruption_amount,
        patch_size=None if pixels.ndim < 4 else vision_patch_size(model_config),
        unchanged="keep",
        seed=options.seed,
        step=step,
        **(facts._asdict() if facts else {}),
    )
    corrupted = original._replace(vision=vision | {"pixel_values": changed})
    grid = vision.get("image_grid_thw")
    counts = count_images(pixels, changed, images_per_row=images.tolist(), image_grid_thw=grid)
    if "num_images" in vision and sum(vision["num_images"]) != len(pixels) == len(counts):
        # Padded for each row: one without an image has an entry too, which is all padding.
        counts *= torch.tensor(vision["num_images"], device=counts.device)[:, None].clamp(max=1)
    return {"original": original, "corrupted": corrupted}, counts


def prompt_ids_of(batch: dict[str, Any]) -> Tensor:
    """The identity of each row's prompt and images, [batch]: the same wherever in a run they turn up."""
    context = _original(batch)
    images: list[dict[str, Any]] = [{} for _ in context.prompt_ids]
    if "pixel_values" in context.vision:
        pixels = context.vision["pixel_values"]
        # Without padding, which depends on the rest of the batch, and so on the rank.
        parts = iter(images_without_padding(pixels, where_images_are("pixel_values", pixels, context.vision)))
        images = [
            {
                f"{image}.{tile}": part
                for image, tiles in enumerate(islice(parts, count))
                for tile, part in enumerate(tiles)
            }
            for count in _images_per_row(context)
        ]
    rows = zip(context.prompt_ids, context.prompt_mask.bool(), images, strict=True)
    return torch.tensor([prompt_id(row[real], seen) for row, real, seen in rows], device=context.prompt_ids.device)


def scoring_inputs(
    context: Context, response_ids: Tensor, attention_mask: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Token ids, attention mask and keyword arguments for TRL's log-prob function.

    Args:
        context: What the responses follow.
        response_ids: [batch, new_time], right-padded.
        attention_mask: [batch, new_time], True where a token may be attended.
        positions: Where each original token sits in the new responses, as
            :class:`~srpo_core.counterfactuals.CounterfactualResponses` has it; None if nothing moved.
    """
    token_ids = torch.cat([context.prompt_ids, response_ids], dim=1)
    mask = torch.cat([context.prompt_mask, attention_mask.to(context.prompt_mask.dtype)], dim=1)
    prompt_time, width = context.prompt_ids.shape[1], response_ids.shape[1]
    types = context.token_types
    if positions is not None:
        where = torch.where(positions < 0, width, positions)  # removed tokens fall into an extra column, cut off
        types = {}
        for key, value in context.token_types.items():
            moved = value.new_zeros(len(value), width + 1).scatter(1, where, value[:, prompt_time:])
            types[key] = torch.cat([value[:, :prompt_time], moved[:, :width]], dim=1)
    return token_ids, mask, context.vision | types


def _original(batch: dict[str, Any]) -> Context:
    vision = {key: batch[key] for key in VISION_KEYS if key in batch}
    types = {key: vision.pop(key) for key in _TYPE_KEYS if key in vision}
    return Context(batch["prompt_ids"], batch["prompt_mask"], vision, types)


def _without_images(context: Context, image_token_id: int | None) -> Context:
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


def _images_per_row(context: Context) -> list[int]:
    """Entries of the pixel tensor, or of its grid, that belong to each row."""
    rows, pixels = len(context.prompt_ids), context.vision["pixel_values"]
    if "num_tiles" in context.vision:
        return list(context.vision["num_tiles"])
    images = list(context.vision.get("num_images") or [1] * rows)
    is_padded_per_row = "image_grid_thw" not in context.vision and len(pixels) != sum(images)
    return [1] * rows if is_padded_per_row else images
