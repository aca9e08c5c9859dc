"""What the hook adds to OpenRLHF's experience maker: more scoring passes, and the weights in the advantages.

All tensors are over whole sequences, [batch, time] with prompts and padding, as in OpenRLHF: column t of
``action_mask``, ``action_log_probs`` and ``advantages`` belongs to token t + 1 of ``sequences``. Rows are put into the
order in which they were sampled, so that neither swaps nor scales depend on how OpenRLHF cut the batch up.
"""

import functools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import ray
import torch
import torch.nn.functional as F
from torch import Tensor

from srpo_core import Credit, RolloutBatch, credit, plan
from srpo_core.batch import View, ending_ids, logged, prompt_id, record
from srpo_core.pixel_values import corrupt_rows, image_facts, refuse_unknown_pixels, vision_patch_size
from srpo_core.rollouts import RolloutWriter
from srpo_core.watch import RunWatch, batch_in_words
from srpo_openrlhf.options import load_config
from srpo_openrlhf.proof import Arrival

__all__ = ["Weighting", "patch_maker"]

T = TypeVar("T")


def patch_maker(module: ModuleType) -> None:
    """Wrap ``make_experience_batch`` of the module's ``RemoteExperienceMaker``."""
    maker = module.RemoteExperienceMaker
    make_experience_batch = maker.make_experience_batch

    @functools.wraps(make_experience_batch)
    def weighted(self: Any, rollout_samples: list[Any]) -> list[Any]:
        experiences = make_experience_batch(self, rollout_samples)
        if not hasattr(self, "_srpo"):
            self._srpo = Weighting(self)
        self._srpo.weight(experiences)
        return experiences

    maker.make_experience_batch = weighted


