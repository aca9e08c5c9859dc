"""What the adapter assumes of TRL. When TRL moves one of these, a test with a readable name fails."""

import inspect

import pytest
import torch
from srpo_trl import SRPOTrainer
from srpo_trl.upstream import RELIED_ON, VISION_KEYS, check_upstream
from training import make_trainer, rollout_batch, train
from trl import GRPOTrainer


@pytest.fixture(scope="module")
def batch():
    trainer = make_trainer(GRPOTrainer, num_iterations=2)
    return rollout_batch(trainer)


def test_trl_still_scores_a_rollout_batch_in_generate_and_score_completions():
    parameters = list(inspect.signature(GRPOTrainer._generate_and_score_completions).parameters)
    assert parameters == ["self", "inputs"]


def test_trl_still_computes_log_probs_in_get_per_token_logps_and_entropies():
    signature = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies)
    names = list(signature.parameters)
    is_opaque = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())  # TRL 1.14
    assert is_opaque or names[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]


def test_trl_log_prob_function_takes_no_vision_key_we_do_not_pass():
    parameters = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    known = {"self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "args", "kwargs"}
    known |= {"compute_entropy", "compute_efficient", "compute_aux_loss", *VISION_KEYS}
    assert set(parameters) <= known


def test_trl_still_has_every_name_we_rely_on(batch):
    trainer = make_trainer(GRPOTrainer)
    for where, found in (
        ("trainer class", GRPOTrainer),
        ("trainer", trainer),
        ("completion log", trainer._logs),
        ("rollout batch", batch),
    ):
        check_upstream(where, found)
    assert {"pixel_values", "image_grid_thw", "num_images"} <= set(batch)
    assert batch["completion_ids"].shape == batch["completion_mask"].shape == batch["old_per_token_logps"].shape


def test_trl_still_pads_prompts_left_and_responses_right(batch):
    assert batch["prompt_mask"][:, -1].all()
    assert (batch["completion_mask"].diff(dim=1) <= 0).all()
    assert batch["completion_mask"][:, 0].all()


def test_trl_advantages_are_still_one_per_response_and_its_loss_takes_one_per_token(batch):
    assert batch["advantages"].shape == (len(batch["completion_ids"]),)
    trainer = make_trainer(GRPOTrainer, num_iterations=2)
    trainer.current_gradient_accumulation_steps = 1
    per_token = batch["advantages"][:, None] * torch.linspace(0.5, 1.5, batch["completion_ids"].shape[1])
    losses = [
        trainer._compute_loss(trainer.model, batch | {"advantages": advantages}).item()
        for advantages in (batch["advantages"], batch["advantages"][:, None].expand_as(per_token), per_token)
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_trl_metrics_and_completion_columns_are_still_where_we_write_them():
    trainer = make_trainer(GRPOTrainer)
    trainer._metrics["train"]["srpo/x"].append(1.0)
    trainer._metrics["eval"]["srpo/x"].append(1.0)
    trainer._logs["extra"]["srpo_x"].extend([1.0])


def test_trl_model_card_still_reads_paper_name_and_tags():
    for name in ("_paper", "_name", "_tag_names"):
        assert hasattr(GRPOTrainer, name)


@pytest.mark.parametrize(("where", "name"), [(where, name) for where, names in RELIED_ON.items() for name in names])
def test_a_trl_without_a_name_we_rely_on_is_refused_with_the_versions(where, name):
    found = dict.fromkeys(other for other in RELIED_ON[where] if other != name)
    for has_the_others in (found, type("Moved", (), found)):
        with pytest.raises(ImportError, match=rf"TRL's {where} has no {name}, .* trl 1\.\d+.* tested with trl 1\.0 to"):
            check_upstream(where, has_the_others)


@pytest.mark.parametrize("where", RELIED_ON)
def test_a_trainer_looks_for_the_names_before_it_trains(monkeypatch, where):
    monkeypatch.setitem(RELIED_ON, where, ("no_such_name",))
    with pytest.raises(ImportError, match=f"TRL's {where} has no no_such_name"):
        rollout_batch(make_trainer())


def test_an_unsupported_trl_is_refused_at_start_up(monkeypatch):
    monkeypatch.setattr("srpo_trl.upstream.version", lambda name: "1.15.0")
    with pytest.raises(ImportError, match=r"trl 1\.15\.0 is not supported: pip install 'trl.*1\.0"):
        make_trainer()


class OneAdvantageEach(SRPOTrainer):
    """As if TRL reduced the advantages of a batch before its loss."""

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        return inputs | {"advantages": inputs["advantages"].mean(1)}


class AnotherLoss(SRPOTrainer):
    """As if TRL took its loss from elsewhere, and left the one that we know of behind."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return GRPOTrainer._compute_loss(self, model, inputs)


@pytest.mark.parametrize(
    ("trainer_class", "found"),
    [(OneAdvantageEach, "was given one advantage per response"), (AnotherLoss, "was never called")],
)
def test_a_loss_that_never_sees_the_weights_stops_the_run_in_its_first_step(trainer_class, found):
    trainer = make_trainer(trainer_class)
    with pytest.raises(
        RuntimeError, match=rf"_compute_loss {found}, .* plain GRPO.* trl 1\.\d+.* tested with trl 1\.0"
    ):
        trainer.train()
    assert trainer.state.global_step == 1


def test_weights_that_reach_the_loss_are_no_error_later_either():
    losses, _ = train(make_trainer(num_iterations=2, gradient_accumulation_steps=2))
    assert len(losses) == 3
