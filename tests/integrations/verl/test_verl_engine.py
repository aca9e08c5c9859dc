"""The adapter in one process: verl's real FSDP2 engine, its loss and its trainer's steps; a dictionary for the queue.

Every log-prob is compared with the model of transformers scoring the row alone, unpadded, its positions computed anew.
"""

import contextlib
import copy
import functools
import os
import pathlib
import re
import types

import pytest
import torch
import verl.trainer.ppo.v1.trainer_base as trainer_base
import verl.utils.transferqueue_utils
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict
from srpo_verl import trainer as adapter
from srpo_verl.options import ESTIMATORS, LOSS_MODES, VerlOptions
from srpo_verl.proof import Proof
from srpo_verl.worker import SRPOWorker
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from transfer_queue import KVBatchMeta
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import Qwen2_5_VLModel
from typer.testing import CliRunner
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl_harness import rollouts, tiny_vlm
from verl_harness.alone import changed_alone, padded, reliance_alone, score_alone, spans_alone

from srpo_core import LossOptions, SRPOConfig, grpo_loss, srpo_advantages
from srpo_core.batch import MAIN_METRICS, prompt_id
from srpo_core.cli.app import app
from srpo_core.engine_gap import ENGINE_METRICS
from srpo_core.pixel_values import corrupt_rows
from srpo_core.rollouts import ScoringOptions, read_rollouts, score_rollouts

PROMPTS, N = 4, 4
EXAMPLES = pathlib.Path(__file__).parents[3] / "docs" / "examples"
CONFIG_DIR = os.path.join(os.path.dirname(os.path.dirname(trainer_base.__file__)), "..", "config")


# The parts: an engine, the same model alone, rows, and a queue.


class Parts(types.SimpleNamespace):
    """The engine's worker, the model of transformers with the same weights, tokenizer and processor."""


