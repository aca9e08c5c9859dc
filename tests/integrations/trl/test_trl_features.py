"""SRPO beside TRL's other options, and what a run leaves behind: metrics, tables, checkpoints, the model card."""

import random
from pathlib import Path
from unittest import mock

import numpy as np
import pandas
import pytest
import torch
from peft import LoraConfig
from srpo_trl import SRPOMixin, SRPOTrainer
from training import Rollouts, make_dataset, make_trainer, rollout_batch, train, watching
from transformers import TrainerCallback
from trl import GRPOTrainer

from srpo_core.batch import MAIN_METRICS
from srpo_core.engine_gap import ENGINE_METRICS
from srpo_core.tags import BrokenReason

SCORE = "_get_per_token_logps_and_entropies"
LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)}


class ToolRollouts(Rollouts):
    """Three tokens of another's in the middle of every reasoning, marked as TRL marks tool outputs."""

    def __call__(self, prompts, trainer):
        output = super().__call__(prompts, trainer)
        think = trainer.processing_class.tokenizer.convert_tokens_to_ids("<think>")
        masks = []
        for completion in self.completions:
            place = completion.index(think) + 3
            completion[place:place] = [50, 51, 52]
            masks.append([int(not place <= index < place + 3) for index in range(len(completion))])
        output["logprobs"] = [[0.0] * len(completion) for completion in self.completions]
        return output | {"env_mask": masks}


def with_vllm(trainer):
    """Everything of vLLM but the engine: its log-probabilities come from the rollout function."""
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = type("Stub", (), {"sync_weights": lambda self: None})()
    return trainer


FEATURES = {
    "lora": {"trainer_options": LORA},
    "lora_and_beta": {"trainer_options": LORA, "beta": 0.04},
    "bf16": {"bf16": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "truncation_masking": {"mask_truncated_completions": True},
    "high_entropy_tokens": {"top_entropy_quantile": 0.5},
    "entropy_bonus": {"entropy_coef": 0.01},
    "two_sided_clipping": {"delta": 1.5, "num_iterations": 2},
    "batch_scaled_rewards": {"scale_rewards": "batch"},
    "tool_mask": {"rollouts": ToolRollouts},
    "multi_image": {"dataset": lambda: make_dataset(images_per_row=lambda row: 1 + row % 2)},
    "text_only": {"dataset": lambda: make_dataset(images_per_row=lambda row: 0)},
    "padding": {"pad_to_multiple_of": 16},
    "off_policy_masking": {"off_policy_mask_threshold": 0.01, "num_iterations": 2},
    "tags_of_several_tokens": {"tags_as_tokens": False},
    "reliance": {"srpo_reliance_spans": 3, "srpo_reliance_mode": "share"},
}


def build(trainer_class, feature, **more):
    options = dict(FEATURES[feature]) | more
    for name in ("rollouts", "dataset"):
        if name in options:
            options[name] = options[name]()
    return make_trainer(trainer_class, **options)


@pytest.mark.parametrize("feature", FEATURES)
def test_strength_0_is_grpo_and_strength_1_is_not_with(feature):
    losses, parameters = train(build(GRPOTrainer, feature))
    same_losses, same = train(build(SRPOTrainer, feature, srpo_strength=0.0))
    weighted_losses, weighted = train(build(SRPOTrainer, feature))
    assert same_losses == losses
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(same, parameters, strict=True))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(weighted, parameters, strict=True))
    assert np.isfinite(weighted_losses).all()
    assert all(parameter.isfinite().all() for parameter in weighted)


@pytest.mark.parametrize(("mode", "log_prob"), [("token_truncate", -5.0), ("sequence_truncate", -6.1)])
def test_vllm_importance_sampling_correction_multiplies_the_weighted_loss(mode, log_prob):
    options = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 3.0, "loss_type": "grpo"}
    runs = {}
    for name, trainer_class, strength in (("grpo", GRPOTrainer, 0), ("same", SRPOTrainer, 0), ("srpo", SRPOTrainer, 1)):
        rollouts = Rollouts(log_prob=log_prob)
        trainer = with_vllm(make_trainer(trainer_class, rollouts=rollouts, srpo_strength=float(strength), **options))
        runs[name] = rollout_batch(trainer)
    ratio = runs["grpo"]["importance_sampling_ratio"]
    assert ratio.std() > 0.1
    assert torch.equal(ratio, runs["srpo"]["importance_sampling_ratio"])
    # On-policy, the gradient of the loss by a token's log-probability is -ratio * advantage / length / responses.
    trainer.current_gradient_accumulation_steps = 1
    batch = runs["srpo"]
    log_probs = batch["old_per_token_logps"].clone().requires_grad_()
    entropies = torch.zeros_like(log_probs)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (log_probs, entropies, None)
    trainer._compute_loss(trainer.model, batch).backward()
    mask = batch["completion_mask"]
    expected = -ratio * batch["advantages"] * mask / mask.sum(1, keepdim=True) / len(mask)
    torch.testing.assert_close(log_probs.grad, expected)
    unweighted = runs["same"]["advantages"]
    assert not torch.allclose(batch["advantages"], unweighted)


