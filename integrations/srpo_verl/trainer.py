"""verl's synchronous trainer with weighted advantages. The driver sees token ids and log-probs, never pixels."""

import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainer, PPOTrainerSync, register_trainer
from verl.utils import tensordict_utils as tu
from verl.utils.debug import marked_timer
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import response_to_nested

from srpo_core import (
    CounterfactualResponses,
    RoleAdvantages,
    Segmentation,
    SpanCounterfactuals,
    counterfactual_responses,
    segment_responses,
    span_counterfactuals,
    srpo_advantages,
)
from srpo_core.rollouts import RolloutWriter
from srpo_verl.options import check_config, rollouts_path
from srpo_verl.views import source_tokens, view_names
from srpo_verl.worker import SRPOWorker

__all__ = ["SRPOMixin", "SRPOTrainer"]

logger = logging.getLogger(__name__)

#: What a worker fetches for the extra passes.
_ROW_FIELDS = ("prompts", "responses", "input_ids", "position_ids", "response_mask", "loss_mask", "multi_modal_inputs")


class Rollouts(NamedTuple):
    """A batch of responses, right-padded, before rejection may shrink its mask."""

    token_ids: Tensor
    mask: Tensor
    group_ids: Tensor
    segmentation: Segmentation
    changed: CounterfactualResponses
    without: SpanCounterfactuals | None


# The mixin reads what a trainer has.
_Trainer = PPOTrainer if TYPE_CHECKING else object


