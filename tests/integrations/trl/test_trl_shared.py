"""Scoring with shared prefixes is scoring by TRL's own function; and the engine's gap is logged where there is one."""

import logging
from unittest import mock

import pytest
import torch
from srpo_trl.shared import encoded_prompts, own_rows
from tiny_vlm import FAMILIES
from training import Rollouts, make_dataset, make_trainer, rollout_batch, watching

from srpo_core import RolloutBatch, Segmentation, SRPOConfig, plan

SCORE = "_get_per_token_logps_and_entropies"


def made_of(*, shares, images_per_row=lambda row: 1, rollouts=None, **options):
    """What the core was given of one generation batch of two prompts, and the trainer."""
    dataset = make_dataset(2, images_per_row=images_per_row)
    trainer = make_trainer(dataset=dataset, rollouts=rollouts, per_device_train_batch_size=8, **options)
    if not shares:
        trainer._srpo_scorer = None
    with (
        watching() as made,
        mock.patch.object(trainer, SCORE, side_effect=trainer._get_per_token_logps_and_entropies) as score,
    ):
        rollout_batch(trainer, [row for row in dataset for _ in range(4)])
    return made[0], score.call_count, trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefixes_give_the_scores_of_plain_passes(family, tmp_path):
    shared, passes, trainer = made_of(shares=True, family=family, srpo_rollouts=str(tmp_path / "rollouts.jsonl"))
    assert passes == 0
    assert trainer._srpo_scorer is not None
    plain, passes, _ = made_of(shares=False, family=family)
    assert passes == 3
    assert torch.equal(shared.batch.token_ids, plain.batch.token_ids)
    mask = shared.batch.mask
    for name in ("old_log_probs", "corrupted_log_probs", "counterfactual_log_probs", "scores"):
        own, its = getattr(shared.credit, name), getattr(plain.credit, name)
        assert (own - its)[mask].abs().max() <= 1e-5, name
    assert (shared.credit.weights - plain.credit.weights)[mask].abs().max() <= 2e-5
    assert (shared.credit.scores[mask].abs() > 0.01).any()


@pytest.mark.parametrize(
    "options",
    [
        {"images_per_row": lambda row: 1 + row % 2},
        {"images_per_row": lambda row: 0},
        {"srpo_corruption": "none"},
        {"srpo_counterfactual": "drop"},
        {"srpo_counterfactual": "mask"},
        {"srpo_counterfactual_image": "corrupted"},
        {"srpo_reliance_spans": 2},
        {"temperature": 0.7},
    ],
    ids=lambda options: next(iter(options)) + str(next(iter(options.values())))[:9],
)
def test_they_do_so_with_every_option(options):
    shared, *_ = made_of(shares=True, **options)
    plain, *_ = made_of(shares=False, **options)
    mask = shared.batch.mask
    assert (shared.credit.scores - plain.credit.scores)[mask].abs().max() <= 2e-5
    assert (shared.credit.weights - plain.credit.weights)[mask].abs().max() <= 5e-5


def test_without_a_file_of_rollouts_only_perceptions_are_scored_without_the_image(tmp_path):
    """No weight depends on the others, and a file may be read with other tags later."""
    alone, *_ = made_of(shares=True)
    filed, *_ = made_of(shares=True, srpo_rollouts=str(tmp_path / "rollouts.jsonl"))
    mask, is_seen = alone.batch.mask, alone.batch.segmentation.roles == 1
    lost, its = ((each.credit.old_log_probs - each.credit.corrupted_log_probs) for each in (alone, filed))
    assert torch.equal(lost[mask & ~is_seen], torch.zeros(int((mask & ~is_seen).sum())))
    assert (its[mask & ~is_seen] != 0).any()
    torch.testing.assert_close(lost[mask & is_seen], its[mask & is_seen], atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.credit.weights, filed.credit.weights, atol=2e-5, rtol=0)


def test_encoded_prompts_are_the_rows_of_a_context_without_padding():
    trainer = make_trainer(dataset=make_dataset(2), per_device_train_batch_size=8)
    found = []

    def watch(*args, **_):
        found.append(args)
        raise InterruptedError

    with mock.patch("srpo_trl.shared.score_with_shared_prefixes", watch), pytest.raises(InterruptedError):
        rollout_batch(trainer, [row for row in make_dataset(2) for _ in range(4)])
    (_, contexts, responses, planned, own), *_ = found
    prompts = encoded_prompts(contexts["original"])
    assert len(prompts) == 8
    assert len(prompts[0].token_ids) != len(prompts[4].token_ids)
    for row, prompt in enumerate(prompts):
        context = contexts["original"]
        real = context.prompt_mask[row].bool()
        assert prompt.token_ids.tolist() == context.prompt_ids[row][real].tolist()
        placeholders = (prompt.token_ids == trainer.model.config.image_token_id).sum()
        assert prompt.vision["image_grid_thw"].prod() == 4 * placeholders == len(prompt.vision["pixel_values"])
        assert prompt.token_types["mm_token_type_ids"].sum() == placeholders
        assert prompt.images == 1
    batch, part = own_rows(responses, planned, slice(2, 5))
    assert torch.equal(batch.token_ids, responses.token_ids[2:5])
    assert torch.equal(batch.segmentation.roles, responses.segmentation.roles[2:5])
    assert [view.name for view in part.views] == [view.name for view in planned.views]
    assert torch.equal(part.views[1].responses.token_ids, planned.views[1].responses.token_ids[2:5])
    assert own == slice(0, 8)


def test_own_rows_of_spans_go_with_their_views():
    ids = torch.tensor([[1, 7, 7, 2, 8]] * 4)
    roles = torch.tensor([[0, 1, 1, 0, 2]] * 4)
    segmentation = Segmentation(roles, torch.zeros(4).long(), torch.zeros(4, 5).bool())
    batch = RolloutBatch(ids, ids > 0, segmentation, torch.zeros(4).long())
    planned = plan(batch, SRPOConfig(reliance_spans=2), has_images=True, pad_token_id=0)
    _, part = own_rows(batch, planned, slice(1, 3))
    assert [len(view.responses.token_ids) for view in part.views if view.responses is not None] == [2, 2, 2]


def test_where_weights_are_sharded_trl_scores():
    trainer = make_trainer()
    assert trainer._srpo_make_scorer() is not None
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        with mock.patch.object(trainer, name, True):
            assert trainer._srpo_make_scorer() is None
    with mock.patch("srpo_trl.upstream.version", return_value="5.3.0"):
        assert trainer._srpo_make_scorer() is None


def gap_of(caplog, log_prob):
    caplog.clear()
    caplog.set_level(logging.WARNING, logger="srpo_core")
    trainer = make_trainer(max_steps=2, rollouts=Rollouts(log_prob=log_prob))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logged, [record.getMessage() for record in caplog.records if "inference engine" in record.getMessage()]


def test_the_gap_to_the_engine_is_logged_and_warned_of_once(caplog):
    with watching() as made:
        logged, warned = gap_of(caplog, -4.0)
    batch, (own, *_), _, credit = made[0]
    gaps = (own[batch.mask] + 4.0).abs()
    assert logged[0]["srpo/engine/gap/mean"] == pytest.approx(gaps.mean().item(), abs=1e-4)
    assert logged[0]["srpo/engine/gap/p95"] == pytest.approx(gaps.quantile(0.95).item(), abs=1e-4)
    scored = credit.scores[batch.mask & (batch.segmentation.roles > 0)].abs()
    assert logged[0]["srpo/engine/score/mean"] == pytest.approx(scored.mean().item(), abs=1e-4)
    assert len(warned) == 1
