"""`GRPOTrainer` with role-aware token credit: one overridden hook, TRL's own loss."""

import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import GRPOTrainer

from srpo_core import (
    BrokenReason,
    CounterfactualResponses,
    Role,
    RoleAdvantages,
    ScaleState,
    counterfactual_responses,
    segment_responses,
    span_counterfactuals,
    srpo_advantages,
)
from srpo_core.diagnostics import credit_diagnostics
from srpo_core.rollouts import RolloutWriter
from srpo_trl.config import SRPOConfig
from srpo_trl.contexts import Context, context_of, corrupted_context, scoring_inputs

__all__ = ["SRPOMixin", "SRPOTrainer"]

# TRL 1.15 computes no log-probabilities on a CPU.
SUPPORTED_TRL = SpecifierSet(">=1.0,!=1.15.*")
# Here positions are counted along the attention mask, so that a masked perception is a removed one. Elsewhere (LLaVA,
# Gemma3, linear attention) it leaves a gap in the positions or a trace in the state.
MASK_IS_REMOVAL = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"})


# A mixin names no base at run time; type checkers should know what it will be mixed into.
_Base = GRPOTrainer if TYPE_CHECKING else object


class SRPOMixin(_Base):
    """Weighs the advantages of any trainer built on ``GRPOTrainer``: ``class Mine(SRPOMixin, MyGRPOTrainer)``.

    Takes the arguments of the trainer it is mixed into, `args` being an :class:`SRPOConfig`. It overrides one method,
    which scores every rollout batch, and returns advantages per token instead of per response.
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
        check_upstream(type(self))
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SRPOConfig(f"{name.split('/')[-1]}-SRPO")
        if not isinstance(args, SRPOConfig):
            raise TypeError(f"args must be a srpo_trl.SRPOConfig, got {type(args).__name__}: it has the same fields")
        if getattr(args, "use_liger_kernel", False) and version("trl") in SpecifierSet("<1.14"):
            raise ValueError(
                "use_liger_kernel=True takes one advantage per response on TRL below 1.14: set it to False, or upgrade"
            )
        self._srpo = args.srpo_options()
        self._srpo_is_first = True
        self._srpo_writer: RolloutWriter | None = None
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self.add_callback(_ScaleMemory())
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
        if self._srpo_is_first:
            self._srpo_check_format(batch, rollouts)
        credit, donors, views = self._srpo_credit(batch, rollouts)
        self._srpo_log(rollouts, credit, donors, start)
        self._srpo_write(rollouts, credit, donors, views)
        self._srpo_is_first = False
        # Beside the sampled tokens stands what TRL would broadcast there: some of its loss types average over padding.
        advantages = torch.where(rollouts.mask, credit.advantages, rollouts.advantages[:, None])
        return batch | {"advantages": advantages[rollouts.own, : batch["completion_ids"].shape[1]]}

    def _srpo_rollouts(self, batch: dict[str, Any]) -> "_Rollouts":
        """The generation batch of all ranks: weights, donors and metrics then do not depend on how it was split."""
        token_ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
        if "tool_mask" in batch:
            mask = mask & batch["tool_mask"].bool()
        tokenizer = self._srpo_tokenizer
        roles, broken, boundary = segment_responses(
            token_ids,
            mask,
            tokenizer,
            tags=self._srpo.tags,
            eos_token_id=self._srpo_eos,
            answer_role=self._srpo.answer_role,
        )
        rows = self.accelerator.num_processes * len(token_ids)
        in_group = self.num_generations if self.model.training else self.num_generations_eval
        first = self.accelerator.process_index * len(token_ids)
        return _Rollouts(
            token_ids=self._srpo_gather(token_ids, fill=tokenizer.pad_token_id),
            mask=self._srpo_gather(mask),
            roles=self._srpo_gather(roles),
            boundary=self._srpo_gather(boundary),
            broken=self._srpo_gather(broken),
            advantages=self._srpo_gather(batch["advantages"]),
            group_ids=torch.arange(rows, device=token_ids.device) // in_group,
            own=slice(first, first + len(token_ids)),
            own_time=token_ids.shape[1],
        )

    def _srpo_gather(self, rows: Tensor, fill: int = 0) -> Tensor:
        """Rows of all ranks in rank order, right-padded to one length."""
        if self.accelerator.num_processes == 1:
            return rows
        moved = rows.long() if rows.dtype == torch.bool else rows  # gloo does not pad booleans
        if rows.ndim == 2:
            moved = self.accelerator.pad_across_processes(moved, dim=1, pad_index=fill)
        return self.accelerator.gather(moved).to(rows.dtype)

    def _srpo_credit(
        self, batch: dict[str, Any], rollouts: "_Rollouts"
    ) -> tuple[RoleAdvantages, Tensor | None, "_Views"]:
        """Score the responses in their other contexts and weigh their tokens; also, whose perception each one got."""
        options, context, own = self._srpo, context_of(batch), rollouts.own
        token_ids, mask = batch["completion_ids"], batch["completion_mask"]
        counterfactual = counterfactual_responses(
            rollouts.token_ids,
            rollouts.roles,
            rollouts.mask,
            kind=options.counterfactual,
            group_ids=rollouts.group_ids,
            boundary=rollouts.boundary,
            pad_token_id=self._srpo_tokenizer.pad_token_id,
        )
        log_probs = batch.get("old_per_token_logps")
        if log_probs is None or _has_dropout(self.model):
            log_probs = self._srpo_log_probs(context, token_ids, mask)
        log_probs = self._srpo_gather(log_probs)

        corrupted, corrupted_log_probs = context, None
        if "pixel_values" in context.vision:
            corrupted = corrupted_context(
                context,
                options,
                processor=self.processing_class,
                model_config=self.model.config,
                group_ids=rollouts.group_ids[own],
                step=self.state.global_step,
                is_first=self._srpo_is_first,
            )
            corrupted_log_probs = self._srpo_gather(self._srpo_log_probs(corrupted, token_ids, mask))

        counterfactual_log_probs = self._srpo_changed_log_probs(
            corrupted if options.counterfactual_image == "corrupted" else context, counterfactual, rollouts
        )
        use = self._srpo_use(context, rollouts, log_probs) if corrupted_log_probs is not None else None
        memory = next(callback for callback in self.callback_handler.callbacks if isinstance(callback, _ScaleMemory))
        carried_back = counterfactual.carry_back(counterfactual_log_probs, log_probs)
        credit = srpo_advantages(
            log_probs,
            corrupted_log_probs,
            carried_back,
            rollouts.roles,
            rollouts.advantages,
            rollouts.mask,
            broken=rollouts.broken,
            perception_use=use,
            scale_state=memory.recall(log_probs.device),
            **options.advantage_options(step=self.state.global_step),
        )
        if self.model.training:
            memory.remember(credit.scale_state)
        donors = counterfactual.donors if options.counterfactual == "swap" else None
        return credit, donors, _Views(log_probs, corrupted_log_probs, carried_back)

    def _srpo_use(self, context: Context, rollouts: "_Rollouts", log_probs: Tensor) -> Tensor | None:
        """What the reasoning owes to each perception token, by one more pass for each span; None: not asked for."""
        if self._srpo.use_passes == 0:
            return None
        without = span_counterfactuals(
            rollouts.token_ids,
            rollouts.roles,
            rollouts.mask,
            spans=self._srpo.use_passes,
            boundary=rollouts.boundary,
            pad_token_id=self._srpo_tokenizer.pad_token_id,
        )
        passes = [self._srpo_changed_log_probs(context, responses, rollouts) for responses in without.responses]
        return without.use(passes, log_probs, rollouts.roles, rollouts.mask, clip=self._srpo.score_clip)

    def _srpo_changed_log_probs(
        self, context: Context, changed: CounterfactualResponses, rollouts: "_Rollouts"
    ) -> Tensor:
        """Log-probabilities of the changed responses of all ranks, of which each rank scores its own."""
        own, time = rollouts.own, rollouts.own_time
        log_probs = self._srpo_log_probs(
            context, changed.token_ids[own], changed.attention_mask[own], changed.positions[own, :time]
        )
        return self._srpo_gather(log_probs)

    def _srpo_log_probs(
        self, context: Context, response_ids: Tensor, attention_mask: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of responses by the trainer's own code path, in its own micro-batches."""
        if response_ids.shape[1] == 0:  # every response of every rank was perception alone, and dropped
            return response_ids.new_zeros(response_ids.shape, dtype=torch.float32)
        token_ids, mask, vision = scoring_inputs(context, response_ids, attention_mask, positions)
        sizes = (self.args.per_device_eval_batch_size, self.args.per_device_train_batch_size)
        batch_size = sizes[self.model.training]
        with torch.no_grad(), _evaluating(self.model):
            return self._get_per_token_logps_and_entropies(
                self.model, token_ids, mask, response_ids.shape[1], batch_size=batch_size, **vision
            )[0]

    def _srpo_refuse_mixed_rows(self, inputs: list[dict[str, Any]]) -> None:
        images = [row.get("images", row.get("image")) for row in inputs]
        has_image = [bool(image) if isinstance(image, list) else image is not None for image in images]
        # Of all ranks: one without images would wait for the others for ever.
        everywhere = self.accelerator.gather(torch.tensor(has_image, device=self.accelerator.device).long())
        if 0 < everywhere.sum() < len(everywhere):
            raise ValueError(
                f"rows {(everywhere == 0).nonzero().flatten().tolist()} of a generation batch have no image while "
                "others have one, which TRL cannot process together: train on them separately, or give the text rows "
                "a blank image"
            )

    def _srpo_check_format(self, batch: dict[str, Any], rollouts: "_Rollouts") -> None:
        """Refuse a prompt under which no response can have roles. Only the first batch is looked at."""
        tags = self._srpo.tags
        prompt_ids = batch["prompt_ids"][0][batch["prompt_mask"][0].bool()]
        prompt = self._srpo_tokenizer.decode(prompt_ids.tolist(), skip_special_tokens=False)
        for opening, _ in tags.pairs.values():
            if prompt.rstrip().endswith(opening):
                raise ValueError(
                    f"the chat template ends the prompt with {opening!r}, so that responses begin inside a block whose "
                    "opening tag they lack and all count as broken: take the tag out of the template's generation "
                    "prompt"
                )
        if self._srpo.strength > 0 and tags.perception[0] not in prompt and not (rollouts.broken == 0).any():
            structure = "".join(f"{opening}...{closing}" for opening, closing in tags.pairs.values())
            raise ValueError(
                f"no response of the first batch has the structure {structure}, and the prompt does not ask for it: "
                "name the tags in a system message of the prompts (docs/trl.md has one), train on demonstrations "
                "first, or set srpo_perception_tags, srpo_reasoning_tags and srpo_answer_tags to your own"
            )

    def _srpo_log(self, rollouts: "_Rollouts", credit: RoleAdvantages, donors: Tensor | None, start: float) -> None:
        metrics = credit_diagnostics(
            credit.weights,
            credit.visual_dependency,
            credit.perception_consistency,
            rollouts.roles,
            rollouts.mask,
            broken=rollouts.broken,
            advantages=rollouts.advantages,
            donors=donors,
            score_clip=self._srpo.score_clip,
        )
        # Such responses teach nothing: their passes were for the metrics alone.
        metrics["advantage/zero"] = (rollouts.advantages == 0).float().mean()
        logged = self._metrics["train" if self.model.training else "eval"]
        values = torch.stack([value.float() for value in metrics.values()]).tolist()
        for name, value in zip(metrics, values, strict=True):
            logged[f"srpo/{name}"].append(value)
        columns = self._logs["extra"]
        for role in (Role.PERCEPTION, Role.REASONING):
            where = rollouts.where(role)
            means = (credit.weights * where).sum(1) / where.sum(1)  # NaN where a response has no such token
            columns[f"srpo_{role.name.lower()}_weight"].extend(means.tolist())
        columns["srpo_broken"].extend(BrokenReason(reason).name.lower() for reason in rollouts.broken.tolist())
        logged["srpo/seconds"].append(time.perf_counter() - start)

    def _srpo_write(
        self, rollouts: "_Rollouts", credit: RoleAdvantages, donors: Tensor | None, views: "_Views"
    ) -> None:
        """Append the training batch of all ranks to the file of ``srpo_rollouts``."""
        path = self.args.srpo_rollouts
        if path is None or not self.model.training or not self.accelerator.is_main_process:
            return
        if self._srpo_writer is None:
            resumed = self.state.global_step > 0
            self._srpo_writer = RolloutWriter(
                path,
                tokenizer=self._srpo_tokenizer,
                tags=self._srpo.tags,
                eos_token_id=self._srpo_eos,
                mode="append" if resumed else "replace",
            )
        # TRL keeps the last batches of all ranks for its table of completions; NaN where a function gave no reward.
        count, logs = len(rollouts.mask), self._logs
        images = [row[0] if row else None for row in list(logs.get("images", ()))[-count:]]
        by_function = torch.tensor([list(rewards)[-count:] for rewards in logs["rewards"].values()])
        self._srpo_writer.write(
            rollouts.token_ids,
            rollouts.mask,
            old_log_probs=views.log_probs,
            corrupted_log_probs=views.corrupted_log_probs,
            counterfactual_log_probs=views.counterfactual_log_probs,
            roles=rollouts.roles,
            broken=rollouts.broken,
            visual_dependency=credit.visual_dependency,
            perception_consistency=credit.perception_consistency,
            weights=credit.weights,
            rewards=(by_function * self.reward_weights.cpu()[:, None]).nansum(0),
            advantages=rollouts.advantages,
            group_ids=rollouts.group_ids,
            donors=donors,
            prompts=[_text_of(prompt) for prompt in list(logs["prompt"])[-count:]],
            images=images if len(images) == count else None,
            step=self.state.global_step,
        )

    @property
    def _srpo_eos(self) -> list[int]:
        eos = self.model.generation_config.eos_token_id
        return [
            self._srpo_tokenizer.eos_token_id,
            *(eos if isinstance(eos, list) else [eos] if eos is not None else []),
        ]

    @property
    def _srpo_tokenizer(self) -> Any:
        return getattr(self.processing_class, "tokenizer", self.processing_class)