class SRPOMixin(_Trainer):
    """Give to a trainer of ``verl.trainer.ppo.v1``: its other passes a batch, then GRPO's advantages, weighted."""

    base_mode = "sync"
    _rollouts_path: str | None = None
    _writer: RolloutWriter | None = None

    def __init__(self, config: DictConfig) -> None:
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        options = check_config(plain)
        if options is None:
            raise ValueError("SRPO's trainer needs trainer.v1.trainer_mode=srpo")
        self.srpo_config = options
        self._rollouts_path = rollouts_path(plain)
        # verl compares this string with "sync" in six places: under another name it would turn asynchronous.
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.base_mode
        super().__init__(config)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role, remote in self.role_worker_mapping.items():
            if remote.__ray_metadata__.modified_class.__name__ == ActorRolloutRefWorker.__name__:
                self.role_worker_mapping[role] = ray.remote(SRPOWorker)

    def _setup(self) -> None:
        super()._setup()
        if not hasattr(self.actor_rollout_wg, "setup_srpo"):
            raise RuntimeError(
                "SRPO's worker was not started in the place of verl's ActorRolloutRefWorker, so there would be no "
                f"SRPO: this verl ({version('verl')}) is not one that srpo_verl knows (>=0.9.1,<0.10)"
            )
        ends = self.actor_rollout_wg.setup_srpo(self.srpo_config)[0]
        self._end_ids = sorted({self.tokenizer.eos_token_id, *ends})
        logger.warning("SRPO is active (%s), verl %s: %s", type(self).__name__, version("verl"), self.srpo_config)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        with marked_timer("srpo", self.timing_raw, color="olive"):
            rollouts = self._read_rollouts(batch)
            self._score_views(batch, rollouts)
        batch = super()._compute_advantage(batch, metrics)
        return self._weight_advantages(batch, rollouts, metrics)

    def _read_rollouts(self, batch: KVBatchMeta) -> Rollouts:
        """Roles of all tokens, and the changed responses: donors may sit on any rank, so the driver chooses them."""
        data = self._get(batch, "responses", "response_mask", "uid")
        token_ids = data["responses"].to_padded_tensor(self.tokenizer.pad_token_id)
        mask = data["response_mask"].to_padded_tensor(0).bool()
        segmentation = segment_responses(
            token_ids,
            mask,
            self.tokenizer,
            tags=self.srpo_config.tags,
            eos_token_id=self._end_ids,
            answer_role=self.srpo_config.answer_role,
        )
        uids = tu.get(data, "uid")
        numbers = {uid: number for number, uid in enumerate(dict.fromkeys(uids))}
        group_ids = torch.tensor([numbers[uid] for uid in uids])
        changed = counterfactual_responses(
            token_ids,
            segmentation.roles,
            mask,
            kind=self.srpo_config.counterfactual,
            group_ids=group_ids,
            boundary=segmentation.boundary,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        without = None
        if self.srpo_config.use_passes > 0:
            without = span_counterfactuals(
                token_ids,
                segmentation.roles,
                mask,
                spans=self.srpo_config.use_passes,
                boundary=segmentation.boundary,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return Rollouts(token_ids, mask, group_ids, segmentation, changed, without)

    def _score_views(self, batch: KVBatchMeta, rollouts: Rollouts) -> None:
        """Have the workers score every row in its other contexts; the results wait in the TransferQueue."""
        without = () if rollouts.without is None else rollouts.without.responses
        views = {}
        for names, changed in zip(view_names(self.srpo_config), (rollouts.changed, *without), strict=True):
            lengths = changed.attention_mask.sum(dim=1).tolist()
            views[names.responses] = _nested(changed.token_ids, lengths)
            views[names.sources] = _nested(source_tokens(changed), lengths)
        fields = TensorDict(views, batch_size=len(batch))
        stored = tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
        wanted = [*_ROW_FIELDS, *views]
        rows = KVBatchMeta(
            keys=batch.keys,
            tags=batch.tags,
            partition_id=batch.partition_id,
            fields=[field for field in wanted if stored.fields is None or field in stored.fields],
            extra_info={
                "srpo_step": self.global_steps,
                "srpo_original": self._old_log_probs_are_the_rollouts,
                "calculate_entropy": False,
                "compute_loss": False,
                "temperature": self.config.actor_rollout_ref.rollout.temperature,
            },
        )
        try:
            self.actor_rollout_wg.compute_srpo_log_probs(rows)
        except ray.exceptions.RayTaskError as error:
            # Without the chain the cause is what the run's error begins with, not ten frames of Ray.
            raise RuntimeError(f"SRPO's passes failed in a worker: {error.cause!r}\n{error}") from None

    def _weight_advantages(self, batch: KVBatchMeta, rollouts: Rollouts, metrics: dict[str, Any]) -> KVBatchMeta:
        old_key = "srpo_original_log_probs" if self._old_log_probs_are_the_rollouts else "old_log_probs"
        keys = (old_key, "srpo_corrupted_log_probs", *(view.log_probs for view in view_names(self.srpo_config)))
        data = self._get(batch, *keys, "srpo_images", "advantages", "response_mask")
        old, corrupted, counterfactual, *spans = (data[key].to_padded_tensor(0.0).float() for key in keys)
        advantages = data["advantages"].to_padded_tensor(0.0).float()
        # Nested, as TransferQueue returns whatever has more than one number a row.
        images, same = torch.stack(data["srpo_images"].unbind()).unbind(dim=1)
        if images.any() and torch.equal(images, same):
            raise RuntimeError(
                f"algorithm.srpo.corruption={self.srpo_config.corruption!r} left all {int(images.sum())} images as "
                "they were, so no token can depend on them: raise algorithm.srpo.corruption_strength or choose another "
                "kind"
            )
        # Rejection may have shrunk it: a trajectory's weights have mean one over what is left to train on.
        mask = data["response_mask"].to_padded_tensor(0).bool()
        # Where there is no image the contrast is 0, not the noise between two passes.
        corrupted = torch.where(images[:, None] > 0, corrupted, old)
        counterfactual = rollouts.changed.carry_back(counterfactual, old)
        roles, use = rollouts.segmentation.roles, None
        if rollouts.without is not None:
            use = rollouts.without.use(spans, old, roles, mask, clip=self.srpo_config.score_clip)
        credit = srpo_advantages(
            old,
            corrupted,
            counterfactual,
            roles,
            _of_response(advantages, mask),
            mask,
            broken=rollouts.segmentation.broken,
            perception_use=use,
            **self.srpo_config.advantage_options(step=self.global_steps),
        )
        if self._rollouts_path is not None:
            self._write(batch, rollouts, credit, (old, corrupted, counterfactual), _of_response(advantages, mask))
        weighted = response_to_nested(advantages * credit.weights, data["response_mask"])
        batch = tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict({"advantages": weighted}, batch_size=len(batch)),
        )
        if batch.fields is not None:  # the update needs none of ours
            batch.fields = [field for field in batch.fields if not field.startswith("srpo_")]
        metrics.update({f"srpo/{name}": value.item() for name, value in credit.metrics.items()})
        metrics["srpo/corruption/unchanged/mean"] = (same.sum() / images.sum().clamp(min=1)).item()
        metrics["srpo/counterfactual/fraction"] = _share_changed(rollouts.changed, mask)
        return batch

    def _write(
        self,
        batch: KVBatchMeta,
        rollouts: Rollouts,
        credit: RoleAdvantages,
        log_probs: tuple[Tensor, Tensor, Tensor],
        advantages: Tensor,
    ) -> None:
        """Append the batch to the file of ``algorithm.srpo.rollouts``; a resumed run goes on with it."""
        assert self._rollouts_path is not None
        if self._writer is None:
            self._writer = RolloutWriter(
                self._rollouts_path,
                tokenizer=self.tokenizer,
                tags=self.srpo_config.tags,
                eos_token_id=self._end_ids,
                mode="append" if self.global_steps > 1 else "replace",
            )
        data = self._get(batch, "rm_scores", "prompts")
        prompts = [self.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in data["prompts"].unbind()]
        rewards = torch.stack([row.sum() for row in data["rm_scores"].unbind()])
        real = [row for row, tag in enumerate(batch.tags) if not tag.get("is_padding")]
        swapped = self.srpo_config.counterfactual == "swap"
        self._writer.write(
            rollouts.token_ids[real],
            rollouts.mask[real],  # also what was rejected since: its weight is 0
            old_log_probs=log_probs[0][real],
            corrupted_log_probs=log_probs[1][real],
            counterfactual_log_probs=log_probs[2][real],
            roles=rollouts.segmentation.roles[real],
            broken=rollouts.segmentation.broken[real],
            visual_dependency=credit.visual_dependency[real],
            perception_consistency=credit.perception_consistency[real],
            weights=credit.weights[real],
            rewards=rewards[real].float(),
            advantages=advantages[real],
            group_ids=rollouts.group_ids[real],
            donors=rollouts.changed.donors[real] if swapped else None,
            prompts=[prompts[row] for row in real],
            step=self.global_steps,
        )

    @property
    def _old_log_probs_are_the_rollouts(self) -> bool:
        """In bypass mode old_log_probs are the rollout engine's, which differ by more than many contrasts do."""
        correction = self.config.algorithm.get("rollout_correction", None)
        return bool(correction and correction.get("bypass_mode", False))

    def _get(self, batch: KVBatchMeta, *fields: str) -> TensorDict:
        return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(fields))


@register_trainer("srpo")
class SRPOTrainer(SRPOMixin, PPOTrainerSync):
    """``trainer.v1.trainer_mode=srpo``."""


def _nested(values: Tensor, lengths: list[int]) -> Tensor:
    rows = [row[:length] for row, length in zip(values, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _of_response(advantages: Tensor, mask: Tensor) -> Tensor:
    """The one advantage of each response, from where verl wrote it; 0 for a response without tokens."""
    first = mask.int().argmax(dim=1, keepdim=True)
    return torch.where(mask.any(dim=1), advantages.gather(1, first)[:, 0], 0.0)


def _share_changed(changed: CounterfactualResponses, mask: Tensor) -> float:
    """Share of responses whose perception was swapped or dropped."""
    has_moved = ((changed.positions < 0) & mask).any(dim=1)
    return (has_moved.sum() / mask.any(dim=1).sum().clamp(min=1)).item()
