"""verl's worker with one more method: the log-probs of its rows in the contexts that SRPO contrasts."""

from typing import Any

import torch
from tensordict import NonTensorData, TensorDict
from tensordict.tensorclass import NonTensorStack
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.profiler import DistProfiler
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import response_from_nested

from srpo_core import SRPOConfig
from srpo_core.batch import ending_ids, prompt_id
from srpo_core.pixel_values import corrupt_rows, image_facts, vision_patch_size
from srpo_verl.upstream import check_attributes
from srpo_verl.views import moved_positions, nested, refuse_per_token_inputs

__all__ = ["SRPOWorker", "changed_rows"]


class SRPOWorker(ActorRolloutRefWorker):
    """``ActorRolloutRefWorker``; the actor's engine, micro-batches, temperature and precision serve every context."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def setup_srpo(self, config: SRPOConfig) -> tuple[bool, tuple[int, ...]]:
        """Keep the options, and find out before the first rollout whether images can be corrupted.

        Returns:
            Whether the model takes images, and the token ids that end a response.

        Raises:
            ValueError: If the processor does not say what the corruption needs.
        """
        check_attributes("worker", self)
        self.srpo_config, model = config, self.actor.model_config
        self.srpo_images = image_facts(model.processor)
        self.srpo_videos = image_facts(getattr(model.processor, "video_processor", None))
        self.srpo_patch = vision_patch_size(model.hf_config)
        if self.srpo_images is not None:
            self._corrupt([{"pixel_values": torch.zeros(1, 3, 28, 28)}], [0], step=0)
        return self.srpo_images is not None, ending_ids(model.tokenizer, model.generation_config)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    @DistProfiler.annotate(color="olive", role="srpo_log_probs")
    def compute_srpo_log_probs(self, data: TensorDict) -> TensorDict | None:
        """Log-probs of this rank's rows in each view, under ``srpo_<view>_log_probs``, [rows, response tokens].

        Args:
            data: verl's rows; ``srpo_<view>_responses`` and ``srpo_<view>_sources`` of each view that changes them;
                ``srpo_views``, the image of each view by the view's name; ``srpo_step``.

        Returns:
            The log-probs; in ``srpo_images``, how many images each row has and how many of them did not change; and in
            ``srpo_prompt_ids``, the identity of its prompt and images.
        """
        step, views = tu.pop(data, "srpo_step"), tu.pop(data, "srpo_views")
        tu.maybe_fix_3d_position_ids(data)
        corrupted, counts, prompts = self._corrupted(data, step)
        outputs = {}
        # Every rank runs the same passes in the same order, whatever its rows hold: the engine's collectives match.
        for name, image in views.items():
            rows = changed_rows(data, name) if f"srpo_{name}_responses" in data else data.clone(recurse=False)
            if image == "corrupted":
                rows["multi_modal_inputs"] = NonTensorStack(*corrupted)
            outputs[f"srpo_{name}_log_probs"] = self._score(rows)
        if any(output is None for output in outputs.values()):  # not the rank that answers for its group
            return None
        told = {"srpo_images": counts, "srpo_prompt_ids": torch.tensor(prompts)}
        return TensorDict(outputs | told, batch_size=len(data))

    def _corrupted(self, data: TensorDict, step: int) -> tuple[list[dict[str, Any]], Tensor, list[int]]:
        rows = multi_modal_rows(data)
        refuse_per_token_inputs(rows)
        prompts = [prompt_id(prompt, row) for prompt, row in zip(data["prompts"].unbind(), rows, strict=True)]
        return *self._corrupt(rows, prompts, step=step), prompts

    def _corrupt(
        self, rows: list[dict[str, Any]], prompts: list[int], *, step: int
    ) -> tuple[list[dict[str, Any]], Tensor]:
        return corrupt_rows(
            rows,
            prompts,
            self.srpo_config,
            self.srpo_images,
            step=step,
            video_facts=self.srpo_videos,
            patch_size=self.srpo_patch,
        )

    def _score(self, data: TensorDict) -> Tensor | None:
        mask = data["response_mask"]
        output = self.actor.infer_batch(data)
        return None if output is None else response_from_nested(output["log_probs"], mask).cpu()


def multi_modal_rows(data: TensorDict) -> list[dict[str, Any]]:
    """``multi_modal_inputs`` as plain dicts, empty for rows without images."""
    if "multi_modal_inputs" not in data:
        return [{} for _ in range(len(data))]
    return [(row.data if isinstance(row, NonTensorData) else row) or {} for row in data["multi_modal_inputs"]]


def changed_rows(data: TensorDict, view: str) -> TensorDict:
    """The rows with the responses of the view instead of their own, as verl would have made them."""
    data = data.clone(recurse=False)
    prompts, responses = data["prompts"].unbind(), data[f"srpo_{view}_responses"].unbind()
    rows = zip(data["position_ids"].unbind(), prompts, data[f"srpo_{view}_sources"].unbind(), strict=True)
    mask = nested([torch.ones_like(response) for response in responses])
    data.update(
        {
            "responses": data[f"srpo_{view}_responses"],
            "response_mask": mask,
            "loss_mask": mask,
            "input_ids": nested([torch.cat(pair) for pair in zip(prompts, responses, strict=True)]),
            "position_ids": nested([moved_positions(old, len(prompt), sources) for old, prompt, sources in rows]),
        }
    )
    return data