class Weighting:
    """Weights the batches of one experience maker, each after OpenRLHF has made it and before it goes to the actors.

    Args:
        maker: A ``RemoteExperienceMaker``. The options come from the environment.
    """

    def __init__(self, maker: Any) -> None:
        self.maker = maker
        self.config = load_config()
        # In a vision-language run OpenRLHF passes the processor off as the tokenizer.
        self.tokenizer = getattr(maker.tokenizer, "tokenizer", maker.tokenizer)
        self.facts = image_facts(maker.tokenizer)
        self.video_facts = image_facts(getattr(maker.tokenizer, "video_processor", None))
        self.patch_size = None if self.facts is None else vision_patch_size(_model_config(maker))
        self.ending = ending_ids(self.tokenizer, _generation_config(maker.args.actor.model_name_or_path))
        self.step = _first_step(maker)
        self.watch = RunWatch(self.config, self.tokenizer, named="--srpo.{}")
        self.correct = self.config.correct_rule
        self.arrival: Arrival | None = None
        self.writer: RolloutWriter | None = None
        if self.config.rollouts is not None:
            self.writer = RolloutWriter(
                self.config.rollouts,
                tokenizer=self.tokenizer,
                tags=self.config.tags,
                eos_token_id=self.ending,
                correct_by=None if self.correct is None else str(self.correct),
                resume_at=self.step or None,
            )

    @torch.no_grad()
    def weight(self, experiences: Sequence[Any]) -> Credit:
        """Multiply the weights into ``advantages``, in place, and put the metrics into ``info``.

        Args:
            experiences: The micro-batches of one rollout batch, with advantages that are equal along each response.
        """
        images = _by_row(experiences, [each.mm_train_inputs or [None] * len(each.index) for each in experiences])
        for inputs in images:
            refuse_unknown_pixels(inputs or {})
        prompts = _by_row(experiences, [each.prompts for each in experiences])
        batch = self._batch(experiences, prompts, images)
        corrupted, image_counts = corrupt_rows(
            images,
            batch.group_ids.tolist(),
            self.config,
            self.facts,
            step=self.step,
            video_facts=self.video_facts,
            patch_size=self.patch_size,
        )
        self.watch.look(batch, prompts=list(dict.fromkeys(prompts)), image_counts=image_counts)
        if self.arrival is not None:
            self.arrival.check()

        planned = plan(
            batch,
            self.config,
            has_images=bool(image_counts[:, 0].any()),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        seen = {"original": images, "corrupted": corrupted}
        scored = {view.name: self._score(experiences, view, seen[view.image]) for view in planned.views}
        stock = _stack(experiences, [each.advantages for each in experiences]).float()
        first = batch.mask.int().argmax(dim=1, keepdim=True)
        advantages = torch.where(batch.mask.any(dim=1), stock.gather(1, first).squeeze(1), 0.0)
        rewards = torch.tensor(_by_row(experiences, [each.rewards.reshape(-1).tolist() for each in experiences]))
        correct = None if self.correct is None else self.correct(rewards, _by_function(experiences))
        engine = [each.rollout_log_probs for each in experiences]
        credited = credit(
            batch,
            planned,
            scored,
            self.config,
            old_log_probs=_stack(experiences, [each.action_log_probs for each in experiences]),
            advantages=advantages,
            step=self.step,
            image_counts=image_counts,
            correct=correct,
            engine_log_probs=None if None in engine else _stack(experiences, engine),
        )
        self.watch.look_at_engine(credited.metrics)

        metrics = logged(credited.metrics, which=self.config.metrics)
        if self.config.summary:
            print(batch_in_words(batch, credited, advantages=advantages, step=self.step), flush=True)
        for each in experiences:
            mask = each.action_mask.bool()
            weighted = each.advantages * credited.weights[each.index, : mask.shape[1]]
            each.advantages = torch.where(mask, weighted.to(each.advantages.dtype), each.advantages)
            # OpenRLHF logs the mean over responses: that of equal numbers is the number of the batch.
            each.info.update({name: torch.full((len(each.index),), value) for name, value in metrics.items()})
        if self.arrival is None:
            self.arrival = Arrival(self.maker.actor_model_group, experiences)
        if self.writer is not None:
            recorded = record(batch, credited, advantages=advantages, correct=correct)
            self.writer.write(**recorded, rewards=rewards, prompts=prompts, step=self.step)
        self.step += 1
        return credited

    def _batch(
        self, experiences: Sequence[Any], prompts: Sequence[str], images: Sequence[Mapping[str, Any] | None]
    ) -> RolloutBatch:
        """The micro-batches as one batch, without the first token of each sequence, which nothing scores."""
        mask = _stack(experiences, [each.action_mask for each in experiences]).bool()
        return RolloutBatch.of(
            _stack(experiences, [each.sequences[:, 1:] for each in experiences]),
            mask,
            self.tokenizer,
            self.config,
            group_ids=torch.tensor(
                [
                    prompt_id(torch.tensor(list(prompt.encode())), seen)
                    for prompt, seen in zip(prompts, images, strict=True)
                ]
            ),
            prompt_ends=prompts,
            ending=self.ending,
            attended=_stack(experiences, [each.attention_mask[:, 1:] for each in experiences]).bool(),
        )

    def _score(self, experiences: Sequence[Any], view: View, images: Sequence[Mapping[str, Any] | None]) -> Tensor:
        """Log-probs of a view, in the micro-batches of ``action_log_probs`` and by the same code path."""
        maker, args = self.maker, self.maker.args
        batches = [_inputs(each, view) for each in experiences]
        inputs: dict[str, list[Any]] = {
            name: [batch[name] for batch in batches] for name in ("sequences", "action_mask", "attention_mask")
        }
        if any(images):
            inputs["mm_train_inputs_list"] = [[images[row] for row in each.index] for each in experiences]
        is_colocated = args.train.colocate_all or args.train.colocate_actor_ref
        references = maker._dispatch_forward(maker.actor_model_group, is_colocated, **inputs)
        log_probs = maker._flatten_results(references, args.ds.ring_attn_size * args.ds.tensor_parallel_size)
        return _stack(
            experiences, log_probs, width=None if view.responses is None else view.responses.token_ids.shape[1]
        )


def _inputs(experience: Any, view: View) -> dict[str, Tensor]:
    """One micro-batch of a view, as the actors take it, cut to its own longest sequence."""
    if view.responses is None:
        return vars(experience)
    attended = view.responses.mask[experience.index]
    width = int(attended.sum(1).max())
    token_ids = view.responses.token_ids[experience.index, :width]
    attention_mask = F.pad(attended[:, :width], (1, 0), value=True).to(experience.attention_mask.dtype)
    return {
        "sequences": torch.cat([experience.sequences[:, :1], token_ids], dim=1),
        "action_mask": attention_mask[:, 1:],  # log-probs of all tokens, prompts included
        "attention_mask": attention_mask,
    }


def _stack(experiences: Sequence[Any], parts: Sequence[Tensor], *, width: int | None = None) -> Tensor:
    """Micro-batches as one batch, right-padded with zeros, each row at its place in the rollout."""
    width = max(part.shape[1] for part in parts) if width is None else width
    rows = torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])
    index = torch.tensor([row for each in experiences for row in each.index])
    return torch.empty_like(rows).index_copy_(0, index, rows)


def _by_row(experiences: Sequence[Any], parts: Sequence[Sequence[T]]) -> list[T]:
    """Values of each response, in micro-batches, as one list in the order of the rollout."""
    values = {
        row: value
        for each, part in zip(experiences, parts, strict=True)
        for row, value in zip(each.index, part, strict=True)
    }
    return [values[row] for row in range(len(values))]


def _by_function(experiences: Sequence[Any]) -> dict[str, Tensor]:
    """What else a reward function said of each response: the numbers of each, by their names in ``info``."""
    names = [
        name for name in experiences[0].info if all(_is_per_row(each, each.info.get(name)) for each in experiences)
    ]
    return {
        name: torch.tensor(_by_row(experiences, [each.info[name].reshape(-1).tolist() for each in experiences]))
        for name in names
    }


def _is_per_row(experience: Any, values: Any) -> bool:
    return isinstance(values, Tensor) and values.numel() == len(experience.index)


def _first_step(maker: Any) -> int:
    """How many rollout batches a resumed run has done already, which the maker does not know."""
    if not maker.args.ckpt.load_enable:
        return 0
    states = ray.get(maker.actor_model_group.async_run_method(method_name="get_checkpoint_states"))
    return states[0].get("global_step", 0)


def _model_config(maker: Any) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(maker.args.actor.model_name_or_path, trust_remote_code=True)
    except (OSError, ValueError):  # a folder without a config
        return None


def _generation_config(model: str) -> Any:
    """What vLLM reads the ids from that end a response."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # the model has none
        return None
