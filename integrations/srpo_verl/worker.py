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

from srpo_core import SRPOConfig, corrupt_pixel_values
from srpo_verl.views import ViewNames, corrupt_rows, image_facts, moved_positions, refuse_per_token_inputs, view_names

__all__ = ["SRPOWorker", "changed_rows"]


class SRPOWorker(ActorRolloutRefWorker):
    """``ActorRolloutRefWorker``; the actor's engine, micro-batches, temperature and precision serve every context."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def setup_srpo(self, config: SRPOConfig) -> list[int]:
        """Keep the options, and find out before the first rollout whether images can be corrupted.

        Returns:
            The token ids that end a response, by the model's generation config.

        Raises:
            ValueError: If the processor does not say what the corruption needs.
        """
        self.srpo_config = config
        self.srpo_images = image_facts(self.actor.model_config.processor)
        if self.srpo_images is not None:
            corrupt_pixel_values(
                torch.zeros(0, 3, 1, 1),
                prompt_ids=torch.zeros(0, dtype=torch.int64),
                kind=config.corruption,
                strength=config.corruption_strength,
                **self.srpo_images._asdict(),
            )
        ends = getattr(self.actor.model_config.generation_config, "eos_token_id", None)
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    @DistProfiler.annotate(color="olive", role="srpo_log_probs")
    def compute_srpo_log_probs(self, data: TensorDict) -> TensorDict | None:
        """Log-probs of this rank's rows, each under ``srpo_*_log_probs``, [rows, response tokens].

        Args:
            data: verl's rows, and ``srpo_responses`` and ``srpo_sources``: the changed responses; for a use score the
                same of each span of the perception, left out. Beside them ``srpo_step``, and ``srpo_original``: whether
                the unchanged rows are scored too.
        """
        step, with_original = tu.pop(data, "srpo_step"), tu.pop(data, "srpo_original")
        tu.maybe_fix_3d_position_ids(data)
        images, counts = self._corrupted(data, step)
        counterfactual, *spans = view_names(self.srpo_config)
        with_changed = changed_rows(data, counterfactual)
        if self.srpo_config.counterfactual_image == "corrupted":
            with_changed["multi_modal_inputs"] = NonTensorStack(*images)
        corrupted = data.clone(recurse=False)
        corrupted["multi_modal_inputs"] = NonTensorStack(*images)
        # Every rank runs the same passes in the same order, whatever its rows hold: the engine's collectives match.
        outputs = {
            "srpo_corrupted_log_probs": self._score(corrupted),
            counterfactual.log_probs: self._score(with_changed),
            **{view.log_probs: self._score(changed_rows(data, view)) for view in spans},
        }
        if with_original:
            outputs["srpo_original_log_probs"] = self._score(data)
        if any(output is None for output in outputs.values()):  # not the rank that answers for its group
            return None
        return TensorDict({**outputs, "srpo_images": counts}, batch_size=len(data))

    def _corrupted(self, data: TensorDict, step: int) -> tuple[list[dict[str, Any]], Tensor]:
        rows = multi_modal_rows(data)
        refuse_per_token_inputs(rows)
        return corrupt_rows(rows, data["prompts"].unbind(), self.srpo_config, self.srpo_images, step=step)

    def _score(self, data: TensorDict) -> Tensor | None:
        mask = data["response_mask"]
        output = self.actor.infer_batch(data.clone(recurse=False))  # the engine writes its settings into what it gets
        return None if output is None else response_from_nested(output["log_probs"], mask).cpu()


def multi_modal_rows(data: TensorDict) -> list[dict[str, Any]]:
    """``multi_modal_inputs`` as plain dicts, empty for rows without images."""
    if "multi_modal_inputs" not in data:
        return [{} for _ in range(len(data))]
    return [(row.data if isinstance(row, NonTensorData) else row) or {} for row in data["multi_modal_inputs"]]


def changed_rows(data: TensorDict, view: ViewNames) -> TensorDict:
    """The rows with the view's responses in the place of their own, as verl would have made them."""
    data = data.clone(recurse=False)
    prompts, responses = data["prompts"].unbind(), data[view.responses].unbind()
    rows = zip(data["position_ids"].unbind(), prompts, data[view.sources].unbind(), strict=True)
    mask = _nested([torch.ones_like(response) for response in responses])
    data.update(
        {
            "responses": data[view.responses],
            "response_mask": mask,
            "loss_mask": mask,
            "input_ids": _nested([torch.cat(pair) for pair in zip(prompts, responses, strict=True)]),
            "position_ids": _nested([moved_positions(old, len(prompt), sources) for old, prompt, sources in rows]),
        }
    )
    return data


def _nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
