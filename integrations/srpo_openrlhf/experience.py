"""What the hook adds to OpenRLHF's experience maker: its scoring passes, and the weights in the advantages.

Everything is over whole sequences, [batch, time] with prompts and padding, as OpenRLHF has it: column t of
``action_mask``, ``action_log_probs`` and ``advantages`` belongs to token t + 1 of ``sequences``. Rows are put into the
order in which they were sampled, so that neither swaps nor scales depend on how OpenRLHF cut the batch up.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from srpo_core import (
    BrokenReason,
    CounterfactualResponses,
    RoleAdvantages,
    Segmentation,
    SRPOConfig,
    corrupt_pixel_values,
    counterfactual_responses,
    credit_metrics,
    segment_responses,
    span_counterfactuals,
    srpo_advantages,
)
from srpo_core.rollouts import RolloutWriter
from srpo_openrlhf.options import ROLLOUTS_VARIABLE, load_config

__all__ = [
    "Rollout",
    "Scores",
    "corrupt_inputs",
    "fold_weights",
    "patch_maker",
    "score_rollout",
    "stack_rollout",
    "write_rollout",
]

#: What the processor made of one row's images, by name; None for a row without.
ImageInputs = Mapping[str, Any] | None


class Rollout(NamedTuple):
    """A rollout batch in the order it was sampled, without the first token, which nothing scores."""

    token_ids: Tensor  # [batch, time] int64
    attended: Tensor  # [batch, time] bool: prompt, response and tool outputs
    mask: Tensor  # [batch, time] bool: what the policy sampled
    log_probs: Tensor  # [batch, time] nats
    prompt_ids: Tensor  # [batch] equal where responses answer the same prompt
    images: list[ImageInputs]


class Scores(NamedTuple):
    """Log-probs of the rollout's tokens in the two other contexts, what the tokens do, and what reasoning owes them."""

    corrupted_log_probs: Tensor | None  # [batch, time] nats; None: no image in the batch
    counterfactual_log_probs: Tensor  # [batch, time] nats
    perception_use: Tensor | None  # [batch, time]; None: not asked for, or no image whose scores it could change
    segmentation: Segmentation
    is_corrupted: Tensor | None  # [batch] bool: the corruption changed the row's images


def patch_maker(module: ModuleType) -> None:
    """Wrap ``make_experience`` and ``compute_advantages_and_returns`` of the module's ``RemoteExperienceMaker``."""
    maker = module.RemoteExperienceMaker
    make, advantages = maker.make_experience, maker.compute_advantages_and_returns

    @functools.wraps(make)
    @torch.no_grad()
    def make_experience(self: Any, samples_list: list[Any]) -> list[Any]:
        experiences = make(self, samples_list)
        if not hasattr(self, "_srpo_step"):
            self._srpo_step = _first_step(self, module.ray)
        config, step = load_config(), self._srpo_step
        rollout = stack_rollout(experiences, self.args.rollout.n_samples_per_prompt)
        scores = score_rollout(self, experiences, rollout, config, step=step)
        _warn_if_unstructured(scores.segmentation, module.logger)
        self._srpo_pending = (rollout, scores, config, step)
        return experiences

    @functools.wraps(advantages)
    @torch.no_grad()
    def compute_advantages_and_returns(self: Any, experiences: list[Any]) -> list[Any]:
        # Taken, so that the weights of one batch cannot reach the next.
        pending = self.__dict__.pop("_srpo_pending", None)
        if pending is None:
            raise RuntimeError("srpo_openrlhf: advantages were asked for before make_experience made the batch")
        experiences = advantages(self, experiences)
        rollout, scores, config, step = pending
        credit = fold_weights(experiences, rollout, scores, config, step=step)
        if (path := os.environ.get(ROLLOUTS_VARIABLE)) is not None:
            if not hasattr(self, "_srpo_writer"):
                self._srpo_writer = _writer(self, path, config, mode="append" if step > 0 else "replace")
            write_rollout(self._srpo_writer, experiences, rollout, scores, credit, step=step)
        self._srpo_step += 1
        return experiences

    maker.make_experience, maker.compute_advantages_and_returns = make_experience, compute_advantages_and_returns


def stack_rollout(experiences: Sequence[Any], samples_per_prompt: int) -> Rollout:
    """The micro-batches of a rollout batch as one."""
    index = _index(experiences)
    images: list[ImageInputs] = [None] * len(index)
    for experience in experiences:
        for row, inputs in zip(
            experience.index, experience.mm_train_inputs or [None] * len(experience.index), strict=True
        ):
            images[row] = inputs
    return Rollout(
        token_ids=_stack([experience.sequences[:, 1:] for experience in experiences], index),
        attended=_stack([experience.attention_mask[:, 1:] for experience in experiences], index).bool(),
        mask=_stack([experience.action_mask for experience in experiences], index).bool(),
        log_probs=_stack([experience.action_log_probs for experience in experiences], index),
        # As compute_advantages_and_returns groups the rewards.
        prompt_ids=torch.arange(len(index)) // samples_per_prompt,
        images=images,
    )


