"""Responses -> the same responses with the perception dropped, masked or swapped, and the way back."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.checked import choose
from srpo_core.options import CounterfactualKind
from srpo_core.roles import check_roles, role_masks
from srpo_core.typechecking import typechecked

__all__ = ["CounterfactualResponses", "counterfactual_responses"]


class CounterfactualResponses(NamedTuple):
    """Responses as they would read with another perception, right-padded, ready to be scored after their prompts.

    Attributes:
        token_ids: The new responses, filled up with ``pad_token_id``.
        mask: True at tokens that the policy sampled, including those of a donor; False at padding and at tool outputs.
        attention_mask: True at tokens that may be attended, tool outputs included. Only ``kind="mask"`` hides any.
        positions: The place of each original token in the new response; -1 for removed perception and for padding.
        donors: The row whose perception replaced that of each row; -1 where there is none.
    """

    token_ids: Int[Tensor, "batch new_time"]
    mask: Bool[Tensor, "batch new_time"]
    attention_mask: Bool[Tensor, "batch new_time"]
    positions: Int[Tensor, "batch time"]
    donors: Int[Tensor, " batch"]

    @typechecked
    def carry_back(
        self,
        log_probs: Float[Tensor, "batch new_time"],
        *,
        original_log_probs: Float[Tensor, "batch time"],
    ) -> Float[Tensor, "batch time"]:
        """Log-probabilities of the new responses, each at the place of its original token.

        A token about which the counterfactual says nothing keeps its original log-probability, so that its contrast is
        exactly 0. These are the tokens of the removed perception, all tokens before it (their context is the same),
        padding, and unchanged rows.

        Args:
            log_probs: Log-probabilities of the new responses, nats: ``log_probs[b, t]`` scores
                ``self.token_ids[b, t]``.
            original_log_probs: Log-probabilities of the original responses, nats, from the same code path.

        Raises:
            ValueError: If a shape is not that of the responses.

        Example:
            >>> ids = torch.tensor([[1, 7, 2, 3, 8, 4]])
            >>> roles = torch.tensor([[0, 1, 0, 0, 2, 0]])
            >>> dropped = counterfactual_responses(ids, roles, ids > 0, kind="drop")
            >>> dropped.carry_back(torch.tensor([[-5.0, -4.0, -3.0, -2.0, -1.0]]),
            ...                    original_log_probs=torch.full((1, 6), -9.0))
            tensor([[-9., -9., -4., -3., -2., -1.]])
        """
        for argument, value, responses in (
            ("log_probs", log_probs, self.token_ids),
            ("original_log_probs", original_log_probs, self.positions),
        ):
            if value.shape != responses.shape:
                raise ValueError(f"{argument} must have shape {tuple(responses.shape)}, got {tuple(value.shape)}")
        if self.token_ids.shape[1] == 0:  # every response was dropped whole
            return original_log_probs
        carried = log_probs.gather(1, self.positions.clamp(min=0))
        # The first -1 of a row is its first removed token, or its padding, which no token follows.
        is_affected = (self.positions >= 0) & ((self.positions < 0).cumsum(dim=1) > 0)
        return torch.where(is_affected, carried, original_log_probs)


@typechecked(values=(check_roles,))
def counterfactual_responses(
    token_ids: Int[Tensor, "batch time"],
    roles: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    kind: CounterfactualKind = "swap",
    group_ids: Int[Tensor, " batch"] | None = None,
    perception_keys: Int[Tensor, " batch"] | None = None,
    boundary: Bool[Tensor, "batch time"] | None = None,
    pad_token_id: int = 0,
) -> CounterfactualResponses:
    """Responses with their perception replaced, removed or hidden, for the policy to score once more.

    The perception of a row is its ``PERCEPTION`` tokens that are not ``boundary``, of all its blocks together. ``kind``
    says what is done with it:

    - ``swap``: another row's perception takes its place. The donor is the first row after this one, in cyclic order,
      whose perception differs (by `perception_keys`, else by token ids) and is not empty. It is looked for in the same
      group first, then among all rows. A row without a perception, or without a donor, stays as it is.
    - ``drop``: it is removed; the tags stay.
    - ``mask``: it stays, but must not be attended. This works for models of pure attention only, because a recurrent
      state sees it anyway.

    Some details are choices of this project. The whole perception of a donor is put where the row's first block begins,
    even if either row has several blocks, and further blocks are left empty. Tokens that share characters with a tag
    (``boundary``) stay, although they hold some content. Tokens where ``mask`` is False stay as context if a real token
    follows (tool outputs): they are attended and not scored. Only the tokens after the last real one are padding.

    The function waits for the device to learn the new length. Call it once per rollout batch.

    Args:
        token_ids: Sampled tokens, right-padded.
        roles: :class:`~srpo_core.roles.Role` of each token.
        mask: True at tokens the policy sampled. Padding may hold anything.
        kind: What to do with the perception.
        group_ids: Equal where responses answer the same prompt; None: every response answers its own. Read by ``swap``.
        perception_keys: Equal where perceptions say the same; None: where their token ids are equal. Read by ``swap``.
            Pass them if you know which perceptions mean the same: a paraphrase of the same reading is a poor
            counterfactual, because the reasoning that copies it is as likely as before.
        boundary: Tokens that share characters with a tag, from a :class:`~srpo_core.roles.Segmentation`; None: there
            are no such tokens.
        pad_token_id: The token that fills up the new responses.

    Raises:
        ValueError: If ``kind`` is unknown; outside ``torch.compile`` also if a role is outside the enum.

    Example:
        >>> ids = torch.tensor([[1, 7, 7, 2, 8], [1, 9, 2, 8, 0]])
        >>> roles = torch.tensor([[0, 1, 1, 0, 2], [0, 1, 0, 2, 0]])
        >>> swapped = counterfactual_responses(ids, roles, ids > 0)
        >>> swapped.token_ids
        tensor([[1, 9, 2, 8, 0],
                [1, 7, 7, 2, 8]])
        >>> swapped.positions
        tensor([[ 0, -1, -1,  2,  3],
                [ 0, -1,  3,  4, -1]])
        >>> counterfactual_responses(ids, roles, ids > 0, kind="drop").token_ids
        tensor([[1, 2, 8],
                [1, 2, 8]])
    """
    edit = choose("kind", kind, _KINDS)
    perception = role_masks(roles, mask).perception
    if boundary is not None:
        perception = perception & ~boundary
    is_response = mask.flip(1).cumsum(dim=1).flip(1) > 0
    if group_ids is None:
        group_ids = torch.arange(len(token_ids), device=token_ids.device)
    return edit(token_ids, mask, is_response, perception, group_ids, perception_keys, pad_token_id)


def _swap(
    token_ids: Tensor,
    mask: Tensor,
    is_response: Tensor,
    perception: Tensor,
    group_ids: Tensor,
    perception_keys: Tensor | None,
    pad_token_id: int,
) -> CounterfactualResponses:
    counts = perception.sum(dim=1)
    width = _longest(counts)
    contents = _place(token_ids, perception, perception.cumsum(dim=1) - 1, width, fill=pad_token_id)
    keys = _keys(contents, counts) if perception_keys is None else perception_keys
    donors = _different_perceptions(keys, counts, group_ids)
    has_donor = donors >= 0
    return _replace(
        token_ids,
        mask,
        is_response,
        removed=perception & has_donor.unsqueeze(1),
        inserted=contents[donors.clamp(min=0)],
        inserted_counts=torch.where(has_donor, counts[donors.clamp(min=0)], 0),
        donors=donors,
        pad_token_id=pad_token_id,
    )


def _drop(
    token_ids: Tensor,
    mask: Tensor,
    is_response: Tensor,
    perception: Tensor,
    group_ids: Tensor,
    perception_keys: Tensor | None,
    pad_token_id: int,
) -> CounterfactualResponses:
    return _replace(
        token_ids,
        mask,
        is_response,
        removed=perception,
        inserted=token_ids.new_empty(len(token_ids), 0),
        inserted_counts=torch.zeros_like(group_ids),
        donors=torch.full_like(group_ids, -1, dtype=torch.int64),
        pad_token_id=pad_token_id,
    )


def _mask(
    token_ids: Tensor,
    mask: Tensor,
    is_response: Tensor,
    perception: Tensor,
    group_ids: Tensor,
    perception_keys: Tensor | None,
    pad_token_id: int,
) -> CounterfactualResponses:
    visible = is_response & ~perception
    places = torch.arange(token_ids.shape[1], device=token_ids.device)
    return CounterfactualResponses(
        token_ids=torch.where(is_response, token_ids, pad_token_id),
        mask=mask,
        attention_mask=visible,
        positions=torch.where(visible, places, -1),
        donors=torch.full_like(group_ids, -1, dtype=torch.int64),
    )


_KINDS = {"swap": _swap, "drop": _drop, "mask": _mask}


def _replace(
    token_ids: Tensor,
    mask: Tensor,
    is_response: Tensor,
    *,
    removed: Tensor,
    inserted: Tensor,
    inserted_counts: Tensor,
    donors: Tensor,
    pad_token_id: int,
) -> CounterfactualResponses:
    """Responses without the removed tokens, the inserted ones where the first of those was."""
    kept = is_response & ~removed
    # Until the first removed token nothing moves; from there on, what is inserted comes first.
    is_moved = removed.cumsum(dim=1) > 0
    places = kept.cumsum(dim=1) - 1 + is_moved * inserted_counts.unsqueeze(1)
    slots = torch.arange(inserted.shape[1], device=token_ids.device)
    used = slots < inserted_counts.unsqueeze(1)
    inserted_places = (kept & ~is_moved).sum(dim=1, keepdim=True) + slots

    tokens = torch.cat([token_ids, inserted], dim=1)
    is_sampled = torch.cat([mask, used], dim=1)
    real = torch.cat([kept, used], dim=1)
    all_places = torch.cat([places, inserted_places], dim=1)
    width = _longest(real.sum(dim=1))
    return CounterfactualResponses(
        token_ids=_place(tokens, real, all_places, width, fill=pad_token_id),
        mask=_place(is_sampled, real, all_places, width, fill=False),
        attention_mask=_place(real, real, all_places, width, fill=False),
        positions=torch.where(kept, places, -1),
        donors=donors,
    )


def _place(values: Tensor, selected: Tensor, places: Tensor, width: int, *, fill: int | bool) -> Tensor:
    """Each selected value at its place in a row of ``width``; ``fill`` elsewhere."""
    # All others fall into one extra column, which is cut off.
    rows = torch.full((len(values), width + 1), fill, dtype=values.dtype, device=values.device)
    return rows.scatter(1, torch.where(selected, places, width), values)[:, :width]


def _longest(counts: Tensor) -> int:
    return int(counts.max()) if len(counts) else 0


def _keys(contents: Tensor, counts: Tensor) -> Tensor:
    """A number for each row, equal where the perceptions are the same tokens."""
    if len(contents) == 0:
        return counts
    # The count keeps a perception apart from its padded prefix.
    return torch.unique(torch.cat([counts.unsqueeze(1), contents], dim=1), dim=0, return_inverse=True)[1]


def _different_perceptions(keys: Tensor, counts: Tensor, group_ids: Tensor) -> Tensor:
    """For each row the row it takes its perception from, or -1. A [batch, batch] table, no loop."""
    batch = len(keys)
    if batch == 0:
        return counts
    rows = torch.arange(batch, device=keys.device)
    distance = (rows - rows.unsqueeze(1)) % batch
    is_mate = group_ids == group_ids.unsqueeze(1)
    is_eligible = (keys != keys.unsqueeze(1)) & (counts > 0) & (counts > 0).unsqueeze(1)
    # The nearest group mate, else the nearest of another group, else nothing.
    priority = torch.where(is_mate, distance, distance + batch)
    nearest, donors = torch.where(is_eligible, priority, 2 * batch).min(dim=1)
    return torch.where(nearest < 2 * batch, donors, -1)
