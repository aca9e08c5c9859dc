"""`GRPOTrainer` with role-aware token credit: TRL's own loss, given advantages per token."""

import textwrap
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import GRPOTrainer

from srpo_core import Credit, RolloutBatch, ScaleState, Segmentation, credit, plan
from srpo_core.batch import Plan, ending_ids, logged, record
from srpo_core.modes import evaluating, has_dropout
from srpo_core.roles import role_masks
from srpo_core.rollouts import RolloutWriter
from srpo_core.tags import BrokenReason
from srpo_core.watch import RunWatch, batch_in_words
from srpo_trl.config import SRPOConfig
from srpo_trl.contexts import Context, contexts_of, prompt_ids_of, scoring_inputs
from srpo_trl.upstream import SHARING_TRANSFORMERS, check_upstream, transformers_is, versions

__all__ = ["SRPOMixin", "SRPOTrainer"]

# Here positions are counted along the attention mask, so that a masked perception is a removed one. Elsewhere (LLaVA,
# Gemma3, linear attention) it leaves a gap in the positions or a trace in the state.
MASK_IS_REMOVAL = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"})


_PROMPT_END = 32  # tokens of a prompt that are read for a tag at its end

# A mixin names no base at run time; type checkers should know what it will be mixed into.
_Base = GRPOTrainer if TYPE_CHECKING else object

if TYPE_CHECKING:
    from srpo_hf import Scorer


