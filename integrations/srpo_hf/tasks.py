"""A rollout batch and its views -> which tokens have to be scored, and their log-probs -> tensors for the credit."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from srpo_core import RolloutBatch
from srpo_core.batch import Plan
from srpo_core.counterfactuals import CounterfactualResponses
from srpo_hf.policy import Task

__all__ = ["filled", "tasks_of", "tasks_of_changed"]


def tasks_of(token_ids: Tensor, needed: Tensor, of_row: Sequence[int], chosen: Tensor | None = None) -> list[Task]:
    """The needed tokens of responses as they are. What follows the last of them is not read.

    Args:
        token_ids: [batch, time], on the CPU.
        needed: [batch, time].
        of_row: The prompt of each response.
        chosen: True at the responses that are scored, [batch]; None: all.
    """
    tasks = []
    for row in range(len(needed)) if chosen is None else chosen.nonzero().flatten().tolist():
        columns = needed[row].nonzero().flatten()
        if len(columns):
            end = int(columns[-1]) + 1
            tasks.append(Task(row, of_row[row], token_ids[row, :end], needed[row, :end], columns))
    return tasks


def tasks_of_changed(
    responses: CounterfactualResponses, mask: Tensor, of_row: Sequence[int], chosen: Tensor
) -> list[Task]:
    """What follows the change in each chosen response: in front of it nothing is different.

    Tokens that may not be attended are taken out, which is what masking is meant to be, and exact for every model.

    Args:
        responses: From :func:`srpo_core.counterfactual_responses`.
        mask: True at sampled tokens of the original responses, [batch, time], on the CPU.
        of_row: The prompt of each response.
        chosen: True at the responses that are scored, [batch].
    """
    token_ids, attended = responses.token_ids.cpu(), responses.attention_mask.cpu()
    positions = responses.positions.cpu()
    is_affected = (positions >= 0) & ((positions < 0).cumsum(1) > 0) & mask
    tasks = []
    for row in chosen.nonzero().flatten().tolist():
        columns = positions[row][is_affected[row]]
        if len(columns) == 0:
            continue
        needed = torch.zeros(token_ids.shape[1], dtype=torch.bool)
        needed[columns] = True
        kept = attended[row].nonzero().flatten()
        tasks.append(Task(row, of_row[row], token_ids[row][kept], needed[kept], kept[needed[kept]]))
    return tasks


def filled(
    values: Mapping[str, Sequence[Tensor]], tasks: Mapping[str, Sequence[Task]], batch: RolloutBatch, planned: Plan
) -> dict[str, Tensor]:
    """Log-probs of tasks as one tensor for each view, in which what was not needed leaves the credit as it is.

    Args:
        values: By view, of each task its log-probs, [needed].
        tasks: By view.
        batch: The responses.
        planned: Its views.
    """
    device = batch.token_ids.device
    dtype = next((found.dtype for some in values.values() for found in some), torch.float32)

    def put(start: Tensor, name: str) -> Tensor:
        for task, found in zip(tasks[name], values[name], strict=True):
            start[task.row, task.columns.to(device)] = found.to(device)
        return start

    original = put(torch.zeros(batch.token_ids.shape, dtype=dtype, device=device), "original")
    made = {"original": original}
    for view in planned.views:
        if view.responses is None:
            start = original.clone()
        else:
            shape, is_kept = view.responses.token_ids.shape, view.responses.positions >= 0
            start = torch.zeros(shape, dtype=dtype, device=device).masked_fill(view.responses.mask, torch.nan)
            rows = torch.arange(len(is_kept), device=device)[:, None].expand_as(is_kept)
            start[rows[is_kept], view.responses.positions[is_kept]] = original[is_kept]
        made[view.name] = put(start, view.name)
    return made