def score_rollout(maker: Any, experiences: Sequence[Any], rollout: Rollout, config: SRPOConfig, *, step: int) -> Scores:
    """Score the rollout in its other contexts, in the micro-batches and by the code path of ``action_log_probs``.

    Args:
        maker: A ``RemoteExperienceMaker``.
        experiences: What its ``make_experience`` returned.
        rollout: The same, stacked.
        config: The options.
        step: Rollout batches so far, for the draw of the corruption.
    """
    # In a vision-language run OpenRLHF passes the processor off as the tokenizer.
    tokenizer = getattr(maker.tokenizer, "tokenizer", maker.tokenizer)
    segmentation = segment_responses(
        rollout.token_ids,
        rollout.mask,
        tokenizer,
        tags=config.tags,
        answer_role=config.answer_role,
        eos_token_id=_eos_token_ids(tokenizer, maker.args.actor.model_name_or_path),
    )
    corrupted, is_corrupted, corrupted_images = None, None, rollout.images
    if any(rollout.images):
        corrupted_images = corrupt_inputs(
            rollout.images, rollout.prompt_ids, maker.tokenizer.image_processor, config, step=step
        )
        is_corrupted = _is_changed(rollout.images, corrupted_images)
        corrupted = _log_probs(
            maker,
            experiences,
            [(experience.sequences, experience.attention_mask, experience.action_mask) for experience in experiences],
            corrupted_images,
            width=rollout.mask.shape[1],
        )

    # Whatever is attended goes in as part of the response: prompts, and tool outputs to the very end, are kept as they
    # are, and what is not sampled is never read.
    responses = counterfactual_responses(
        rollout.token_ids,
        segmentation.roles,
        rollout.attended,
        kind=config.counterfactual,
        group_ids=rollout.prompt_ids,
        boundary=segmentation.boundary,
        pad_token_id=tokenizer.pad_token_id,
    )
    images = rollout.images if config.counterfactual_image == "kept" else corrupted_images
    log_probs = _changed_log_probs(maker, experiences, responses, images)
    counterfactual = responses.carry_back(log_probs, rollout.log_probs)

    use = None
    if config.use_passes > 0 and corrupted is not None:
        without = span_counterfactuals(
            rollout.token_ids,
            segmentation.roles,
            rollout.attended,
            spans=config.use_passes,
            boundary=segmentation.boundary,
            pad_token_id=tokenizer.pad_token_id,
        )
        passes = [_changed_log_probs(maker, experiences, each, rollout.images) for each in without.responses]
        use = without.use(passes, rollout.log_probs, segmentation.roles, rollout.mask, clip=config.score_clip)
    return Scores(corrupted, counterfactual, use, segmentation, is_corrupted)


def fold_weights(
    experiences: Sequence[Any], rollout: Rollout, scores: Scores, config: SRPOConfig, *, step: int
) -> RoleAdvantages:
    """Multiply the weights into ``advantages``, in place, put each response's metrics into ``info``; return the credit.

    Args:
        experiences: With the framework's advantages, normalised: one value per response, repeated over its tokens.
        rollout: The same experiences, stacked.
        scores: From :func:`score_rollout`.
        config: The options.
        step: Rollout batches so far, for the mix's warm-up.
    """
    token_advantages = _stack([experience.advantages for experience in experiences], _index(experiences))
    first = rollout.mask.int().argmax(dim=1, keepdim=True)
    roles, broken, _ = scores.segmentation
    credit = srpo_advantages(
        rollout.log_probs,
        scores.corrupted_log_probs,
        scores.counterfactual_log_probs,
        roles,
        token_advantages.gather(1, first).squeeze(1).float(),
        rollout.mask,
        perception_use=scores.perception_use,
        **config.advantage_options(step=step),
    )
    rows = [slice(row, row + 1) for row in range(len(rollout.mask))]
    # One response at a time: OpenRLHF averages and logs `info` by sample.
    metrics = [
        credit_metrics(
            credit.weights[row],
            credit.visual_dependency[row],
            credit.perception_consistency[row],
            roles[row],
            rollout.mask[row],
            broken=broken[row],
        )
        for row in rows
    ]
    by_name = {name: torch.stack([row[name] for row in metrics]) for name in metrics[0]}
    if scores.is_corrupted is not None:
        by_name["corruption/changed"] = scores.is_corrupted.float()
    for experience in experiences:
        mask = experience.action_mask.bool()
        weighted = experience.advantages * credit.weights[experience.index, : mask.shape[1]]
        experience.advantages = torch.where(mask, weighted.to(experience.advantages.dtype), experience.advantages)
        experience.info.update({f"srpo/{name}": values[experience.index] for name, values in by_name.items()})
    return credit