class SRPOTrainer(SRPOMixin, GRPOTrainer):
    """Drop-in for :class:`trl.GRPOTrainer`: same arguments, `args` being an :class:`SRPOConfig`."""


class _Rollouts(NamedTuple):
    """Responses of all ranks, which of them are this rank's, and how long its own batch is."""

    token_ids: Tensor
    mask: Tensor
    roles: Tensor
    boundary: Tensor
    broken: Tensor
    advantages: Tensor
    group_ids: Tensor
    own: slice
    own_time: int

    def where(self, role: Role) -> Tensor:
        return self.mask & (self.roles == int(role))


class _Views(NamedTuple):
    """Log-probabilities of the same tokens in each context, of all ranks."""

    log_probs: Tensor
    corrupted_log_probs: Tensor | None
    counterfactual_log_probs: Tensor


class _ScaleMemory(TrainerCallback, ExportableState):
    """Keeps the moving average behind ``srpo_scale="ema_rms"`` in ``trainer_state.json``."""

    def __init__(self) -> None:
        self.sums: list[float] | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"sums": self.sums}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Transformers restores callbacks only on request; without its average a resumed run would weigh differently.
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


def check_upstream(trainer_class: type) -> None:
    """Raise if the installed TRL is not one this adapter knows how to hook into."""
    installed = version("trl")
    if not SUPPORTED_TRL.contains(installed, prereleases=True):
        raise ImportError(f"trl {installed} is not supported: pip install 'trl{SUPPORTED_TRL}'")
    for hook in ("_generate_and_score_completions", "_get_per_token_logps_and_entropies"):
        if not callable(getattr(trainer_class, hook, None)):
            raise ImportError(
                f"trl {installed} has no {trainer_class.__name__}.{hook}, which SRPO builds on: install an older trl, "
                "and tell the maintainers of srpo_core"
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _has_dropout(model: nn.Module) -> bool:
    """Whether a forward pass in the present mode is random."""
    for module in model.modules():
        rates = [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
        rates += [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        if module.training and any(rate > 0 for rate in rates):
            return True
    return False
