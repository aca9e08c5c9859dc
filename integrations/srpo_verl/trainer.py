"""verl's synchronous trainer with weighted advantages. The driver sees token ids and log-probs, never pixels."""

import math
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainer, PPOTrainerSync, register_trainer
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import response_to_nested

from srpo_core.batch import Plan, RolloutBatch, credit, logged, plan, record
from srpo_core.rollouts import RolloutWriter
from srpo_core.srpo import Credit
from srpo_core.watch import RunWatch, batch_in_words
from srpo_verl.options import check_config
from srpo_verl.proof import Proof
from srpo_verl.upstream import check_attributes
from srpo_verl.views import nested, source_tokens
from srpo_verl.worker import SRPOWorker

__all__ = ["SRPOMixin", "SRPOTrainer"]

#: What a worker fetches for the extra passes.
_ROW_FIELDS = ("prompts", "responses", "input_ids", "position_ids", "response_mask", "loss_mask", "multi_modal_inputs")

_PROMPT_END = 32  # tokens of a prompt that are read for a tag at its end

# The mixin reads attributes of a trainer.
_Trainer = PPOTrainer if TYPE_CHECKING else object


class SRPOMixin(_Trainer):
    """Mixin for trainers of ``verl.trainer.ppo.v1``: scores each batch in SRPO's other contexts, and weights the
    advantages that verl makes."""

    base_mode = "sync"

    def __init__(self, config: DictConfig) -> None:
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        options = check_config(plain)
        if options is None:
            raise ValueError("SRPO's trainer needs trainer.v1.trainer_mode=srpo")
        self.srpo_config, self._proof = options, Proof()
        # verl compares this string with "sync" in six places: under another name it would turn asynchronous.
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.base_mode
        super().__init__(config)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        check_attributes("resource pools", self)
        for role, remote in self.role_worker_mapping.items():
            check_attributes("remote class", remote)
            if remote.__ray_metadata__.modified_class.__name__ == ActorRolloutRefWorker.__name__:
                self.role_worker_mapping[role] = ray.remote(SRPOWorker)

    def _setup(self) -> None:
        super()._setup()
        check_attributes("trainer", self)
        self._has_images, self._ending = self.actor_rollout_wg.setup_srpo(self.srpo_config)[0]

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        began = perf_counter()
        rollouts = self._read_rollouts(batch)
        pad = self.tokenizer.pad_token_id
        planned = plan(rollouts, self.srpo_config, has_images=self._has_images, pad_token_id=pad)
        self._score_views(batch, planned)
        paused = perf_counter()
        batch = super()._compute_advantage(batch, metrics)
        resumed = perf_counter()
        batch = self._weight_advantages(batch, rollouts, planned, metrics)
        metrics["timing_s/srpo"] = paused - began + perf_counter() - resumed
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        self._proof.check_update(batch, lambda: self._get(batch, "advantages")["advantages"], step=self.global_steps)
        return super()._update_actor(batch, metrics)

    def on_step_end(self) -> None:
        if self.global_steps >= self.config.trainer.critic_warmup:  # before, only a critic is trained
            self._proof.check_step()
        super().on_step_end()

    def _read_rollouts(self, batch: KVBatchMeta) -> RolloutBatch:
        data = self._get(batch, "prompts", "responses", "response_mask", "uid")
        uids = tu.get(data, "uid")
        ends = [row[-_PROMPT_END:].tolist() for row in data["prompts"].unbind()]
        numbers = {uid: number for number, uid in enumerate(dict.fromkeys(uids))}
        return RolloutBatch.of(
            data["responses"].to_padded_tensor(self.tokenizer.pad_token_id),
            data["response_mask"].to_padded_tensor(0).bool(),
            self.tokenizer,
            self.srpo_config,
            group_ids=torch.tensor([numbers[uid] for uid in uids]),
            prompt_ends=[self.tokenizer.decode(end, skip_special_tokens=False) for end in ends],
            ending=self._ending,
        )

    def _score_views(self, batch: KVBatchMeta, planned: Plan) -> None:
        """Have the workers score every row in its other contexts; the results wait in the TransferQueue."""
        changed, images = {}, {name: image for name, image, _ in planned.views}
        for name, _, responses in planned.views:
            if responses is not None:
                lengths = responses.attention_mask.sum(dim=1).tolist()
                changed[f"srpo_{name}_responses"] = nested(responses.token_ids, lengths)
                changed[f"srpo_{name}_sources"] = nested(source_tokens(responses), lengths)
        rows = self._put(batch, changed)
        if rows.fields is not None:
            rows.fields = [name for name in rows.fields if name in _ROW_FIELDS or name in changed]
        rows.extra_info = {
            "srpo_step": self.global_steps,
            "srpo_views": images | ({"original": "original"} if self._old_log_probs_are_the_rollouts else {}),
            "calculate_entropy": False,
            "compute_loss": False,
            "temperature": self.config.actor_rollout_ref.rollout.temperature,
        }
        try:
            self.actor_rollout_wg.compute_srpo_log_probs(rows)
        except ray.exceptions.RayTaskError as error:
            # Without the chain the cause is what the run's error begins with, not ten frames of Ray.
            raise RuntimeError(f"SRPO's passes failed in a worker: {error.cause!r}\n{error}") from None

    def _weight_advantages(
        self, batch: KVBatchMeta, rollouts: RolloutBatch, planned: Plan, metrics: dict[str, Any]
    ) -> KVBatchMeta:
        old = "srpo_original_log_probs" if self._old_log_probs_are_the_rollouts else "old_log_probs"
        views = {view.name: f"srpo_{view.name}_log_probs" for view in planned.views}
        fields = ["srpo_images", "srpo_prompt_ids", "rm_scores", "advantages", "response_mask"]
        engine = "rollout_log_probs"
        data = self._get(batch, old, *views.values(), *fields, *([engine] if self._engine_tells else []))
        # Nested, as TransferQueue returns whatever has more than one number a row.
        image_counts = torch.stack(data["srpo_images"].unbind())
        # The workers see the images, which make a prompt what it is.
        rollouts = rollouts._replace(group_ids=data["srpo_prompt_ids"].reshape(-1))
        self._watch.look(rollouts, prompts=self._prompts(batch, skip_special_tokens=False), image_counts=image_counts)
        rewards = torch.stack([row.sum() for row in data["rm_scores"].unbind()]).float()
        correct = self._correct(batch, rewards)
        # Rejection may have shrunk the mask: the weights of a trajectory have mean one over the tokens that are left.
        mask = data["response_mask"].to_padded_tensor(0).bool()
        advantages = _of_response(data["advantages"].to_padded_tensor(0.0).float(), mask)
        trained = rollouts._replace(mask=mask)
        credited = credit(
            trained,
            planned,
            {name: data[field].to_padded_tensor(0.0).float() for name, field in views.items()},
            self.srpo_config,
            old_log_probs=data[old].to_padded_tensor(0.0).float(),
            advantages=advantages,
            step=self.global_steps - 1,  # verl counts from 1
            image_counts=image_counts,
            correct=correct,
            engine_log_probs=data[engine].to_padded_tensor(0.0).float() if self._engine_tells else None,
        )
        self._watch.look_at_engine(credited.metrics)
        metrics.update(logged(credited.metrics, which=self.srpo_config.metrics))
        if self.srpo_config.summary:
            print(batch_in_words(trained, credited, advantages=advantages, step=self.global_steps), flush=True)
        self._write(batch, rollouts, credited, advantages=advantages, rewards=rewards, correct=correct)
        weighted = response_to_nested(credited.advantages, data["response_mask"])
        batch = self._put(batch, {"advantages": weighted})
        if batch.fields is not None:  # the update needs none of ours
            batch.fields = [field for field in batch.fields if not field.startswith("srpo_")]
        self._proof.put(batch.keys, weighted)
        return batch

    def _correct(self, batch: KVBatchMeta, rewards: Tensor) -> Tensor | None:
        """Whether each answer is right, by the rule of ``algorithm.srpo.correct``; None without one."""
        rule = self.srpo_config.correct_rule
        if rule is None:
            return None
        infos = []
        if rule.function is not None:
            found = tu.get(self._get(batch, "extra_fields"), "extra_fields")
            infos = [(extra or {}).get("reward_extra_info") or {} for extra in found]
        names = dict.fromkeys(name for info in infos for name, value in info.items() if _is_number(value))
        by_function = {name: torch.tensor([_number(info.get(name)) for info in infos]) for name in names}
        return rule(rewards, by_function)

    def _write(
        self,
        batch: KVBatchMeta,
        rollouts: RolloutBatch,
        credited: Credit,
        *,
        advantages: Tensor,
        rewards: Tensor,
        correct: Tensor | None,
    ) -> None:
        """Append the batch to the file that ``algorithm.srpo.rollouts`` names."""
        if self.srpo_config.rollouts is None:
            return
        prompts = self._prompts(batch, skip_special_tokens=True)
        real = [row for row, tag in enumerate(batch.tags) if not tag.get("is_padding")]
        self._writer.write(
            # With the mask before rejection: what was rejected is written too, with weight 0.
            **record(rollouts, credited, advantages=advantages, correct=correct, rows=real),
            rewards=rewards[real],
            prompts=[prompts[row] for row in real],
            step=self.global_steps,
        )

    @cached_property
    def _watch(self) -> RunWatch:
        return RunWatch(self.srpo_config, self.tokenizer, named="algorithm.srpo.{}")

    @cached_property
    def _writer(self) -> RolloutWriter:
        """The writer of the rollout file; a resumed run continues the file."""
        assert self.srpo_config.rollouts is not None
        return RolloutWriter(
            self.srpo_config.rollouts,
            tokenizer=self.tokenizer,
            tags=self.srpo_config.tags,
            eos_token_id=self._ending,
            correct_by=None if self.srpo_config.correct_rule is None else str(self.srpo_config.correct_rule),
            resume_at=self.global_steps if self.global_steps > 1 else None,
        )

    def _prompts(self, batch: KVBatchMeta, *, skip_special_tokens: bool) -> list[str]:
        rows = self._get(batch, "prompts")["prompts"].unbind()
        return [self.tokenizer.decode(row.tolist(), skip_special_tokens=skip_special_tokens) for row in rows]

    @property
    def _old_log_probs_are_the_rollouts(self) -> bool:
        """In bypass mode old_log_probs are the rollout engine's, which differ by more than many contrasts do."""
        correction = self.config.algorithm.get("rollout_correction", None)
        return bool(correction and correction.get("bypass_mode", False))

    @property
    def _engine_tells(self) -> bool:
        """Whether the rollout engine wrote the log-probs of what it sampled."""
        return bool(self.config.actor_rollout_ref.rollout.get("calculate_log_probs", False))

    def _get(self, batch: KVBatchMeta, *fields: str) -> TensorDict:
        return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(fields))

    def _put(self, batch: KVBatchMeta, fields: dict[str, Tensor]) -> KVBatchMeta:
        data = TensorDict(fields, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=data)


@register_trainer("srpo")
class SRPOTrainer(SRPOMixin, PPOTrainerSync):
    """``trainer.v1.trainer_mode=srpo``."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or getattr(value, "shape", None) == ()


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan


def _of_response(advantages: Tensor, mask: Tensor) -> Tensor:
    """The one advantage of each response, from where verl wrote it; 0 for a response without tokens."""
    first = mask.int().argmax(dim=1, keepdim=True)
    return torch.where(mask.any(dim=1), advantages.gather(1, first)[:, 0], 0.0)
