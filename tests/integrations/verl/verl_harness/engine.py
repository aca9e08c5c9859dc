"""Test only: in the place of the rollout engine, scripted rollouts; and a record of what SRPO moved and made.

Loaded by ``VERL_USE_EXTERNAL_MODULES`` after the platform. The command line names ``ScriptedRollouts`` as its agent
loop. ``SRPO_VERL_RECORD`` names a folder for the record; ``SRPO_VERL_FAIL_WORKER`` breaks the worker.
"""

import json
import os
import pathlib
from typing import Any

import torch
import transfer_queue as tq
import transformers
import verl.trainer.ppo.v1.trainer_base as trainer_base
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_harness import rollouts, tiny_vlm


class _Nothing:
    """A rollout server, and the way weights go to it, that are not there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    @classmethod
    def create_empty(cls, *args: Any, **kwargs: Any) -> "_Nothing":
        return cls()

    def get_replicas(self) -> list[Any]:
        return []

    def get_client(self) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


trainer_base.LLMServerManager = _Nothing
trainer_base.CheckpointEngineManager = _Nothing
trainer_base.PPOTrainer._enable_hybrid_replicas = False  # the worker builds no rollout engine

transformers.AutoProcessor.from_pretrained = tiny_vlm.load_processor


class ScriptedRollouts:
    """verl's agent loop manager: answers a batch of prompts by putting rows into the TransferQueue."""

    @classmethod
    def create(cls, config: Any, **kwargs: Any) -> "ScriptedRollouts":
        from verl.utils.tokenizer import hf_processor

        self = cls()
        self.n = config.actor_rollout_ref.rollout.n
        self.uneven = bool(config.get("scripted_uneven", False))
        path = config.actor_rollout_ref.model.path
        self.processor = hf_processor(path)
        self.tokenizer = self.processor.tokenizer
        self.model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(path).eval()
        return self

    def generate_sequences(self, prompts: Any) -> None:
        step = int(_plain(prompts["global_steps"]))
        for row in range(len(prompts)):
            uid, index = _plain(prompts["uid"][row]), int(_plain(prompts["index"][row]))
            keys, fields, tags = [], [], []
            # Uneven: verl pads the batch with synthetic rows.
            for session in range(self.n - (self.uneven and row == 0)):
                made = rollouts.rollout(index, step, session, self.tokenizer, self.processor, self.model)
                lengths = {f"{name}_len": len(made[key]) for name, key in _LENGTHS.items()}
                keys.append(f"{uid}_{session}_0")
                fields.append({"uid": uid, **made})
                versions = {"min_global_steps": step - 1, "max_global_steps": step - 1}
                tags.append({"status": "success", "global_steps": step, **lengths, **versions})
            tq.kv_batch_put(keys=keys, fields=list_of_dict_to_tensordict(fields), tags=tags, partition_id="train")
            tq.kv_put(key=uid, partition_id="train", tag={"status": "finished"})


_LENGTHS = {"prompt": "prompts", "response": "responses", "seq": "input_ids"}


def _plain(value: Any) -> Any:
    value = getattr(value, "data", value)
    return value.item() if isinstance(value, torch.Tensor) else value


class _Watched:
    """TransferQueue as SRPO's driver code sees it: every access is written down."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.log = folder / "driver_traffic.jsonl"

    def _write(self, way: str, data: Any) -> None:
        entry = {"way": way, "fields": sorted(data.keys()), "bytes": data.bytes() if hasattr(data, "bytes") else None}
        with self.log.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def kv_batch_put(self, **kwargs: Any) -> Any:
        self._write("put", kwargs["fields"])
        return tq.kv_batch_put(**kwargs)

    def kv_batch_get(self, **kwargs: Any) -> Any:
        data = tq.kv_batch_get(**kwargs)
        self._write("get", data)
        return data


def _record(folder: pathlib.Path) -> None:
    """Write down what SRPO moved through the driver, and each step's rollouts with the advantages made of them."""
    import srpo_verl.trainer as adapter

    folder.mkdir(parents=True, exist_ok=True)
    adapter.tq = _Watched(folder)
    weight_advantages = adapter.SRPOMixin._weight_advantages

    def recorded(self: Any, batch: Any, *arguments: Any) -> Any:
        plain = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["advantages"])
        batch = weight_advantages(self, batch, *arguments)
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id)
        names = [name for name in data.keys() if isinstance(data[name], torch.Tensor)]  # noqa: SIM118
        rows = {name: [row.clone() for row in data[name].unbind()] for name in names if name != "position_ids"}
        if data["position_ids"].dim() == 3:
            data["position_ids"]._ragged_idx = 2
        rows["position_ids"] = [row.clone() for row in data["position_ids"].unbind()]
        rows["plain_advantages"] = [row.clone() for row in plain["advantages"].unbind()]
        rows["uid"] = [_plain(uid) for uid in data["uid"]]
        rows["multi_modal_inputs"] = [dict(_plain(row) or {}) for row in data["multi_modal_inputs"]]
        rows["is_padding"] = [bool(tag.get("is_padding")) for tag in batch.tags]
        torch.save(rows, folder / f"step_{self.global_steps}.pt")
        return batch

    adapter.SRPOMixin._weight_advantages = recorded


def _fail_worker() -> None:
    """The worker breaks in the middle of SRPO's passes."""
    from srpo_verl.worker import SRPOWorker

    def broken(self: Any, *args: Any) -> Any:
        raise ValueError("the images of this test are square")

    SRPOWorker._corrupted = broken


if "SRPO_VERL_FAIL_WORKER" in os.environ:
    _fail_worker()
if "SRPO_VERL_RECORD" in os.environ:
    _record(pathlib.Path(os.environ["SRPO_VERL_RECORD"]))
