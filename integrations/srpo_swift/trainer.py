"""ms-swift's ``GRPOTrainer`` with role-aware token credit: its own loss, given advantages weighted per token."""

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer, collate_to_grpo_micro_batch, disable_gradient_checkpointing
from torch import Tensor

from srpo_core import Credit, RolloutBatch, Segmentation, credit, plan
from srpo_core.batch import ending_ids, logged, prompt_id, record
from srpo_core.modes import evaluating, has_dropout
from srpo_core.pixel_values import corrupt_rows, image_facts, vision_patch_size
from srpo_core.rollouts import RolloutWriter
from srpo_core.watch import RunWatch, batch_in_words
from srpo_swift.options import load_config
from srpo_swift.settings import check_arguments
from srpo_swift.upstream import unsupported

__all__ = ["SRPOTrainer"]

_PROMPT_END = 32  # tokens of a prompt that are read for a tag at its end
_IGNORED = -100  # the label of a token that is not trained
# Values of each token beside its id, and that of a token of text.
_TOKEN_TYPES = {"token_type_ids": 0, "mm_token_type_ids": 0, "image_token_types": -1}


class SRPOTrainer(GRPOTrainer):
    """Weights the advantages of ms-swift's ``GRPOTrainer``, whose arguments it takes. Options: from the environment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._srpo = load_config()
        check_arguments(kwargs["args"], kwargs["template"])
        super().__init__(*args, **kwargs)
        processor = self.template.processor
        self._srpo_tokenizer: Any = self.template.tokenizer
        self._srpo_facts = image_facts(processor)
        self._srpo_video_facts = image_facts(getattr(processor, "video_processor", None))
        self._srpo_ending = ending_ids(self._srpo_tokenizer, getattr(self.model, "generation_config", None))
        self._srpo_watch = RunWatch(
            self._srpo, self._srpo_tokenizer, named="--srpo_{}", warns=self.accelerator.is_main_process
        )
        self._srpo_correct = self._srpo.correct_rule
        if self._srpo_correct is not None:  # an unknown function ends the run now, not after its first batch
            self._srpo_correct(torch.zeros(0), dict.fromkeys(self.reward_func_names, torch.zeros(0)))
        self._srpo_writer: RolloutWriter | None = None

    def _postprocess_batch(self, samples: list[Any], batch_encoded_inputs: list[dict[str, Any]]) -> None:
        super()._postprocess_batch(samples, batch_encoded_inputs)
        start, device = time.perf_counter(), self.accelerator.device
        chunks = self.split_by_mini_batches(samples)
        batches = [each["grpo_batch"] for each in batch_encoded_inputs]
        rows = [sample for chunk in chunks for sample in chunk]
        encoded = [sample.encoded for sample in rows]
        token_ids = _padded([each["input_ids"] for each in encoded], self._srpo_tokenizer.pad_token_id, device)
        mask = _padded([each["labels"] for each in encoded], _IGNORED, device) != _IGNORED
        attended = _padded([[1] * len(each["input_ids"]) for each in encoded], 0, device).bool()
        firsts = [max(next((at for at, label in enumerate(each["labels"]) if label != _IGNORED), 0), 2)
                  for each in encoded]  # fmt: skip
        group_ids = torch.tensor(
            [
                prompt_id(torch.tensor(each["input_ids"][:first]), each)
                for each, first in zip(encoded, firsts, strict=True)
            ],
            device=device,
        )
        prompts = [
            self._srpo_tokenizer.decode(each["input_ids"][:first]) for each, first in zip(encoded, firsts, strict=True)
        ]
        step, is_training = self.state.global_step, self.model.training
        corrupted, image_counts = corrupt_rows(
            encoded,
            group_ids.tolist(),
            self._srpo,
            self._srpo_facts,
            step=step,
            video_facts=self._srpo_video_facts,
            patch_size=vision_patch_size(self.model.config),
        )
        local = RolloutBatch.of(
            token_ids, mask, self._srpo_tokenizer, self._srpo, group_ids=group_ids, prompt_ends=prompts,
            ending=self._srpo_ending, attended=attended,
        )  # fmt: skip
        assert local.open_at_start is not None
        # Of all processes: weights, donors and metrics then do not depend on how the responses were split.
        gather = self._srpo_gather
        batch = RolloutBatch(
            gather(token_ids, fill=self._srpo_tokenizer.pad_token_id),
            gather(mask),
            Segmentation(*map(gather, local.segmentation)),
            gather(group_ids),
            gather(attended),
            gather(local.open_at_start),
        )
        image_counts = gather(image_counts.to(device))
        self._srpo_watch.look(batch, prompts=prompts[:1], image_counts=image_counts)
        planned = plan(
            batch,
            self._srpo,
            has_images=bool(image_counts[:, 0].any()),
            pad_token_id=self._srpo_tokenizer.pad_token_id,
        )
        seen = {"original": encoded, "corrupted": corrupted}
        first_row = self.accelerator.process_index * len(rows)
        scored = {}
        for name, image, changed in planned.views:
            views, width = seen[image], token_ids.shape[1]
            if changed is not None:
                own, width = slice(first_row, first_row + len(rows)), changed.token_ids.shape[1]
                real = zip(changed.token_ids[own], changed.mask[own], strict=True)
                views = [
                    _with_response(each, ids[where].tolist(), first)
                    for each, (ids, where), first in zip(views, real, firsts, strict=True)
                ]
            scored[name] = gather(self._srpo_score(chunks, views, width))
        old = _in_sequences([each.old_per_token_logps for each in batches], batches, mask)
        if has_dropout(self.model):  # swift's own were made with it
            old = self._srpo_score(chunks, encoded, token_ids.shape[1])
        engine = None  # of every process the same, or gathering would wait forever
        if self.args.use_vllm:
            absent = [torch.full_like(each.old_per_token_logps, torch.nan) for each in batches]
            reported = [
                none if each.rollout_per_token_logps is None else each.rollout_per_token_logps
                for each, none in zip(batches, absent, strict=True)
            ]
            engine = gather(_in_sequences(reported, batches, mask))
        advantages = gather(torch.stack([sample.advantages.to(device) for sample in rows]).float())
        rewards = (self._rewards_per_func * self.reward_weights).nansum(1)
        by_function = dict(zip(self.reward_func_names, self._rewards_per_func.T, strict=False))
        correct = None if self._srpo_correct is None else self._srpo_correct(rewards, by_function)
        credited = credit(
            batch,
            planned,
            scored,
            self._srpo,
            old_log_probs=gather(old.float()),
            advantages=advantages,
            step=step,
            image_counts=image_counts,
            correct=correct,
            engine_log_probs=engine,
        )
        self._srpo_watch.look_at_engine(credited.metrics)
        self._srpo_weight(batches, credited.weights[first_row : first_row + len(rows)], mask)

        metrics = logged(credited.metrics, which=self._srpo.metrics) | {"srpo/seconds": time.perf_counter() - start}
        for name, value in metrics.items():
            self._metrics["train" if is_training else "eval"][name].append(value)
        if is_training and self.accelerator.is_main_process:
            if self._srpo.summary:
                print(batch_in_words(batch, credited, advantages=advantages, step=step + 1), flush=True)
            if self._srpo.rollouts is not None:
                self._srpo_write(batch, credited, advantages, rewards, correct)

    def _compute_loss_and_metrics(self, model: Any, model_inputs: dict[str, Any], grpo_batch: Any) -> Any:
        # At every step: a loss that was given other advantages would be plain GRPO under SRPO's name.
        if grpo_batch.advantages is not getattr(grpo_batch, "srpo_advantages", None):
            raise unsupported("the advantages that the loss was given are not those that SRPO weighted")
        return super()._compute_loss_and_metrics(model, model_inputs, grpo_batch)

    def _srpo_weight(self, batches: Sequence[Any], weights: Tensor, mask: Tensor) -> None:
        """Multiply the weights of sampled tokens into the advantages of each micro-batch."""
        at = 0
        for each in batches:
            rows = slice(at, at + len(each.completion_mask))
            weighted = each.advantages.clone()
            weighted[each.completion_mask] *= weights[rows][mask[rows]].to(weighted.dtype)
            each.advantages = each.srpo_advantages = weighted
            at = rows.stop

    def _srpo_score(self, chunks: Sequence[Sequence[Any]], encoded: Sequence[dict[str, Any]], width: int) -> Tensor:
        """Log-probs of a view, [rows, width], in ms-swift's micro-batches and by its own code path; 0 elsewhere."""
        remaining, batches, log_probs = iter(encoded), [], []
        for chunk in chunks:
            views = [copy.copy(sample) for sample in chunk]
            for view in views:
                view.encoded = dict(next(remaining))
            with self._template_context(self.template):
                inputs, batch = collate_to_grpo_micro_batch(
                    views, self.template, device=self.accelerator.device, use_logits_to_keep=True
                )
            inputs.pop("labels", None)
            checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
            with torch.no_grad(), checkpointing, evaluating(self.model):
                log_probs.append(self._get_per_token_logps_and_entropies(self.model, inputs, batch)[0].float())
            batches.append(batch)
        labels = _padded([each["labels"] for each in encoded], _IGNORED, self.accelerator.device, width)
        return _in_sequences(log_probs, batches, labels != _IGNORED)

    def _srpo_gather(self, rows: Tensor, fill: int = 0) -> Tensor:
        """Rows of all processes in their order, right-padded to one length."""
        if self.accelerator.num_processes == 1:
            return rows
        moved = rows.long() if rows.dtype == torch.bool else rows  # gloo does not pad booleans
        if rows.ndim == 2:
            moved = self.accelerator.pad_across_processes(moved, dim=1, pad_index=fill)
        return self.accelerator.gather(moved).to(rows.dtype)

    def _srpo_write(
        self, batch: RolloutBatch, credited: Credit, advantages: Tensor, rewards: Tensor, correct: Tensor | None
    ) -> None:
        """Append a training batch of all processes to the file of ``--srpo_rollouts``."""
        step, path = self.state.global_step, self._srpo.rollouts
        assert path is not None
        if self._srpo_writer is None:
            self._srpo_writer = RolloutWriter(
                path,
                tokenizer=self._srpo_tokenizer,
                tags=self._srpo.tags,
                eos_token_id=self._srpo_ending,
                correct_by=None if self._srpo_correct is None else str(self._srpo_correct),
                resume_at=step or None,
            )
        firsts = batch.mask.int().argmax(1).tolist()
        prompts = [
            self._srpo_tokenizer.decode(ids[:first], skip_special_tokens=True)
            for ids, first in zip(batch.token_ids.tolist(), firsts, strict=True)
        ]
        recorded = record(batch, credited, advantages=advantages, correct=correct)
        self._srpo_writer.write(**recorded, rewards=rewards, prompts=prompts, step=step)


