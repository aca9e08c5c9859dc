"""Test only: the same rollouts outside verl. One unpadded row at a time, and weights by the core alone."""

from typing import Any

import torch

from srpo_core import Role, Segmentation, SRPOConfig, counterfactual_responses, segment_responses
from srpo_core.counterfactuals import CounterfactualResponses
from srpo_core.reliance import perception_spans, span_reliance
from verl_harness import rollouts


def score_alone(
    model: Any,
    processor: Any,
    row: dict[str, Any],
    *,
    response: torch.Tensor | None = None,
    pixels: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The row scored by the model of transformers, its positions computed anew from its ids."""
    response = row["responses"] if response is None else response
    pixels = row["multi_modal_inputs"] if pixels is None else pixels
    ids = torch.cat([row["prompts"], response])
    # verl counts a padding row as text along every axis.
    is_padding = bool((row["prompts"] == processor.tokenizer.eos_token_id).all())
    positions = torch.arange(len(ids)).repeat(4, 1) if is_padding else rollouts.position_ids(ids, pixels, processor)
    return rollouts.log_probs(model, ids, positions, pixels, len(response))


def padded(values: Any, fill: int = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=fill)


def changed_alone(
    rows: list[dict[str, Any]], tokenizer: Any, config: SRPOConfig, masks: list[torch.Tensor] | None = None
) -> tuple[Segmentation, CounterfactualResponses]:
    """Segmentation and changed responses."""
    ids = padded([row["responses"] for row in rows], tokenizer.pad_token_id)
    mask = padded([row["response_mask"] for row in rows] if masks is None else masks).bool()
    segmentation = segment_responses(ids, mask, tokenizer, eos_token_id=tokenizer.eos_token_id)
    uids = [row["uid"] for row in rows]
    changed = counterfactual_responses(
        ids,
        segmentation.roles,
        mask,
        kind=config.counterfactual,
        group_ids=torch.tensor([uids.index(uid) for uid in uids]),
        boundary=segmentation.boundary,
        pad_token_id=tokenizer.pad_token_id,
    )
    return segmentation, changed


def spans_alone(segmentation: Segmentation, rows: list[dict[str, Any]], count: int) -> torch.Tensor:
    """The span of each perception token. None of the tiny tokenizer straddles a tag, and would stay."""
    assert not (segmentation.boundary & (segmentation.roles == Role.PERCEPTION)).any()
    sampled = padded([torch.ones_like(row["responses"]) for row in rows]).bool()
    return perception_spans(segmentation.roles, sampled, spans=count)


def reliance_alone(
    log_probs: torch.Tensor,
    passes: list[torch.Tensor],
    spans: torch.Tensor,
    roles: torch.Tensor,
    mask: torch.Tensor,
    config: SRPOConfig,
) -> torch.Tensor:
    """Reliance, each pass carried back token by token: ``passes[k]`` holds the rows without their span k."""
    without = log_probs.repeat(len(passes), 1, 1)
    for k, scored in enumerate(passes):
        for row, numbers in enumerate(spans.tolist()):
            if k in numbers:
                kept = [time for time, number in enumerate(numbers) if number != k]
                for place, time in enumerate(kept[: scored.shape[1]]):
                    if time > numbers.index(k):
                        without[k, row, time] = scored[row, place]
    return span_reliance(log_probs, roles, mask, without_log_probs=without, spans=spans, clip=config.score_clip)