def _module(name):
    return {"": Qwen2_5_VLForConditionalGeneration, "model": Qwen2_5_VLModel}[name]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_vlm.build(folder)
    # verl replaces the forward of the classes; the model that scores alone keeps transformers' own.
    alone = {name: vars(_module(name))["forward"] for name in ("", "model")}
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29761", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    from verl.utils.tokenizer import hf_processor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.AutoProcessor.from_pretrained", tiny_vlm.load_processor)
        model_config = HFModelConfig(
            path=str(folder),
            use_remove_padding=False,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        )
        processor = hf_processor(str(folder))
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        use_torch_compile=False,
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        micro_batch_size_per_gpu=8,
        infer_micro_batch_size_per_gpu=8,
        use_dynamic_bsz=False,
        dtype="float32",
    )
    worker = TrainingWorker(
        config=TrainingWorkerConfig(
            model_type="language_model",
            model_config=model_config,
            engine_config=engine,
            optimizer_config=FSDPOptimizerConfig(lr=0.0, weight_decay=0.0, total_training_steps=10),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    for name, forward in alone.items():
        model.get_submodule(name).forward = types.MethodType(forward, model.get_submodule(name))
    yield Parts(worker=worker, model=model, processor=processor, tokenizer=processor.tokenizer, folder=folder)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def rows(parts):
    """Fifteen rollouts of four prompts (one image, two images, none, one) and verl's padding row."""

    def scored(row):
        return row | {"old_log_probs": one_by_one(parts, row)}

    made = [
        {"uid": f"prompt{index}"} | rollouts.rollout(index, 1, session, parts.tokenizer, parts.processor, parts.model)
        for index in range(PROMPTS)
        for session in range(N)
    ][:-1]
    padding, _ = construct_minimal_padding_template(made[0], {}, parts.tokenizer.eos_token_id)
    return [scored(row) for row in [*made, padding | {"uid": "pad"}]]


class Queue:
    """What is used of TransferQueue: rows by key, fields handed out as it hands them out."""

    def __init__(self, rows):
        self.rows = {f"{row['uid']}_{number}_0": dict(row) for number, row in enumerate(rows)}
        self.watched = []

    def kv_batch_put(self, *, keys, partition_id, fields):
        for name in fields.keys():  # noqa: SIM118
            for key, value in zip(keys, fields[name].unbind(), strict=True):
                self.rows[key][name] = value
        return self.meta(keys)

    def kv_batch_get(self, *, keys, partition_id, select_fields):
        self.watched.append(tuple(select_fields))
        return self.batch(keys, select_fields)

    def batch(self, keys, names):
        names = [name for name in names if all(name in self.rows[key] for key in keys)]
        return nested_batch([{name: self.rows[key][name] for name in names} for key in keys])

    def meta(self, keys):
        fields = [name for name in self.rows[keys[0]] if all(name in self.rows[key] for key in keys)]
        tags = [{"is_padding": key.startswith("pad")} for key in keys]
        return KVBatchMeta(keys=list(keys), tags=tags, partition_id="train", fields=fields)


def nested_batch(rows):
    data = TensorDict({}, batch_size=len(rows))
    for name in rows[0]:
        values = [row[name] for row in rows]
        if not isinstance(values[0], torch.Tensor):
            data[name] = NonTensorStack(*values)
        elif values[0].ndim:
            data[name] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
        else:
            data[name] = torch.stack(values)
    return data


class Workers:
    """The worker group: gives each of its workers a part of the rows, as verl's dispatch does."""

    def __init__(self, queue, worker, parts_of_batch):
        self.queue, self.worker, self.parts = queue, worker, parts_of_batch

    def compute_srpo_log_probs(self, meta):
        for keys in torch.arange(len(meta)).chunk(self.parts):
            names = [meta.keys[row] for row in keys.tolist()]
            data = self.queue.batch(names, meta.fields)
            tu.assign_non_tensor(data, **meta.extra_info)
            self.queue.kv_batch_put(keys=names, partition_id="train", fields=self.worker.compute_srpo_log_probs(data))


@functools.cache
def _composed(*overrides):
    with initialize_config_dir(config_dir=os.path.abspath(CONFIG_DIR), version_base=None):
        return compose(
            config_name="ppo_trainer",
            overrides=[
                "trainer.v1.trainer_mode=srpo",
                "algorithm.adv_estimator=grpo",
                "actor_rollout_ref.actor.strategy=fsdp2",
                *overrides,
            ],
        )


def verl_config(*overrides):
    return copy.deepcopy(_composed(*overrides))


def srpo_worker(parts, config):
    worker = SRPOWorker.__new__(SRPOWorker)
    worker.actor = parts.worker
    worker.answers = worker.setup_srpo(config)
    return worker


class Step(types.SimpleNamespace):
    """What one step of the trainer left behind, row by row."""


@pytest.fixture(scope="module")
def known_steps():
    return {}


@pytest.fixture
def run_step(parts, rows, known_steps, monkeypatch):
    """One ``_compute_advantage`` of the adapter over verl's own, with overrides and a number of workers."""

    def run(*overrides, workers=1, trainer_class=adapter.SRPOTrainer, changes=None):
        question = (overrides, workers, trainer_class)
        if changes is None and question in known_steps:
            return known_steps[question]
        config = verl_config(*overrides)
        queue = Queue(rows)
        for key, row in queue.rows.items():
            row.update({} if changes is None else changes(key, row))
        for module in (adapter, trainer_base):
            monkeypatch.setattr(module, "tq", queue)
        trainer = trainer_class.__new__(trainer_class)
        trainer.config, trainer.global_steps = config, 1
        trainer.tokenizer = parts.tokenizer
        if issubclass(trainer_class, adapter.SRPOMixin):
            trainer.srpo_config = adapter.check_config(OmegaConf.to_container(config, resolve=True))
            trainer._proof = Proof()
            worker = srpo_worker(parts, trainer.srpo_config)
            trainer._has_images, trainer._ending = worker.answers
            trainer.actor_rollout_wg = Workers(queue, worker, workers)
        metrics = {}
        meta = queue.meta(list(queue.rows))
        queue.watched.clear()
        result = trainer._compute_advantage(meta, metrics)
        step = Step(
            rows=list(queue.rows.values()),
            metrics=metrics,
            meta=result,
            watched=queue.watched,
            trainer=trainer,
            queue=queue,
        )
        if changes is None:
            known_steps[question] = step
        return step

    return run


PlainTrainer = trainer_base.get_trainer_cls("sync")


def one_by_one(parts, row, response=None, pixels=None):
    return score_alone(parts.model, parts.processor, row, response=response, pixels=pixels)


def mask_of(rows):
    return padded([row["response_mask"] for row in rows]).bool()


# What the workers compute.


@pytest.mark.parametrize("kind", ["swap", "drop"])
def test_changed_responses_score_as_they_do_alone(parts, run_step, kind):
    step = run_step(f"+algorithm.srpo.counterfactual={kind}")
    _, changed = changed_alone(step.rows, parts.tokenizer, SRPOConfig(counterfactual=kind))
    moved = 0
    for number, row in enumerate(step.rows):
        response = changed.token_ids[number][changed.attention_mask[number]]
        assert torch.equal(response, row["srpo_counterfactual_responses"])
        alone = one_by_one(parts, row, response)
        torch.testing.assert_close(row["srpo_counterfactual_log_probs"], alone, atol=1e-5, rtol=0)
        moved += row["uid"] != "pad" and not torch.equal(response, row["responses"])
    assert moved == 13  # all but the two broken ones


def test_responses_without_a_span_score_as_they_do_alone(parts, run_step):
    """The image is the true one, whatever the counterfactual's is."""
    step = run_step("+algorithm.srpo.reliance_spans=3", "+algorithm.srpo.counterfactual_image=corrupted")
    segmentation, _ = changed_alone(step.rows, parts.tokenizer, SRPOConfig())
    spans, shortened = spans_alone(segmentation, step.rows, 3), 0
    for number, row in enumerate(step.rows):
        for k in range(3):
            kept = (spans[number] != k)[: len(row["responses"])]
            response = row["responses"][kept] if row["uid"] != "pad" else row["responses"][:0]
            assert torch.equal(response, row[f"srpo_span_{k}_responses"])
            alone = one_by_one(parts, row, response)
            torch.testing.assert_close(row[f"srpo_span_{k}_log_probs"], alone, atol=1e-5, rtol=0)
            shortened += row["uid"] != "pad" and len(response) < len(row["responses"])
    assert shortened == 39  # all but the two broken ones, three times


def test_no_pass_more_than_is_asked_for(run_step, monkeypatch):
    passes, score = [], SRPOWorker._score
    monkeypatch.setattr(SRPOWorker, "_score", lambda self, data: passes.append(1) or score(self, data))

    def count(*overrides, workers=1):
        passes.clear()
        run_step(*overrides, workers=workers, changes=lambda key, row: {})
        return len(passes)

    assert count() == 2
    assert count("+algorithm.srpo.reliance_spans=3") == 5
    assert count("+algorithm.srpo.reliance_spans=3", workers=2) == 10
    # Where every weight is 1 anyway, no reliance is measured.
    assert count("+algorithm.srpo.reliance_spans=3", "+algorithm.srpo.strength=0") == 2


def test_tool_outputs_stay_as_context(parts, run_step):
    """Tokens of a response that the policy did not sample are read, and neither scored nor weighted."""

    def with_tool(key, row):
        mask = row["response_mask"].clone()
        mask[len(mask) // 2 : len(mask) // 2 + 3] = 0
        return {"response_mask": mask, "loss_mask": mask}

    step = run_step(changes=with_tool)
    _, changed = changed_alone(step.rows, parts.tokenizer, SRPOConfig())
    for number, row in enumerate(step.rows):
        response = changed.token_ids[number][changed.attention_mask[number]]
        torch.testing.assert_close(
            row["srpo_counterfactual_log_probs"], one_by_one(parts, row, response), atol=1e-5, rtol=0
        )
        assert row["advantages"][~row["response_mask"].bool()].abs().sum() == 0


@pytest.mark.parametrize(
    ("layout", "batches"),
    [
        ({"use_remove_padding": True}, [1, 1]),
        ({"use_dynamic_bsz": True, "max_token_len_per_gpu": 512}, [5, 6, 5]),
    ],
    ids=["packed", "dynamic"],
)
def test_other_layouts_of_a_micro_batch_give_the_same(parts, run_step, monkeypatch, layout, batches):
    """Rows packed into one sequence, and micro-batches filled by length: as users train, here with SDPA."""
    usual, seen = run_step(), []
    score, prepare = SRPOWorker._score, parts.worker.engine.prepare_model_inputs

    def score_in_layout(self, data):
        tu.assign_non_tensor(data, **layout)
        seen.clear()
        return score(self, data)

    def prepare_and_watch(*args, **kwargs):
        inputs, rest = prepare(*args, **kwargs)
        seen.append(len(inputs["input_ids"]))
        return inputs, rest

    monkeypatch.setattr(SRPOWorker, "_score", score_in_layout)
    monkeypatch.setattr(parts.worker.engine, "prepare_model_inputs", prepare_and_watch)
    step = run_step(changes=lambda key, row: {})
    assert seen == batches
    for row, before in zip(step.rows, usual.rows, strict=True):
        for key in ("srpo_corrupted_log_probs", "srpo_counterfactual_log_probs"):
            torch.testing.assert_close(row[key], before[key], atol=1e-5, rtol=0)


def test_corrupted_rows_score_as_they_do_alone(parts, run_step):
    step = run_step()
    config = SRPOConfig()
    facts = srpo_worker(parts, config).srpo_images
    images = [row["multi_modal_inputs"] for row in step.rows]
    numbers = [prompt_id(row["prompts"], row["multi_modal_inputs"]) for row in step.rows]
    corrupted, _ = corrupt_rows(images, numbers, config, facts, step=1)
    for row, pixels in zip(step.rows, corrupted, strict=True):
        alone = one_by_one(parts, row, pixels=pixels)
        torch.testing.assert_close(row["srpo_corrupted_log_probs"], alone, atol=1e-5, rtol=0)
        if pixels:
            assert (row["srpo_corrupted_log_probs"] - row["old_log_probs"]).abs().max() > 1e-3


def test_a_counterfactual_may_be_read_with_the_corrupted_image(run_step):
    kept, corrupted = run_step(), run_step("+algorithm.srpo.counterfactual_image=corrupted")
    key = "srpo_counterfactual_log_probs"
    for before, after in zip(kept.rows, corrupted.rows, strict=True):
        differs = not torch.allclose(before[key], after[key], atol=1e-4)
        assert differs == bool(before["multi_modal_inputs"])


# What becomes of the advantages.


def test_weights_are_the_cores_on_the_same_rollouts(parts, run_step):
    step = run_step("+algorithm.srpo.strength=1.5", "+algorithm.srpo.metrics=all")
    plain = run_step(trainer_class=PlainTrainer)
    config, mask = SRPOConfig(strength=1.5), mask_of(step.rows)
    segmentation, changed = changed_alone(step.rows, parts.tokenizer, config)
    old = padded([row["old_log_probs"] for row in step.rows])
    corrupted = padded([row["srpo_corrupted_log_probs"] for row in step.rows])
    counterfactual = padded([row["srpo_counterfactual_log_probs"] for row in step.rows])
    advantages = padded([row["advantages"] for row in plain.rows])
    has_image = torch.tensor([bool(row["multi_modal_inputs"]) for row in step.rows])[:, None]
    expected = srpo_advantages(
        old,
        advantages[:, 0],
        segmentation.roles,
        mask,
        config,
        corrupted_log_probs=torch.where(has_image, corrupted, old),
        counterfactual_log_probs=changed.carry_back(counterfactual, original_log_probs=old),
        broken=segmentation.broken,
    )
    weighted = padded([row["advantages"] for row in step.rows])
    torch.testing.assert_close(weighted, expected.advantages, atol=1e-6, rtol=0)
    assert not torch.allclose(weighted, advantages, atol=1e-3)
    for name, value in expected.metrics.items():
        assert step.metrics[f"srpo/{name}"] == pytest.approx(value.item(), abs=1e-6)


def test_the_main_metrics_are_logged_and_said_in_words(run_step, capsys):
    metrics = run_step("+algorithm.srpo.correct='>=0.5'").metrics
    ours = {name for name in metrics if name.startswith("srpo/")}
    assert ours == {f"srpo/{name}" for name in MAIN_METRICS + ENGINE_METRICS}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "well-formed" in line]
    share = f"perception has {100 * metrics['srpo/tokens/perception/fraction']:.0f} % of the tokens"
    assert re.match(r"step \d+: \d+ of \d+ responses are well-formed", line)
    assert share in line
    run_step("+algorithm.srpo.summary=false")
    assert "well-formed" not in capsys.readouterr().out


def test_all_metrics_have_the_cores_names(run_step):
    metrics = run_step("+algorithm.srpo.metrics=all").metrics
    ours = {name for name in metrics if name.startswith("srpo/")}
    assert {f"srpo/{name}" for name in MAIN_METRICS} - {"srpo/right/fraction"} <= ours
    assert {"srpo/weight/perception/p95", "srpo/broken/fraction", "srpo/score/reasoning/std"} <= ours
    assert all(isinstance(metrics[name], float) for name in ours)
    assert metrics["srpo/corruption/unchanged"] == 0.0
    assert "timing_s/srpo" in metrics


@pytest.mark.parametrize(("spans", "mode", "clip"), [(2, "product", 0.05), (5, "share", 5.0)])
def test_with_reliance_weights_are_the_cores(parts, run_step, spans, mode, clip):
    names = ("reliance_spans", "reliance_mode", "score_clip")
    config = SRPOConfig(**dict(zip(names, (spans, mode, clip), strict=True)))
    step = run_step(*(f"+algorithm.srpo.{name}={getattr(config, name)}" for name in names))
    plain, without = run_step(trainer_class=PlainTrainer), run_step()
    segmentation, changed = changed_alone(step.rows, parts.tokenizer, SRPOConfig())
    roles, mask = segmentation.roles, mask_of(step.rows)
    old, corrupted, counterfactual, *passes = (
        padded([row[key] for row in step.rows])
        for key in (
            "old_log_probs",
            "srpo_corrupted_log_probs",
            "srpo_counterfactual_log_probs",
            *(f"srpo_span_{k}_log_probs" for k in range(spans)),
        )
    )
    has_image = torch.tensor([bool(row["multi_modal_inputs"]) for row in step.rows])[:, None]
    numbers = spans_alone(segmentation, step.rows, spans)
    expected = srpo_advantages(
        old,
        padded([row["advantages"] for row in plain.rows])[:, 0],
        roles,
        mask,
        config,
        corrupted_log_probs=torch.where(has_image, corrupted, old),
        counterfactual_log_probs=changed.carry_back(counterfactual, original_log_probs=old),
        reliance=reliance_alone(old, passes, numbers, roles, mask, config),
    )
    weighted = padded([row["advantages"] for row in step.rows])
    torch.testing.assert_close(weighted, expected.advantages, atol=1e-6, rtol=0)
    assert not torch.allclose(weighted, padded([row["advantages"] for row in without.rows]), atol=0.05)
    assert not [field for field in step.meta.fields if field.startswith("srpo_")]


def test_the_mix_ramps_up_from_nothing(run_step):
    """verl's first step is 1, the ramp's is 0."""
    step, plain = run_step("+algorithm.srpo.mix_warmup_steps=4"), run_step(trainer_class=PlainTrainer)
    for row, before in zip(step.rows, plain.rows, strict=True):
        assert torch.equal(row["advantages"], before["advantages"])


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_the_rollouts_are_written_for_the_srpo_command(parts, run_step, tmp_path, strength):
    path = tmp_path / "rollouts.jsonl"
    step = run_step(f"+algorithm.srpo.rollouts={path}", f"+algorithm.srpo.strength={strength}")
    plain = run_step(f"+algorithm.srpo.strength={strength}")
    rows = [row for row in step.rows if row["uid"] != "pad"]
    written = list(read_rollouts(path))
    assert len(written) == len(rows) == PROMPTS * N - 1
    for line, row, same in zip(written, rows, plain.rows, strict=False):
        mask = row["response_mask"].bool()
        assert torch.equal(row["advantages"], same["advantages"])
        assert line.text == parts.tokenizer.decode(row["responses"][mask])
        assert line.reward == pytest.approx(row["rm_scores"].sum().item(), abs=1e-5)
        credit = torch.tensor(line.weights) * line.advantage
        torch.testing.assert_close(credit, row["advantages"][mask].float(), atol=1e-3, rtol=0)
        recorded = torch.tensor(line.old_log_probs)
        torch.testing.assert_close(recorded, row["old_log_probs"][mask].float(), atol=1e-4, rtol=0)
    for scored in score_rollouts(written, ScoringOptions(SRPOConfig(strength=strength), recompute=True)):
        weights = torch.tensor(scored.rollout.weights)
        torch.testing.assert_close(torch.as_tensor(scored.weights).float(), weights, atol=1e-3, rtol=0)
    for arguments in (
        ["report", str(path), "-o", str(tmp_path / "report.html")],
        ["show", str(path), "--index", "1"],
        ["segment", str(path)],
        ["weights", str(path), "--strength", "0.5"],
    ):
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0, (arguments, shown.output)


def test_a_resumed_run_goes_on_with_its_file(run_step, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    step = run_step(f"+algorithm.srpo.rollouts={path}", changes=lambda key, row: {})

    def run_again(global_steps):
        """As another process does, which has no open file."""
        vars(step.trainer).pop("_writer").close()
        step.trainer.global_steps = global_steps
        step.trainer._compute_advantage(step.queue.meta(list(step.queue.rows)), {})
        return [line.step for line in read_rollouts(path)]

    rows = PROMPTS * N - 1
    assert run_again(2) == [1] * rows + [2] * rows
    assert run_again(2) == [1] * rows + [2] * rows  # stopped before its checkpoint: the step is written again
    assert run_again(1) == [1] * rows  # a new run


@pytest.mark.parametrize("options", [(), ("+algorithm.srpo.reliance_spans=2",)], ids=["srpo", "reliance"])
def test_strength_zero_is_verls_grpo_bit_for_bit(run_step, options):
    step, plain = run_step("+algorithm.srpo.strength=0", *options), run_step(trainer_class=PlainTrainer)
    for weighted, row in zip(step.rows, plain.rows, strict=True):
        assert torch.equal(weighted["advantages"], row["advantages"])
        assert weighted["advantages"].dtype == row["advantages"].dtype


@pytest.mark.parametrize("options", [(), ("+algorithm.srpo.reliance_spans=2",)], ids=["srpo", "reliance"])
def test_weights_do_not_depend_on_the_number_of_workers(run_step, options):
    def responses(step):
        return [row["srpo_counterfactual_responses"].tolist() for row in step.rows]

    one, two = run_step(*options, workers=1), run_step(*options, workers=2)
    for alone, shared in zip(one.rows, two.rows, strict=True):
        torch.testing.assert_close(alone["advantages"], shared["advantages"], atol=1e-5, rtol=0)
    # Donors cross the workers' borders.
    assert responses(one) == responses(two)


def test_no_pixels_travel_through_the_driver(run_step):
    step = run_step("+algorithm.srpo.reliance_spans=1")
    # verl's own access to the rewards is not ours
    ours = [fields for fields in step.watched if "rm_scores" not in fields or "srpo_images" in fields]
    assert len(ours) == 3
    for fields in ours:
        assert set(fields) <= {
            "prompts",
            "responses",
            "response_mask",
            "rollout_log_probs",
            "uid",
            "advantages",
            "old_log_probs",
            "srpo_corrupted_log_probs",
            "srpo_counterfactual_log_probs",
            "srpo_span_0_log_probs",
            "srpo_images",
            "srpo_prompt_ids",
            "rm_scores",
        }


def test_the_update_fetches_nothing_of_srpos(run_step):
    assert "advantages" in run_step().meta.fields
    assert not [field for field in run_step().meta.fields if field.startswith("srpo_")]


def test_pixels_are_not_written_in_place(rows, run_step):
    before = [row["multi_modal_inputs"].get("pixel_values", torch.zeros(1)).clone() for row in rows]
    run_step()
    for pixels, row in zip(before, rows, strict=True):
        assert torch.equal(pixels, row["multi_modal_inputs"].get("pixel_values", torch.zeros(1)))


def test_text_only_rows_have_no_visual_contrast(run_step):
    step = run_step("+algorithm.srpo.counterfactual=drop")
    plain = run_step("+algorithm.srpo.counterfactual=drop", trainer_class=PlainTrainer)
    texts = [number for number, row in enumerate(step.rows) if row["uid"] == "prompt2"]
    for number in texts:
        ratio = step.rows[number]["advantages"] / plain.rows[number]["advantages"]
        inside = ratio[13:16]  # <perception> is 12 tokens
        assert torch.equal(inside, inside[:1].expand(3))


def test_bypass_mode_never_contrasts_with_the_rollout_engine(run_step):
    """Old log-probs are the rollout engine's then: a large offset in them must not reach the weights."""

    def offset(key, row):
        return {"rollout_log_probs": row["rollout_log_probs"] - 3.0}

    bypass, spans = ["algorithm.rollout_correction.bypass_mode=true"], "+algorithm.srpo.reliance_spans=2"
    weighted, usual = run_step(*bypass, spans, changes=offset), run_step(spans)
    for row, other in zip(weighted.rows, usual.rows, strict=True):
        assert "srpo_original_log_probs" in row
        torch.testing.assert_close(row["advantages"], other["advantages"], atol=1e-5, rtol=0)


def test_the_gap_to_the_engine_is_logged_where_the_engine_tells(run_step):
    """The scripted rollouts have the trainer's own log-probs; here 3 nats less."""

    def offset(key, row):
        return {"rollout_log_probs": row["rollout_log_probs"] - 3.0}

    option = "actor_rollout_ref.rollout.calculate_log_probs"
    assert "srpo/engine/gap/mean" not in run_step(f"{option}=false").metrics
    metrics = run_step(f"{option}=true", changes=offset).metrics
    assert metrics["srpo/engine/gap/mean"] == pytest.approx(3.0, abs=1e-3)
    assert metrics["srpo/engine/gap/p95"] == pytest.approx(3.0, abs=1e-3)
    assert metrics["srpo/engine/score/mean"] > 0


def test_rejection_leaves_mean_one_on_what_is_left(run_step):
    """Rollout correction rejects the tokens on which trainer and rollout engine disagree."""

    def disagree(key, row):
        changed = row["rollout_log_probs"].clone()
        changed[::3] -= 4.0
        return {"rollout_log_probs": changed}

    options = [
        "algorithm.rollout_correction.rollout_rs=token_k1",
        "algorithm.rollout_correction.rollout_rs_threshold='0.5_2.0'",
        "algorithm.rollout_correction.rollout_is=token",
        "+algorithm.srpo.reliance_spans=2",
    ]
    step = run_step(*options, changes=disagree)
    plain = run_step(*options, changes=disagree, trainer_class=PlainTrainer)
    checked = 0
    for row, before in zip(step.rows, plain.rows, strict=True):
        left = row["response_mask"].bool()
        assert torch.equal(left, before["response_mask"].bool())
        assert "rollout_is_weights" in row
        assert row["advantages"][~left].abs().sum() == 0
        if row["uid"] != "pad" and before["advantages"][left].abs().sum() > 0:
            assert left.sum() < len(left)
            weights = row["advantages"][left] / before["advantages"][left]
            torch.testing.assert_close(weights.mean(), torch.tensor(1.0), atol=1e-5, rtol=0)
            checked += 1
    assert checked > 5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_give_a_response_one_advantage(run_step, estimator):
    option = f"algorithm.adv_estimator={estimator}"
    step, plain = run_step(option, "+algorithm.srpo.strength=0"), run_step(option, trainer_class=PlainTrainer)
    for row, before in zip(step.rows, plain.rows, strict=True):
        kept = before["advantages"][row["response_mask"].bool()]
        assert torch.equal(kept, kept[:1].expand(len(kept)))
        assert torch.equal(row["advantages"], before["advantages"])


def one_color(key, row):
    pixels = dict(row["multi_modal_inputs"])
    if pixels:
        pixels["pixel_values"] = torch.full_like(pixels["pixel_values"], 0.5)
    return {"multi_modal_inputs": pixels}


def test_a_corruption_that_changes_nothing_in_the_first_batch_ends_the_run(run_step):
    with pytest.raises(ValueError, match=r"corruption='patch_shuffle' left all 15 images of the first batch"):
        run_step("+algorithm.srpo.corruption=patch_shuffle", changes=one_color)


def test_a_corruption_that_changes_nothing_later_is_counted(run_step, monkeypatch):
    monkeypatch.setattr(adapter.RunWatch, "_check", lambda *_: None)
    step = run_step("+algorithm.srpo.corruption=patch_shuffle", changes=one_color)
    assert step.metrics["srpo/corruption/unchanged"] == 1.0


def test_every_batch_is_looked_at(run_step, monkeypatch):
    prompts = []
    monkeypatch.setattr(adapter.RunWatch, "look", lambda self, batch, **found: prompts.append(found["prompts"]))
    step = run_step(changes=lambda key, row: {})
    assert len(prompts) == 1
    assert prompts[0][0].startswith("<|vision_start|><|image_pad|>")  # special tokens and all
    step.trainer._compute_advantage(step.queue.meta(list(step.queue.rows)), {})
    assert len(prompts) == 2


def test_what_counts_as_right_is_named_and_logged(run_step):
    """Of the reward function's extra info, or of the whole score; counted by hand."""

    def told(key, row):
        number = int(key.split("_")[1])
        info = {"acc": float(number % 2 == 0), "note": "text"} if number % 5 else {}
        return {"extra_fields": {"reward_extra_info": info}}

    step = run_step("+algorithm.srpo.correct=acc", changes=told)
    numbers = [int(key.split("_")[1]) for key in step.queue.rows]
    known = [
        number % 2 == 0
        for number, row in zip(numbers, step.rows, strict=True)
        if number % 5 and row["response_mask"].any()
    ]
    assert step.metrics["srpo/right/fraction"] == pytest.approx(sum(known) / len(known))
    step = run_step("+algorithm.srpo.correct='>=0.5'")
    known = [row["rm_scores"].sum().item() >= 0.5 for row in step.rows if row["response_mask"].any()]
    assert step.metrics["srpo/right/fraction"] == pytest.approx(sum(known) / len(known))
    with pytest.raises(ValueError, match="'acd', which should decide what counts as right.*did you mean 'acc'"):
        run_step("+algorithm.srpo.correct=acd", changes=told)


def test_responses_begin_inside_the_block_that_a_prompt_opens(parts, run_step):
    opening = torch.tensor(parts.tokenizer("<perception>", add_special_tokens=False)["input_ids"])

    def moved(key, row):
        """The opening tag, with which every response begins, as the end of the prompt."""
        if not torch.equal(row["responses"][: len(opening)], opening):
            return {}
        cut = {name: row[name][len(opening) :] for name in ("responses", "response_mask") if name in row}
        return cut | {"prompts": torch.cat([row["prompts"], opening])}

    class Opened(adapter.SRPOTrainer):
        def _score_views(self, batch, planned):
            raise StopIteration(self._read_rollouts(batch))

    with pytest.raises(StopIteration) as stopped:
        run_step(changes=moved, trainer_class=Opened)
    batch = stopped.value.value
    assert (batch.open_at_start == 1).sum() >= 10
    opened = (batch.open_at_start == 1) & (batch.segmentation.broken == 0)
    # A response may begin with a space, which says nothing.
    assert (batch.segmentation.roles[opened, 0] == 1).sum() >= 10


# That the weights reach the update.


@pytest.fixture
def updated(monkeypatch):
    """verl's own update, as far as we need it."""
    batches = []
    monkeypatch.setattr(trainer_base.PPOTrainer, "_update_actor", lambda self, batch, metrics: batches.append(batch))
    monkeypatch.setattr(adapter.PPOTrainerSync, "on_step_end", lambda self: batches.append("end"))
    return batches


def test_a_run_says_that_srpo_is_active_when_its_weights_have_reached_the_update(run_step, updated, caplog):
    step = run_step(changes=lambda key, row: {})
    assert "active" not in caplog.text
    step.trainer._update_actor(step.meta, {})
    step.trainer.on_step_end()
    assert updated == [step.meta, "end"]
    assert caplog.text.count("SRPO is active: its weights reached the actor's update in step 1 (verl 0.9") == 1
    # Later steps compare no values, and still know whose advantages they are.
    step.trainer._compute_advantage(step.queue.meta(list(step.queue.rows)), {})
    step.queue.watched.clear()
    step.trainer._update_actor(step.meta, {})
    assert step.queue.watched == []
    assert caplog.text.count("active") == 1


def test_an_update_without_our_advantages_is_refused(run_step, updated):
    step = run_step(changes=lambda key, row: {})
    step.trainer._proof = Proof()
    with pytest.raises(RuntimeError, match=r"did not weight.* knows verl>=0\.9\.1,<0\.10; installed are verl 0\.9"):
        step.trainer._update_actor(step.meta, {})
    assert updated == []


def test_an_update_that_does_not_fetch_advantages_is_refused(run_step, updated):
    step = run_step(changes=lambda key, row: {})
    step.meta.fields.remove("advantages")
    with pytest.raises(RuntimeError, match="did not weight"):
        step.trainer._update_actor(step.meta, {})


def test_advantages_that_were_replaced_before_the_update_are_found(run_step, updated):
    step, plain = run_step(changes=lambda key, row: {}), run_step(trainer_class=PlainTrainer)
    for row, before in zip(step.rows, plain.rows, strict=True):
        row["advantages"] = before["advantages"]
    with pytest.raises(RuntimeError, match="advantages were replaced between SRPO's weights and the actor's update"):
        step.trainer._update_actor(step.meta, {})
    assert updated == []


def test_a_step_without_our_update_ends_the_run(run_step, updated):
    step = run_step(changes=lambda key, row: {})
    with pytest.raises(RuntimeError, match="ended a step without PPOTrainer._update_actor"):
        step.trainer.on_step_end()
    with open_dict(step.trainer.config):
        step.trainer.config.trainer.critic_warmup = 2  # the actor is not trained yet
    step.trainer.on_step_end()
    assert updated == ["end"]


# The loss: verl's own, on weighted advantages.


def older(row):
    """Log-probs of a policy that has moved since: ratios around 1, some beyond the clip."""
    return row["old_log_probs"] - torch.linspace(-0.3, 0.3, len(row["old_log_probs"]))


def train(parts, rows, advantages, mode, **options):
    """verl's engine and loss over one mini-batch; the loss that verl reports and its gradient norm."""
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=N,
        ppo_mini_batch_size=PROMPTS,
        ppo_micro_batch_size_per_gpu=8,
        use_torch_compile=False,
        loss_agg_mode=mode,
        **options,
    )
    parts.worker.set_loss_fn(functools.partial(ppo_loss, config=config))
    fields = ("prompts", "responses", "input_ids", "position_ids", "response_mask", "loss_mask", "multi_modal_inputs")
    data = nested_batch(
        [
            {name: row[name] for name in fields} | {"old_log_probs": older(row), "advantages": advantage}
            for row, advantage in zip(rows, advantages, strict=True)
        ]
    )
    tu.assign_non_tensor(
        data,
        temperature=1.0,
        calculate_entropy=False,
        compute_loss=True,
        global_batch_size=len(rows),
        mini_batch_size=len(rows),
        epochs=1,
        seed=1,
        dataloader_kwargs={"shuffle": False},
    )
    metrics = tu.get(parts.worker.train_mini_batch(data), "metrics")
    return float(torch.tensor(metrics["loss"]).sum()), float(torch.tensor(metrics["grad_norm"]).sum())


_REDUCTIONS = {
    "token-mean": ("token_mean", None),
    "seq-mean-token-sum": ("constant", float(PROMPTS * N)),
    "seq-mean-token-mean": ("sequence_mean", float(PROMPTS * N)),
    "seq-mean-token-sum-norm": ("constant", float(PROMPTS * N) * 256.0),
}


@pytest.mark.parametrize("mode", _REDUCTIONS)
def test_verls_loss_on_weighted_advantages_is_srpos(parts, run_step, mode):
    """Every aggregation of verl, against the core's own loss on the same log-probs."""
    options = {"loss_scale_factor": 256} if mode.endswith("norm") else {}
    step, plain = run_step("+algorithm.srpo.strength=3"), run_step(trainer_class=PlainTrainer)
    mask = mask_of(step.rows)
    old = padded([row["old_log_probs"] for row in step.rows])
    losses = {}
    for name, rows in (("srpo", step.rows), ("grpo", plain.rows)):
        advantages = padded([row["advantages"] for row in rows])
        reduction, normalizer = _REDUCTIONS[mode]
        sampled = padded([older(row) for row in step.rows])
        options_of_loss = LossOptions(reduction=reduction)
        expected, _ = grpo_loss(old, advantages, mask, options_of_loss, old_log_probs=sampled, normalizer=normalizer)
        losses[name], norm = train(parts, step.rows, [row["advantages"] for row in rows], mode, **options)
        assert losses[name] == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
        assert norm > 0
    assert losses["srpo"] != pytest.approx(losses["grpo"], abs=1e-6)


def test_strength_zero_has_the_loss_and_gradient_of_grpo(parts, run_step):
    step, plain = run_step("+algorithm.srpo.strength=0"), run_step(trainer_class=PlainTrainer)
    ours = train(parts, step.rows, [row["advantages"] for row in step.rows], "token-mean")
    verls = train(parts, step.rows, [row["advantages"] for row in plain.rows], "token-mean")
    assert ours == verls


@pytest.mark.parametrize("loss_mode", LOSS_MODES)
def test_allowed_losses_weight_a_token_by_its_advantage(loss_mode):
    """The gradient of each token times its weight: what makes weighting the advantage weighting the token."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import PolicyLossConfig

    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=2,
        ppo_mini_batch_size=2,
        ppo_micro_batch_size_per_gpu=2,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
    )
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 9, generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [5], [7], [3]])
    advantages = torch.tensor([[1.0], [-1.0], [0.5], [-0.2]]) * mask
    weights = torch.rand(4, 9, generator=generator) * 2 + 0.25
    gradients = []
    for credit in (advantages, advantages * weights):
        log_probs = (old + 0.1 * torch.randn(4, 9, generator=torch.Generator().manual_seed(1))).requires_grad_()
        loss, _ = get_policy_loss_fn(loss_mode)(
            old_log_prob=old,
            log_prob=log_probs,
            advantages=credit,
            response_mask=mask,
            loss_agg_mode="token-mean",
            config=config,
            rollout_is_weights=None,
        )
        loss.backward()
        gradients.append(log_probs.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0] * weights, gradients[1], atol=1e-7, rtol=1e-5)


# What goes wrong is said.


def test_a_failing_worker_is_quoted_first(run_step, monkeypatch):
    import ray

    class Failing:
        def compute_srpo_log_probs(self, meta):
            raise ray.exceptions.RayTaskError("worker", "Traceback ...", ValueError("images are square here"))

    monkeypatch.setattr("test_verl_engine.Workers", lambda *args: Failing(), raising=True)
    with pytest.raises(
        RuntimeError, match=r"^SRPO's passes failed in a worker: ValueError\('images are square here'\)"
    ):
        run_step("+algorithm.srpo.seed=9")


def test_a_processor_without_normalization_is_refused_before_the_first_rollout(parts):
    images = parts.worker.model_config.processor.image_processor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "image_mean", None)
        with pytest.raises(ValueError, match="no image_mean and image_std"):
            srpo_worker(parts, SRPOConfig())


def test_the_example_configuration_is_accepted_by_verl_and_by_us(monkeypatch):
    import verl.utils.config

    monkeypatch.setattr("sys.argv", ["main_ppo"])
    with initialize_config_dir(config_dir=str(EXAMPLES), version_base=None):
        config = compose(config_name="verl_qwen2_5_vl_7b", overrides=["algorithm.srpo.strength=0.5"])
    verl.utils.config.validate_config(config=config, use_reference_policy=True, use_critic=False)
    options = adapter.check_config(OmegaConf.to_container(config, resolve=True))
    assert options == VerlOptions(strength=0.5)
    with open_dict(config):
        config.algorithm.srpo.strenght = 1.0
    with pytest.raises(ValueError, match="did you mean algorithm.srpo.strength"):
        verl.utils.config.validate_config(config=config, use_reference_policy=True, use_critic=False)


with contextlib.suppress(AttributeError):  # the queue is never started here
    verl.utils.transferqueue_utils.TQ_INITIALIZED = True
