"""The rows of one worker -> the same rows with another response: positions and sources. Plain tensors, nothing of verl.

Rows are not padded; buffers may be shared with other processes, so nothing is written in place.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from srpo_core.counterfactuals import CounterfactualResponses

__all__ = ["moved_positions", "nested", "refuse_per_token_inputs", "source_tokens"]

# One entry per token of the sequence, so they would have to change with the response.
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")


def source_tokens(changed: CounterfactualResponses) -> Tensor:
    """For each token of the changed responses, [batch, new_time], the original token from whose position it is counted.

    A token that was kept is counted from itself. A token that was put in is counted from the first token that was taken
    out, because it begins at that place.
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


def nested(rows: Iterable[Tensor], lengths: Sequence[int] | None = None) -> Tensor:
    """Rows of different lengths as one jagged tensor, the form in which verl moves them."""
    if lengths is not None:
        rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


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