def write_rollout(
    writer: RolloutWriter,
    experiences: Sequence[Any],
    rollout: Rollout,
    scores: Scores,
    credit: RoleAdvantages,
    *,
    step: int,
) -> None:
    """Append the rollout to the file of ``--srpo.rollouts``, in the order in which it was sampled."""
    index = _index(experiences).tolist()
    rewards = torch.cat([experience.rewards.reshape(-1) for experience in experiences]).tolist()
    prompts = [prompt for experience in experiences for prompt in experience.prompts]
    by_row = {row: place for place, row in enumerate(index)}
    first = rollout.mask.int().argmax(dim=1, keepdim=True)
    advantages = (credit.advantages / credit.weights).gather(1, first).squeeze(1)
    writer.write(
        rollout.token_ids,
        rollout.mask,
        old_log_probs=rollout.log_probs,
        corrupted_log_probs=scores.corrupted_log_probs,
        counterfactual_log_probs=scores.counterfactual_log_probs,
        roles=scores.segmentation.roles,
        broken=scores.segmentation.broken,
        visual_dependency=credit.visual_dependency,
        perception_consistency=credit.perception_consistency,
        weights=credit.weights,
        rewards=[rewards[by_row[row]] for row in range(len(index))],
        advantages=torch.where(rollout.mask.any(1), advantages, 0.0),
        group_ids=rollout.prompt_ids,
        prompts=[prompts[by_row[row]] for row in range(len(index))],
        step=step,
    )


def _writer(maker: Any, path: str, config: SRPOConfig, *, mode: Literal["replace", "append"]) -> RolloutWriter:
    tokenizer = getattr(maker.tokenizer, "tokenizer", maker.tokenizer)
    ends = _eos_token_ids(tokenizer, maker.args.actor.model_name_or_path)
    return RolloutWriter(path, tokenizer=tokenizer, tags=config.tags, eos_token_id=ends, mode=mode)


def corrupt_inputs(
    images: Sequence[ImageInputs], prompt_ids: Tensor, image_processor: Any, config: SRPOConfig, *, step: int
) -> list[ImageInputs]:
    """Copies of the processor's outputs with other pixels. Grids and all else are shared with the originals.

    Responses to one prompt usually carry the same pixels, which are then corrupted once.

    Args:
        images: Of each row; None for a row without images.
        prompt_ids: Of each row; with `step` and the seed the key of the draw.
        image_processor: Says where black and white are and how it lays patches out.
        config: The options.
        step: Rollout batches so far.

    Raises:
        ValueError: If there are videos, or the corruption changed no image of the batch.
    """
    source: dict[int, int] = {}  # row -> the row with the same pixels that is corrupted for it
    first: dict[int, int] = {}  # prompt -> its first row
    for row, (inputs, prompt) in enumerate(zip(images, prompt_ids.tolist(), strict=True)):
        if inputs:
            leader = first.setdefault(prompt, row)
            source[row] = leader if torch.equal(_pixels(images[leader]), _pixels(inputs)) else row
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for row in sorted(set(source.values())):
        by_shape.setdefault(tuple(_pixels(images[row]).shape[1:]), []).append(row)

    corrupted: dict[int, Tensor] = {}
    for rows in by_shape.values():
        pixels = [_pixels(images[row]) for row in rows]
        grids = [_grid(images[row]) for row in rows]
        counts = [len(values) if grid is None else len(grid) for values, grid in zip(pixels, grids, strict=True)]
        changed = corrupt_pixel_values(
            torch.cat(pixels),
            prompt_ids=torch.cat([prompt_ids[row].repeat(count) for row, count in zip(rows, counts, strict=True)]),
            image_index=torch.cat([torch.arange(count) for count in counts]),
            image_grid_thw=None if grids[0] is None else torch.cat([grid for grid in grids if grid is not None]),
            kind=config.corruption,
            strength=config.corruption_strength,
            image_mean=image_processor.image_mean if getattr(image_processor, "do_normalize", True) else 0.0,
            image_std=image_processor.image_std if getattr(image_processor, "do_normalize", True) else 1.0,
            merge_size=getattr(image_processor, "merge_size", 2),
            temporal_patch_size=getattr(image_processor, "temporal_patch_size", 2),
            unchanged="keep",
            seed=config.seed,
            step=step,
        )
        corrupted.update(zip(rows, changed.split([len(values) for values in pixels]), strict=True))
    if all(torch.equal(_pixels(images[row]), values) for row, values in corrupted.items()):
        raise ValueError(
            f"--srpo.corruption {config.corruption} changed no image of this batch, so it cannot tell what the model "
            "sees: pass another one, or more of it with --srpo.corruption_strength"
        )
    return [
        {**inputs, "pixel_values": corrupted[source[row]]} if inputs else inputs for row, inputs in enumerate(images)
    ]