def test_strength_0_is_grpo_with_vllm_importance_sampling():
    results = []
    for trainer_class in (GRPOTrainer, SRPOTrainer):
        trainer = make_trainer(trainer_class, rollouts=Rollouts(log_prob=-5.0), srpo_strength=0.0)
        results.append(train(with_vllm(trainer)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0][1], results[1][1], strict=True))


def test_tool_outputs_have_no_weight_and_are_no_role():
    with watching() as made:
        batch = rollout_batch(make_trainer(rollouts=ToolRollouts()))
    (rollouts, _, _, credit), outputs = made[0], batch["completion_mask"].bool() & ~batch["tool_mask"].bool()
    assert outputs.sum(1).tolist() == [3] * 4
    assert not credit.weights[outputs].any()
    assert not rollouts.segmentation.roles[outputs].any()
    assert (credit.weights[~outputs & batch["completion_mask"].bool()] > 0).all()


def test_masked_truncated_responses_leave_the_mean_of_the_others_at_one():
    with watching() as made:
        batch = rollout_batch(make_trainer(mask_truncated_completions=True))
    rollouts, _, _, credit = made[0]
    assert batch["completion_mask"].any(1).tolist() == [True, True, True, False]
    assert not credit.weights[3].any()
    weighted = rollouts.mask & (rollouts.segmentation.roles > 0)
    means = (credit.weights * weighted).sum(1)[:3] / weighted.sum(1)[:3]
    torch.testing.assert_close(means, torch.ones(3))


@pytest.fixture
def before_and_after(monkeypatch):
    """State at the end of TRL's own method, and after ours."""
    states = {}

    def capture():
        return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    original = GRPOTrainer._generate_and_score_completions

    def watched(self, inputs):
        batch = original(self, inputs)
        copies = {key: value.clone() for key, value in batch.items() if isinstance(value, torch.Tensor)}
        states["before"] = (capture(), batch, copies, [module.training for module in self.model.modules()])
        return batch

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", watched)
    return states, capture


@pytest.mark.parametrize("corruption", ["patch_mask", "noise", "patch_shuffle", "none"])
@pytest.mark.parametrize("counterfactual", ["swap", "drop", "mask"])
def test_random_state_batch_and_modes_are_unchanged_by_the_hook(before_and_after, corruption, counterfactual):
    states, capture = before_and_after
    options = {"srpo_reliance_spans": 2} if counterfactual == "drop" else {}
    options |= {"srpo_corruption": corruption, "srpo_counterfactual": counterfactual}
    trainer = make_trainer(num_iterations=2, **options)
    frozen = next(module for module in trainer.model.modules() if type(module).__name__.endswith("Attention"))
    train_mode = trainer.model.train
    trainer.model.train = lambda mode=True: train_mode(mode) and frozen.eval() and trainer.model  # a frozen part stays
    result = rollout_batch(trainer)
    random_state, batch, copies, modes = states["before"]
    assert torch.equal(random_state[0], torch.get_rng_state())
    assert random_state[1:] == capture()[1:]
    assert modes == [module.training for module in trainer.model.modules()]
    assert not all(modes)
    for key, copy in copies.items():
        assert torch.equal(batch[key], copy), key
        if key != "advantages":
            assert result[key] is batch[key], key
    assert set(result) == set(batch)


def test_passes_no_more_than_needed():
    def passes(**options):
        """Calls of TRL's log-prob function for a rollout batch, beyond TRL's own."""
        counts = []
        for trainer_class in (SRPOTrainer, GRPOTrainer):
            trainer = make_trainer(trainer_class, **options)
            trainer._srpo_scorer = None  # with it prefixes are shared: test_trl_shared.py
            with mock.patch.object(trainer, SCORE, side_effect=trainer._get_per_token_logps_and_entropies) as score:
                rollout_batch(trainer)
            counts.append(score.call_count)
        return counts[0] - counts[1]

    assert passes() == 3
    assert passes(num_iterations=2) == 2  # TRL has scored the responses already
    assert passes(dataset=make_dataset(images_per_row=lambda row: 0), num_iterations=2) == 1
    assert passes(srpo_reliance_spans=4) == 7
    # Where it could change no weight, reliance is not measured.
    assert passes(srpo_reliance_spans=4, srpo_strength=0.0) == 3
    assert passes(srpo_reliance_spans=4, dataset=make_dataset(images_per_row=lambda row: 0)) == 2


def test_old_log_probs_are_not_reused_where_dropout_made_them_random():
    trainer = make_trainer(num_iterations=2)
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    with watching() as made:
        batch = rollout_batch(trainer)
    own = made[0].passes[0]
    assert not torch.allclose(own, batch["old_per_token_logps"])
    with watching() as made:
        rollout_batch(make_trainer())
    assert torch.equal(own, made[0].passes[0])  # in eval mode, so that contrasts hold no noise


def logged_names(entry, prefix="srpo/"):
    return {name.removeprefix(prefix) for name in entry if name.startswith(prefix)}


