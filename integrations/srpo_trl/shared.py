"""A rollout batch of TRL -> prompts that srpo_hf encodes once each, and the log-probs of every view on this rank."""

from typing import Any

import torch
from srpo_hf import EncodedPrompt, Scorer
from torch import Tensor

from srpo_core import RolloutBatch
from srpo_core.batch import Plan
from srpo_core.counterfactuals import CounterfactualResponses
from srpo_trl.contexts import Context

__all__ = ["encoded_prompts", "own_rows", "score_with_shared_prefixes"]


def score_with_shared_prefixes(
    scorer: Scorer,
    contexts: dict[str, Context],
    responses: RolloutBatch,
    planned: Plan,
    own: slice,
    *,
    every_token: bool,
) -> dict[str, Tensor]:
    """The log-probs, nats, of this rank's responses in their own context, ``original``, and in every view of the plan.

    Args:
        scorer: Of the model.
        contexts: Of this rank, by the image in them.
        responses: Of all ranks.
        planned: For these.
        own: Which of them are this rank's.
        every_token: As :meth:`srpo_hf.Scorer.score` takes it.
    """
    prompts = encoded_prompts(contexts["original"])
    corrupted = encoded_prompts(contexts["corrupted"]) if "corrupted" in contexts else None
    batch, local = own_rows(responses, planned, own)
    return scorer.score(prompts, None, batch, local, every_token=every_token, corrupted=corrupted).log_probs


def own_rows(responses: RolloutBatch, planned: Plan, own: slice) -> tuple[RolloutBatch, Plan]:
    """The part of a batch of all ranks, and of its plan, that belongs to some rows."""

    def rows(values: Any) -> Any:
        return type(values)(*(None if each is None else each[own] for each in values))

    views = [
        view if view.responses is None else view._replace(responses=rows(view.responses)) for view in planned.views
    ]
    batch = responses._replace(
        token_ids=responses.token_ids[own],
        mask=responses.mask[own],
        segmentation=rows(responses.segmentation),
        group_ids=responses.group_ids[own],
        open_at_start=None if responses.open_at_start is None else responses.open_at_start[own],
    )
    changed: CounterfactualResponses = rows(planned.counterfactual)
    return batch, planned._replace(views=tuple(views), counterfactual=changed)


def encoded_prompts(context: Context) -> list[EncodedPrompt]:
    """The prompts of a context one by one, without padding, each with what the model sees of its images."""
    real, time = context.prompt_mask.bool().cpu(), context.prompt_ids.shape[1]
    token_ids = context.prompt_ids.cpu()
    types = {name: values[:, :time].cpu() for name, values in context.token_types.items()}
    seen = _vision_of_rows(context.vision, len(token_ids))
    images = context.vision.get("num_images") or [int("pixel_values" in each) for each in seen]
    return [
        EncodedPrompt(
            token_ids[row][where], {name: values[row][where] for name, values in types.items()}, seen[row], images[row]
        )
        for row, where in enumerate(real)
    ]


def _vision_of_rows(vision: dict[str, Any], rows: int) -> list[dict[str, Tensor]]:
    """What TRL's log-prob function gives the model of each row, by the names of the model's arguments."""
    if "pixel_values" not in vision:
        return [{} for _ in range(rows)]
    pixels, each_row = vision["pixel_values"], [1] * rows
    images = list(vision.get("num_images") or each_row)
    tiles = list(vision.get("num_tiles") or images)
    of_pixels = tiles if len(pixels) == sum(tiles) else each_row
    if "image_grid_thw" in vision:
        of_pixels = [int(part.prod(-1).sum()) for part in vision["image_grid_thw"].split(images)]
    sizes = {
        "pixel_values": of_pixels,
        "image_grid_thw": images,
        "image_position_ids": images,
        "pixel_position_ids": images,
        "image_sizes": images,
        "spatial_shapes": tiles,
        "pixel_attention_mask": tiles if "spatial_shapes" in vision else each_row,
    }
    parts = {name: torch.as_tensor(vision[name]).split(of_rows) for name, of_rows in sizes.items() if name in vision}
    return [{name: values[row] for name, values in parts.items()} for row in range(rows)]