def _changed_log_probs(
    maker: Any, experiences: Sequence[Any], responses: CounterfactualResponses, images: Sequence[ImageInputs]
) -> Tensor:
    """Log-probs of changed responses, [batch, new_time], each micro-batch cut to its own longest."""
    batches = []
    for experience in experiences:
        attended = responses.mask[experience.index]
        width = int(attended.sum(1).max())
        sequences = torch.cat([experience.sequences[:, :1], responses.token_ids[experience.index, :width]], dim=1)
        attention_mask = F.pad(attended[:, :width], (1, 0), value=True).to(experience.attention_mask.dtype)
        batches.append((sequences, attention_mask, attention_mask[:, 1:]))
    return _log_probs(maker, experiences, batches, images, width=responses.mask.shape[1])


def _log_probs(
    maker: Any,
    experiences: Sequence[Any],
    batches: Sequence[tuple[Tensor, Tensor, Tensor]],
    images: Sequence[ImageInputs],
    *,
    width: int,
) -> Tensor:
    """Log-probs under the policy as it is, by OpenRLHF's own dispatch: one micro-batch for one of its own."""
    args = maker.args
    sequences, attention_masks, action_masks = zip(*batches, strict=True)
    inputs: dict[str, list[Any]] = {
        "sequences": list(sequences),
        "action_mask": list(action_masks),
        "attention_mask": list(attention_masks),
    }
    if any(images):
        inputs["mm_train_inputs_list"] = [[images[row] for row in experience.index] for experience in experiences]
    is_colocated = args.train.colocate_all or args.train.colocate_actor_ref
    references = maker._dispatch_forward(maker.actor_model_group, is_colocated, **inputs)
    log_probs = maker._flatten_results(references, args.ds.ring_attn_size * args.ds.tensor_parallel_size)
    return _stack(log_probs, _index(experiences), width=width)


def _stack(parts: Sequence[Tensor], index: Tensor, *, width: int | None = None) -> Tensor:
    """Micro-batches as one batch, right-padded with zeros, each row at its place in the rollout."""
    width = max(part.shape[1] for part in parts) if width is None else width
    rows = torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])
    return torch.empty_like(rows).index_copy_(0, index, rows)


def _index(experiences: Sequence[Any]) -> Tensor:
    return torch.tensor([row for experience in experiences for row in experience.index])


def _pixels(inputs: ImageInputs) -> Tensor:
    if inputs is None or "pixel_values" not in inputs or "pixel_values_videos" in inputs:
        found = sorted(inputs or ())
        raise ValueError(f"srpo_openrlhf corrupts images: it needs pixel_values and no videos, and found {found}")
    return inputs["pixel_values"]


def _grid(inputs: ImageInputs) -> Tensor | None:
    return None if inputs is None else inputs.get("image_grid_thw")


def _is_changed(images: Sequence[ImageInputs], corrupted: Sequence[ImageInputs]) -> Tensor:
    pairs = zip(images, corrupted, strict=True)
    return torch.tensor([bool(old) and not torch.equal(_pixels(old), _pixels(new)) for old, new in pairs])


def _first_step(maker: Any, ray: Any) -> int:
    """Rollout batches that a resumed run had behind it; the maker is not told."""
    if not maker.args.ckpt.load_enable:
        return 0
    states = ray.get(maker.actor_model_group.async_run_method(method_name="get_checkpoint_states"))
    return states[0].get("global_step", 0)


@functools.cache
def _eos_token_ids(tokenizer: Any, model_path: str) -> tuple[int, ...]:
    """Whatever ends a response: the tokenizer's token and those of the generation config, which vLLM obeys."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:  # the model has none
        ids = None
    others = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple({tokenizer.eos_token_id, *others})


def _warn_if_unstructured(segmentation: Segmentation, logger: Any) -> None:
    if not (segmentation.broken == int(BrokenReason.NONE)).any():
        reasons = ", ".join(
            f"{int(count)} {BrokenReason(int(reason)).name.lower()}"
            for reason, count in zip(*segmentation.broken.unique(return_counts=True), strict=True)
        )
        logger.warning(
            f"SRPO: no response of this batch follows the tags ({reasons}), so all weights are 1. Ask for the tags in "
            "the prompts, or name yours with --srpo.perception_tags, --srpo.reasoning_tags and --srpo.answer_tags"
        )