class SRPOMixin(_Base):
    """Weights the advantages of any trainer built on ``GRPOTrainer``: ``class Mine(SRPOMixin, MyGRPOTrainer)``.

    Takes the arguments of the trainer it is mixed into, `args` being an :class:`SRPOConfig`. It scores every rollout
    batch in the other contexts and returns advantages per token instead of per response. The first optimizer step
    proves that they arrive in the loss.
    """

    _tag_names = ["trl", "grpo", "srpo"]  # noqa: RUF012
    _name = "SRPO"
    _paper = {  # noqa: RUF012
        "title": "Structured Role-aware Policy Optimization for Multimodal Reasoning",
        "id": "2605.07274",
        "citation": textwrap.dedent("""\
            @article{jiang2026structured,
                title  = {{Structured Role-aware Policy Optimization for Multimodal Reasoning}},
                author = {Bingqing Jiang and Difan Zou},
                year   = 2026,
                eprint = {arXiv:2605.07274},
            }"""),
    }

    def __init__(self, model: Any, reward_funcs: Any = None, args: SRPOConfig | None = None, *rest: Any, **kwargs: Any):
        check_upstream("trainer class", type(self))
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SRPOConfig(f"{name.split('/')[-1]}-SRPO")
        if not isinstance(args, SRPOConfig):
            raise TypeError(f"args must be a srpo_trl.SRPOConfig, got {type(args).__name__}: it has the same fields")
        self._srpo, self._srpo_correct = args.srpo_options(), args.srpo_recording().correct_rule
        self._srpo_writer: RolloutWriter | None = None
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        check_upstream("trainer", self)
        check_upstream("completion log", self._logs)
        self._srpo_tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        self._srpo_ending = ending_ids(self._srpo_tokenizer, self.model.generation_config)
        self._srpo_watch = RunWatch(
            self._srpo, self._srpo_tokenizer, named="srpo_{}", warns=self.accelerator.is_main_process
        )
        if self._srpo_correct is not None:  # an unknown function ends the run now, not after its first batch
            nothing = torch.zeros(0)
            self._srpo_correct(nothing, dict.fromkeys(self.reward_func_names, nothing))
        self._srpo_arrival, self._srpo_summary = _Arrival(), _Summary()
        self.add_callback(self._srpo_arrival)
        self.add_callback(self._srpo_summary)
        self.add_callback(_ScaleMemory())
        self._srpo_scorer = self._srpo_make_scorer()
        family = self.model.config.model_type
        if self._srpo.counterfactual == "mask" and family not in MASK_IS_REMOVAL:
            raise ValueError(
                f"srpo_counterfactual='mask' is exact only for {', '.join(sorted(MASK_IS_REMOVAL))}: {family} would "
                "still see where the perception was. Set srpo_counterfactual='swap' or 'drop'"
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._srpo_refuse_mixed_rows(inputs)
        batch = super()._generate_and_score_completions(inputs)
        start = time.perf_counter()
        rollouts = self._srpo_rollouts(batch)
        prompt = batch["prompt_ids"][0][batch["prompt_mask"][0].bool()].tolist()
        prompts = [self._srpo_tokenizer.decode(prompt, skip_special_tokens=False)]
        self._srpo_watch.look(rollouts.responses, prompts=prompts, image_counts=rollouts.image_counts)
        credited = self._srpo_credit(batch, rollouts)
        self._srpo_watch.look_at_engine(credited.metrics)
        self._srpo_log(rollouts, credited, start)
        self._srpo_write(rollouts, credited)
        # Beside the sampled tokens stands what TRL would broadcast there: some of its loss types average over padding.
        advantages = torch.where(rollouts.responses.mask, credited.advantages, rollouts.advantages[:, None])
        return batch | {"advantages": advantages[rollouts.own]}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        if self.model.training:
            self._srpo_arrival.note(inputs)
        return super()._compute_loss(model, inputs)

    def _srpo_rollouts(self, batch: dict[str, Any]) -> "_Rollouts":
        """The responses of all ranks: weights, donors and metrics then do not depend on how they were split."""
        check_upstream("rollout batch", batch)
        token_ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
        if "tool_mask" in batch:
            mask = mask & batch["tool_mask"].bool()
        rows, width = token_ids.shape
        first, gather = self.accelerator.process_index * rows, self._srpo_gather
        # A prompt's identity is its own: with steps_per_generation=1 an optimizer step has several generation batches.
        group_ids, own = prompt_ids_of(batch), (slice(first, first + rows), slice(width))
        local = RolloutBatch.of(
            token_ids,
            mask,
            self._srpo_tokenizer,
            self._srpo,
            group_ids=group_ids,
            prompt_ends=self._srpo_prompt_ends(batch),
            ending=self._srpo_ending,
        )
        assert local.open_at_start is not None
        responses = RolloutBatch(
            gather(token_ids, fill=self._srpo_tokenizer.pad_token_id),
            gather(mask),
            Segmentation(*map(gather, local.segmentation)),
            gather(group_ids),
            open_at_start=gather(local.open_at_start),
        )
        contexts, image_counts = contexts_of(
            batch,
            self._srpo,
            processor=self.processing_class,
            model_config=self.model.config,
            group_ids=group_ids,
            step=self.state.global_step,
        )
        image_counts = None if image_counts is None else gather(image_counts)
        rewards, correct = self._srpo_rewards(len(responses.mask), token_ids.device)
        return _Rollouts(responses, gather(batch["advantages"]), own, contexts, image_counts, rewards, correct)

    def _srpo_prompt_ends(self, batch: dict[str, Any]) -> list[str]:
        """The last tokens of each prompt as text: a chat template may end inside a block."""
        real = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
        ends = [row[where][-_PROMPT_END:].tolist() for row, where in real]
        return [self._srpo_tokenizer.decode(end, skip_special_tokens=False) for end in ends]

    def _srpo_rewards(self, count: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Of all ranks the reward of each response, and whether its answer is right where a rule says that."""
        # TRL keeps the last batches of all ranks for its table of completions; NaN where a function gave no reward.
        by_function = {
            name: torch.tensor(list(rewards)[-count:], dtype=torch.float32, device=device)
            for name, rewards in self._logs["rewards"].items()
        }
        total = (torch.stack(list(by_function.values())) * self.reward_weights.to(device)[:, None]).nansum(0)
        return total, None if self._srpo_correct is None else self._srpo_correct(total, by_function)

    def _srpo_gather(self, rows: Tensor, fill: int = 0) -> Tensor:
        """Rows of all ranks in rank order, right-padded to one length."""
        if self.accelerator.num_processes == 1:
            return rows
        moved = rows.long() if rows.dtype == torch.bool else rows  # gloo does not pad booleans
        if rows.ndim == 2:
            moved = self.accelerator.pad_across_processes(moved, dim=1, pad_index=fill)
        return self.accelerator.gather(moved).to(rows.dtype)

    def _srpo_credit(self, batch: dict[str, Any], rollouts: "_Rollouts") -> Credit:
        """Score the responses in their other contexts, each rank its own ones, and weight the tokens of all."""
        planned = plan(
            rollouts.responses,
            self._srpo,
            has_images="corrupted" in rollouts.contexts,
            pad_token_id=self._srpo_tokenizer.pad_token_id,
        )
        made = (self._srpo_score_plainly if self._srpo_scorer is None else self._srpo_score)(batch, rollouts, planned)
        scored = {name: self._srpo_gather(log_probs) for name, log_probs in made.items()}
        log_probs = scored.pop("original")
        engine = batch.get("sampling_per_token_logps")
        # Transformers may have replaced the callback by its saved self.
        memory = next(callback for callback in self.callback_handler.callbacks if isinstance(callback, _ScaleMemory))
        credited = credit(
            rollouts.responses,
            planned,
            scored,
            self._srpo,
            old_log_probs=log_probs,
            advantages=rollouts.advantages,
            step=self.state.global_step,
            image_counts=rollouts.image_counts,
            correct=rollouts.correct,
            engine_log_probs=None if engine is None else self._srpo_gather(engine),
            scale_state=memory.recall(log_probs.device),
        )
        if self.model.training:
            memory.remember(credited.scale_state)
        return credited

    def _srpo_make_scorer(self) -> "Scorer | None":
        """What scores each prompt once for all of its responses; None where TRL's own function scores instead."""
        # Processes that hold parts of the weights have to make equally many passes.
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not transformers_is(SHARING_TRANSFORMERS):
            return None
        from srpo_hf import Scorer

        size = self.args.per_device_train_batch_size
        try:
            return Scorer(self.model, self.processing_class, self._srpo, temperature=self.temperature, batch_size=size)
        except ValueError:  # a model without an output layer of its own
            return None

    def _srpo_score(self, batch: dict[str, Any], rollouts: "_Rollouts", planned: Plan) -> dict[str, Tensor]:
        """The log-probs of this rank's responses in every view and as they are, with shared prefixes."""
        from srpo_trl.shared import score_with_shared_prefixes

        assert self._srpo_scorer is not None
        with self.accelerator.autocast():
            return score_with_shared_prefixes(
                self._srpo_scorer,
                rollouts.contexts,
                rollouts.responses,
                planned,
                rollouts.own[0],
                every_token=self.args.srpo_rollouts is not None,
            )

    def _srpo_score_plainly(self, batch: dict[str, Any], rollouts: "_Rollouts", planned: Plan) -> dict[str, Tensor]:
        """The same by TRL's log-prob function, one pass for each view."""
        own, contexts = rollouts.own, rollouts.contexts
        unchanged = (batch["completion_ids"], batch["completion_mask"])
        log_probs = batch.get("old_per_token_logps")
        if log_probs is None or has_dropout(self.model):
            log_probs = self._srpo_log_probs(contexts["original"], *unchanged)
        scored = {"original": log_probs}
        for name, image, changed in planned.views:
            inputs = unchanged
            if changed is not None:
                inputs = (changed.token_ids[own[0]], changed.attention_mask[own[0]], changed.positions[own])
            scored[name] = self._srpo_log_probs(contexts[image], *inputs)
        return scored

    def _srpo_log_probs(
        self, context: Context, response_ids: Tensor, attention_mask: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of responses by the trainer's own code path, in its own micro-batches."""
        if response_ids.shape[1] == 0:  # every response of every rank was perception alone, and dropped
            return response_ids.new_zeros(response_ids.shape, dtype=torch.float32)
        token_ids, mask, vision = scoring_inputs(context, response_ids, attention_mask, positions)
        sizes = (self.args.per_device_eval_batch_size, self.args.per_device_train_batch_size)
        batch_size = sizes[self.model.training]
        with torch.no_grad(), evaluating(self.model):
            return self._get_per_token_logps_and_entropies(
                self.model, token_ids, mask, response_ids.shape[1], batch_size=batch_size, **vision
            )[0]

    def _srpo_refuse_mixed_rows(self, inputs: list[dict[str, Any]]) -> None:
        images = [row.get("images", row.get("image")) for row in inputs]
        has_image = [bool(image) if isinstance(image, list) else image is not None for image in images]
        # Of all ranks: one without images would wait for the others forever.
        everywhere = self.accelerator.gather(torch.tensor(has_image, device=self.accelerator.device).long())
        if 0 < everywhere.sum() < len(everywhere):
            raise ValueError(
                f"rows {(everywhere == 0).nonzero().flatten().tolist()} of a generation batch have no image while "
                "others have one, which TRL cannot process together: train on them separately, or give the text rows "
                "a blank image"
            )

    def _srpo_log(self, rollouts: "_Rollouts", credited: Credit, start: float) -> None:
        """Metrics, the line in words, and the columns of TRL's table of completions."""
        if self.args.srpo_summary and self.model.training and self.accelerator.is_main_process:
            step = self.state.global_step + 1  # as the trainer counts it where it logs the step
            self._srpo_summary.line = batch_in_words(
                rollouts.responses, credited, advantages=rollouts.advantages, step=step
            )
        metrics = logged(credited.metrics, which=self.args.srpo_metrics)
        metrics["srpo/seconds"] = time.perf_counter() - start
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        (roles, broken, _), columns = rollouts.responses.segmentation, self._logs["extra"]
        for role, where in role_masks(roles, rollouts.responses.mask)._asdict().items():
            means = (credited.weights * where).sum(1) / where.sum(1)  # NaN where a response has no such token
            columns[f"srpo_{role}_weight"].extend(means.tolist())
        columns["srpo_broken"].extend(BrokenReason(reason).name.lower() for reason in broken.tolist())

    def _srpo_write(self, rollouts: "_Rollouts", credited: Credit) -> None:
        """Append the training batch of all ranks to the file of ``srpo_rollouts``."""
        path, step, logs = self.args.srpo_rollouts, self.state.global_step, self._logs
        if path is None or not self.model.training or not self.accelerator.is_main_process:
            return
        if self._srpo_writer is None:
            self._srpo_writer = RolloutWriter(
                path,
                tokenizer=self._srpo_tokenizer,
                tags=self._srpo.tags,
                eos_token_id=self._srpo_ending,
                correct_by=None if self._srpo_correct is None else str(self._srpo_correct),
                resume_at=step if step > 0 else None,
            )
        count = len(rollouts.advantages)
        images = [row[0] if row else None for row in list(logs.get("images", ()))[-count:]]
        self._srpo_writer.write(
            **record(rollouts.responses, credited, advantages=rollouts.advantages, correct=rollouts.correct),
            rewards=rollouts.rewards,
            prompts=[_text_of(prompt) for prompt in list(logs["prompt"])[-count:]],
            images=images if len(images) == count else None,
            step=step,
        )


class SRPOTrainer(SRPOMixin, GRPOTrainer):
    """Drop-in for :class:`trl.GRPOTrainer`: same arguments, `args` being an :class:`SRPOConfig`."""


class _Rollouts(NamedTuple):
    """A generation batch.

    Attributes:
        responses: Of all ranks.
        advantages: Of all ranks, one per response.
        own: Which rows and columns of them this rank has sampled.
        contexts: Of this rank, by the image in it.
        image_counts: Of all ranks, as :func:`srpo_core.credit` takes them.
        rewards: Of all ranks, one per response.
        correct: Of all ranks, as :func:`srpo_core.credit` takes it.
    """

    responses: RolloutBatch
    advantages: Tensor
    own: tuple[slice, slice]
    contexts: dict[str, Context]
    image_counts: Tensor | None
    rewards: Tensor
    correct: Tensor | None


class _Arrival(TrainerCallback):
    """Stops a run whose loss was not given advantages per token: it would be GRPO under SRPO's name."""

    def __init__(self) -> None:
        self.seen: list[bool] | None = []

    def note(self, inputs: dict[str, Any]) -> None:
        """What TRL's loss is about to read."""
        if self.seen is not None:
            self.seen.append(inputs["advantages"].shape == inputs["completion_ids"].shape)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen, self.seen = self.seen, None  # one step proves it for the run
        if seen is not None and not (seen and all(seen)):
            found = "was given one advantage per response" if seen else "was never called"
            raise RuntimeError(
                f"SRPO's advantages per token did not reach the loss in the first optimizer step: _compute_loss {found}"
                f", so this run would be plain GRPO. If no class of yours changed that, TRL did: {versions()}"
            )


class _Summary(TrainerCallback):
    """Prints what the last rollout batch did, in words, whenever the trainer logs."""

    def __init__(self) -> None:
        self.line: str | None = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        line, self.line = self.line, None  # an evaluation logs too, and has no line
        if line is not None:
            tqdm.write(line)  # above a progress bar, not through it


class _ScaleMemory(TrainerCallback, ExportableState):
    """Keeps the moving average behind ``srpo_scale="ema_rms"`` in ``trainer_state.json``."""

    def __init__(self) -> None:
        self.sums: list[float] | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"sums": self.sums}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Transformers restores callbacks only on request; without the average a resumed run would have other weights.
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            self.sums = saved["attributes"]["sums"]

    def recall(self, device: torch.device) -> ScaleState | None:
        return None if self.sums is None else ScaleState(*torch.tensor(self.sums, device=device))

    def remember(self, state: ScaleState | None) -> None:
        self.sums = None if state is None else torch.stack(list(state)).tolist()


def _text_of(prompt: str | list[dict[str, Any]]) -> str:
    """The words of a prompt that may be a conversation, whose messages may have parts."""
    if isinstance(prompt, str):
        return prompt
    contents = [message["content"] for message in prompt]
    parts = [part for content in contents for part in ([{"text": content}] if isinstance(content, str) else content)]
    return "\n".join(part["text"] for part in parts if part.get("text"))
