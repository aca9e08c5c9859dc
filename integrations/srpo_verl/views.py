"""The rows of one worker -> the same rows with the image corrupted, or with another perception in the response.

Plain tensors and dicts, nothing of verl. Rows are not padded; buffers may be shared with other processes, so nothing is
written in place.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo_core import CounterfactualResponses, SRPOConfig, corrupt_pixel_values

__all__ = [
    "ImageFacts",
    "ViewNames",
    "corrupt_rows",
    "image_facts",
    "moved_positions",
    "prompt_id",
    "source_tokens",
    "view_names",
]

_PIXELS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
# One entry per token of the sequence, so they would have to change with the response.
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")


class ViewNames(NamedTuple):
    """What the fields of changed responses are called on their way to the workers, and that of their log-probs."""

    responses: str
    sources: str
    log_probs: str


def view_names(config: SRPOConfig) -> list[ViewNames]:
    """The changed responses that are scored: the counterfactual perception, then each span left out for a use score.

    Example:
        >>> [view.log_probs for view in view_names(SRPOConfig(use_spans=1))]
        ['srpo_counterfactual_log_probs', 'srpo_span_0_log_probs']
    """
    spans = [f"srpo_span_{k}" for k in range(config.use_passes)]
    return [
        ViewNames("srpo_responses", "srpo_sources", "srpo_counterfactual_log_probs"),
        *(ViewNames(f"{span}_responses", f"{span}_sources", f"{span}_log_probs") for span in spans),
    ]


class ImageFacts(NamedTuple):
    """What a processor did to images, as :func:`~srpo_core.corrupt_pixel_values` asks for it."""

    image_mean: float | Sequence[float]
    image_std: float | Sequence[float]
    merge_size: int
    temporal_patch_size: int


def image_facts(processor: Any) -> ImageFacts | None:
    """The facts of a processor of transformers; None where the model takes no images.

    Raises:
        ValueError: If an image processor does not say how it normalises.
    """
    images = getattr(processor, "image_processor", None)
    if images is None:
        return None
    if getattr(images, "do_normalize", True):
        mean, std = getattr(images, "image_mean", None), getattr(images, "image_std", None)
    else:
        mean, std = 0.0, 1.0
    if mean is None or std is None:
        raise ValueError(
            f"{type(images).__name__} has no image_mean and image_std, so black is not known: add them to "
            "preprocessor_config.json of the model"
        )
    return ImageFacts(mean, std, getattr(images, "merge_size", 2), getattr(images, "temporal_patch_size", 2))


def prompt_id(prompt: Tensor, inputs: Mapping[str, Any]) -> int:
    """A number that names a prompt and its images in every process, batch and run: it keys the corruption's draw.

    Of the pixels only up to 4096 values, evenly spread, are read: enough to tell images apart.
    """
    digest = hashlib.blake2b(_bytes(prompt), digest_size=7)
    for key, _ in _PIXELS:
        if isinstance(inputs.get(key), Tensor):
            pixels = inputs[key].flatten()
            digest.update(_bytes(pixels[:: max(1, len(pixels) // 4096)].float()))
    return int.from_bytes(digest.digest(), "little")


def corrupt_rows(
    rows: Sequence[Mapping[str, Any] | None],
    prompts: Sequence[Tensor],
    config: SRPOConfig,
    facts: ImageFacts | None,
    *,
    step: int,
) -> tuple[list[dict[str, Any]], Tensor]:
    """Each row's ``multi_modal_inputs`` with corrupted pixels; ids and grids stay as they are.

    Args:
        rows: verl's ``multi_modal_inputs``; empty or None for a row without images, as for padding rows.
        prompts: Prompt token ids of each row. Rows of one prompt share a draw, and the corrupted tensor.
        config: Which corruption.
        facts: From :func:`image_facts`.
        step: Training step; a new one, a new draw.

    Returns:
        The new rows, and of each row its images, and how many of them the corruption left as they were: [rows, 2].

    Raises:
        ValueError: If pixels are not in a layout that :func:`~srpo_core.corrupt_pixel_values` knows.
    """
    known: dict[tuple[int, str], tuple[Tensor, int, int]] = {}
    corrupted, counts = [], []
    for row, prompt in zip(rows, prompts, strict=True):
        new, images, same = dict(row or {}), 0, 0
        number = prompt_id(prompt, new)
        for key, grid_key in _PIXELS:
            if new.get(key) is None:
                continue
            if (number, key) not in known:
                known[number, key] = _corrupt(key, new[key], new.get(grid_key), number, config, facts, step=step)
            new[key], of_key, same_of_key = known[number, key]
            images, same = images + of_key, same + same_of_key
        corrupted.append(new)
        counts.append((images, same))
    return corrupted, torch.tensor(counts, dtype=torch.int64).reshape(-1, 2)


def _corrupt(
    key: str, pixels: Any, grid: Tensor | None, number: int, config: SRPOConfig, facts: ImageFacts | None, *, step: int
) -> tuple[Tensor, int, int]:
    if not isinstance(pixels, Tensor) or facts is None:
        raise ValueError(
            f"multi_modal_inputs[{key!r}] must be a tensor made by an image processor, got {type(pixels).__name__} "
            f"{'and no image processor' if facts is None else ''}: SRPO cannot corrupt this model's images"
        )
    images = len(pixels) if grid is None else len(grid)
    prompt_ids = torch.full((images,), number)
    # Beside a video of the same prompt, an image draws for itself.
    index = torch.arange(images) + (0 if key == "pixel_values" else 2**16)
    corrupted = corrupt_pixel_values(
        pixels,
        prompt_ids=prompt_ids,
        image_index=index,
        image_grid_thw=grid,
        kind=config.corruption,
        strength=config.corruption_strength,
        seed=config.seed,
        step=step,
        unchanged="keep",
        **facts._asdict(),
    )
    sizes = [1] * images if grid is None else grid.prod(1).tolist()
    pairs = zip(pixels.split(sizes), corrupted.split(sizes), strict=True)
    return corrupted, images, sum(torch.equal(before, after) for before, after in pairs)


def source_tokens(changed: CounterfactualResponses) -> Tensor:
    """Of each token of the changed responses, [batch, new_time], the original token whose position it counts from.

    A kept token counts from itself. A token that was put in counts from the first one that was taken out, since it
    starts where that one stood.
    """
    positions = changed.positions
    first_removed = (positions < 0).int().argmax(dim=1, keepdim=True)
    sources = first_removed.repeat(1, changed.token_ids.shape[1] + 1)
    times = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    # Tokens without a place fall into an extra column, which is cut off.
    places = torch.where(positions >= 0, positions, sources.shape[1] - 1)
    return sources.scatter(1, places, times)[:, :-1]


def moved_positions(positions: Tensor, prompt_length: int, sources: Tensor) -> Tensor:
    """Position ids of one row, [..., time], for its changed response.

    Text advances every axis of M-RoPE by one a token, so a token that moved by so many places has a position moved by
    as many; images inside a response (of a tool) keep their shape.
    """
    places = torch.arange(len(sources), device=sources.device)
    moved = positions[..., prompt_length + sources] + (places - sources)
    return torch.cat([positions[..., :prompt_length], moved], dim=-1)


def refuse_per_token_inputs(rows: Sequence[Mapping[str, Any] | None]) -> None:
    """Raise if a model input has one entry per token: verl made it for the original response.

    Raises:
        ValueError: Naming the input.
    """
    for row in rows:
        for key in _PER_TOKEN:
            if row and row.get(key) is not None:
                raise ValueError(
                    f"multi_modal_inputs[{key!r}] has one entry per token, which SRPO cannot rebuild for a changed "
                    "response: this model is not supported"
                )


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().numpy().tobytes()