def test_the_main_metrics_are_logged_and_nothing_else_of_ours():
    trainer = make_trainer(
        max_steps=1,
        srpo_correct=">=1",
        trainer_options={"eval_dataset": make_dataset(4)},
        per_device_eval_batch_size=4,
    )
    trainer.train()
    # These rollouts come with log-probs of another engine, whose gap is logged beside the scores.
    names = {*MAIN_METRICS, *ENGINE_METRICS, "seconds"}
    assert logged_names(trainer.state.log_history[0]) == names
    trainer.evaluate()
    assert logged_names(trainer.state.log_history[-1], "eval_srpo/") == names


def test_metrics_have_every_name_the_docs_list():
    trainer = make_trainer(
        max_steps=1,
        srpo_metrics="all",
        trainer_options={"eval_dataset": make_dataset(4)},
        per_device_eval_batch_size=4,
    )
    trainer.train()
    names = [f"weight/{role}/{what}" for role in ("perception", "reasoning") for what in ("mean", "min", "max", "mass")]
    names += ["score/perception/mean", "score/reasoning/mean", "structured/fraction", "broken/fraction"]
    names += [f"broken/{reason.name.lower()}" for reason in BrokenReason if reason]
    names += ["swap/coverage", "advantage/zero", "advantage/cosine", "corruption/unchanged", "seconds"]
    logged = trainer.state.log_history[0]
    assert {*MAIN_METRICS, *names} - {"right/fraction"} <= logged_names(logged)
    assert logged["srpo/structured/fraction"] == logged["srpo/swap/coverage"] == 1.0
    assert 0.5 < logged["srpo/advantage/cosine"] < 1.0
    assert 0 < logged["srpo/seconds"] < logged["step_time"]
    trainer.evaluate()
    assert {f"eval_srpo/{name}" for name in names} <= set(trainer.state.log_history[-1])


def test_malformed_responses_are_counted_by_reason_and_keep_weight_one():
    class Broken(Rollouts):
        def __call__(self, prompts, trainer):
            output = super().__call__(prompts, trainer)
            closing = trainer.processing_class.tokenizer.convert_tokens_to_ids("</perception>")
            output["completion_ids"][0].remove(closing)
            return output

    trainer = make_trainer(rollouts=Broken(), max_steps=1, srpo_metrics="all")
    with watching() as made:
        trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["srpo/broken/nested"] == logged["srpo/broken/fraction"] == 0.25
    assert set(made[0].credit.weights[0].tolist()) == {0.0, 1.0}


def test_zero_advantages_are_noted():
    trainer = make_trainer(reward=lambda completions, **_: [1.0] * len(completions), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["srpo/advantage/zero"] == 1.0


def test_completions_table_has_weight_columns(tmp_path):
    make_trainer(log_completions=True, max_steps=1, output_dir=str(tmp_path)).train()
    table = pandas.read_parquet(next(Path(tmp_path).glob("completions/*.parquet")))
    assert len(table) == 4
    assert table["srpo_broken"].tolist() == ["none"] * 4
    for column in ("srpo_perception_weight", "srpo_reasoning_weight"):
        assert table[column].between(0.25, 4).all()
        assert table[column].std() > 0


def test_model_card_names_the_paper(tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path))
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "Structured Role-aware Policy Optimization for Multimodal Reasoning" in card
    assert "2605.07274" in card
    assert "SRPO" in card


@pytest.mark.parametrize("scale", ["fixed", "ema_rms"])
def test_a_resumed_run_has_identical_weights_and_parameters(tmp_path, scale):
    # Qwen3-VL: transformers 5.23 resumes Qwen2-VL, Qwen2.5-VL and LLaVA without the weights it saved under other names.
    options = {"family": "qwen3_vl", "max_steps": 4, "output_dir": str(tmp_path), "srpo_scale": scale}

    def run(calls, resume=None, **saving):
        trainer = make_trainer(rollouts=Rollouts(calls=calls), **options, **saving)
        with watching() as made:
            trainer.train(resume_from_checkpoint=resume)
        parameters = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        return [credit.weights for *_, credit in made], parameters

    whole, parameters = run(0, save_strategy="steps", save_steps=2)
    rest, resumed = run(2, str(tmp_path / "checkpoint-2"))
    assert len(whole) == 4
    assert len(rest) == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rest, whole[2:], strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed, parameters, strict=True))


def test_moving_average_of_the_scale_would_be_missed():
    # The resumed run above must fail without its saved average: the same steps from no average give other weights.
    class Forgetful(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            memory.sums = None

    weights = []
    for callbacks in ([], [Forgetful()]):
        trainer = make_trainer(srpo_scale="ema_rms", max_steps=2, callbacks=callbacks)
        memory = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "_ScaleMemory")
        with watching() as made:
            trainer.train()
        weights += [credit.weights for *_, credit in made]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[1], weights[3])


def test_the_mixin_goes_before_a_trainer_of_the_users_own():
    class Mine(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            self.was_here = True
            return super()._generate_and_score_completions(inputs)

    class MineWithSRPO(SRPOMixin, Mine):
        pass

    trainer = make_trainer(MineWithSRPO)
    assert rollout_batch(trainer)["advantages"].ndim == 2
    assert trainer.was_here
