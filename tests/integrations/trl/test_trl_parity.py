"""At strength 0 the trainer is GRPOTrainer to the last bit, extra passes, token advantages and all."""

import pytest
import torch
from srpo_trl import SRPOTrainer
from tiny_vlm import make_tokenizer
from training import make_dataset, make_trainer, train
from trl import GRPOTrainer

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


def assert_identical(**options):
    losses, parameters = train(make_trainer(GRPOTrainer, **options))
    srpo_losses, srpo_parameters = train(make_trainer(SRPOTrainer, srpo_strength=0.0, **options))
    assert srpo_losses == losses
    assert len(losses) == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(srpo_parameters, parameters, strict=True))
    return parameters


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_strength_0_is_grpo_bit_for_bit(loss_type, beta, iterations):
    assert_identical(loss_type=loss_type, beta=beta, num_iterations=iterations)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_comparison_can_fail(loss_type):
    _, parameters = train(make_trainer(GRPOTrainer, loss_type=loss_type))
    _, weighted = train(make_trainer(SRPOTrainer, loss_type=loss_type))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(weighted, parameters, strict=True))


def test_strength_0_is_grpo_with_old_log_probs_and_accumulation():
    # One generation batch feeds two optimizer steps of two micro-batches: old log-probs exist and are reused.
    assert_identical(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, steps_per_generation=4, loss_type="dapo"
    )


def test_strength_0_is_grpo_where_dropout_is_on():
    # The extra passes run in eval mode, draw nothing, and leave the mode as it was.
    options = {"num_iterations": 2}
    results = []
    for trainer_class in (GRPOTrainer, SRPOTrainer):
        trainer = make_trainer(trainer_class, srpo_strength=0.0, **options)
        for module in trainer.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
        results.append(train(trainer))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0][1], results[1][1], strict=True))


def test_strength_0_is_grpo_under_evaluation_and_sampling():
    # Nothing injected: completions are sampled, so the global random state has to stay where it was.
    # (A random model may sample an image placeholder, for which there is no image.)
    vision = make_tokenizer().convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"])
    evaluation = {"trainer_options": {"eval_dataset": make_dataset(4)}, "eval_strategy": "steps", "eval_steps": 1}
    logs = []
    for trainer_class in (GRPOTrainer, SRPOTrainer):
        trainer = make_trainer(
            trainer_class,
            rollouts=False,
            srpo_strength=0.0,
            max_completion_length=12,
            generation_kwargs={"suppress_tokens": vision},
            per_device_eval_batch_size=4,
            **evaluation,
        )
        trainer.train()
        logs.append([entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history])
    assert logs[0] == logs[1]
    assert any(loss for loss in logs[0])