def _padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device, width: int | None = None) -> Tensor:
    width = max(map(len, rows)) if width is None else width
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)


def _in_sequences(parts: Sequence[Tensor], batches: Sequence[Any], mask: Tensor) -> Tensor:
    """Values of the sampled tokens, from ms-swift's micro-batches to whole sequences, [rows, width]; 0 elsewhere.

    A micro-batch holds the last columns of its sequences, padded on either side: what both have is the order of tokens.
    """
    values = torch.zeros(mask.shape, device=mask.device)
    values[mask] = torch.cat([part[each.completion_mask] for part, each in zip(parts, batches, strict=True)]).float()
    return values


def _with_response(encoded: dict[str, Any], token_ids: list[int], first: int) -> dict[str, Any]:
    """What ms-swift encoded, with the response, from token `first` on, replaced and all of it to be scored."""
    made = {name: value for name, value in encoded.items() if name not in ("loss_scale", "length")}
    # With a token before them, so that no row is without any where a perception was the whole response.
    labels = [_IGNORED] * (first - 1) + token_ids[first - 1 :]
    for name, text in _TOKEN_TYPES.items():
        if name in made:
            types = torch.as_tensor(made[name]).flatten().tolist()
            made[name] = types[:first] + [text] * (len(token_ids) - first)
    return made | {"input_ids": token_ids, "labels": labels}
