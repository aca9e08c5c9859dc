"""The loss options that this package and TRL both have, on the same tensors: loss and gradient."""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from srpo_core import LossOptions, aggregate, grpo_loss, token_log_probs
from srpo_core.advantages import top_entropy_mask
from srpo_core.engine_gap import engine_weights
from srpo_core.log_probs import token_entropy

BATCH, TIME, VOCAB, BETA = 5, 7, 11, 0.1


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, TIME, VOCAB, generator=g, dtype=torch.float64)
    ids = torch.randint(VOCAB, (BATCH, TIME), generator=g)
    log_probs = token_log_probs(logits, ids)
    near = [log_probs + 0.3 * torch.randn(BATCH, TIME, generator=g, dtype=torch.float64) for _ in range(3)]
    return SimpleNamespace(
        logits=logits,
        ids=ids,
        old=near[0],
        ref=near[1],
        engine=near[2],
        advantages=torch.randn(BATCH, generator=g, dtype=torch.float64),
        mask=torch.arange(TIME) < torch.tensor([7, 5, 2, 6, 1])[:, None],
    )


class One:
    """An accelerator of one process."""

    num_processes = 1
    sync_gradients = True

    def pad_across_processes(self, tensor, **_):
        return tensor

    def gather(self, tensor):
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor, **_):
        return tensor


def loss_of_trl(batch, logits, inputs, **changed):
    """`GRPOTrainer._compute_loss` itself, whose model is replaced by logits."""
    args = GRPOConfig(use_cpu=True, bf16=False, report_to=[], **changed)
    log_probs = token_log_probs(logits, batch.ids)
    trainer = SimpleNamespace(
        args=args,
        accelerator=One(),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, token_entropy(logits), None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        aux_loss_enabled=False,
        beta=args.beta,
        current_gradient_accumulation_steps=1,
        entropy_coef=args.entropy_coef,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        epsilon_low=args.epsilon,
        importance_sampling_level=args.importance_sampling_level,
        loss_type=args.loss_type,
        max_completion_length=args.max_completion_length,
        off_policy_mask_threshold=args.off_policy_mask_threshold,
        top_entropy_quantile=args.top_entropy_quantile,
        use_adaptive_entropy=False,
        use_vllm="importance_sampling_ratio" in inputs,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=args.entropy_coef != 0.0,
    )
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    args.steps_per_generation = 1
    prompt = torch.ones(BATCH, 1, dtype=torch.long)
    inputs = inputs | {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": batch.ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
        "num_items_in_batch": batch.mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def agree(batch, theirs, options, factor=1.0, ratio=None, entropy_coef=0.0):
    """Both losses and both gradients by the logits."""
    results = []
    for is_ours in (True, False):
        logits = batch.logits.clone().requires_grad_()
        if is_ours:
            advantages = batch.advantages[:, None] * factor * torch.ones(BATCH, TIME, dtype=torch.float64)
            log_probs = token_log_probs(logits, batch.ids)
            others = {"old_log_probs": batch.old, "ref_log_probs": batch.ref}
            loss = grpo_loss(log_probs, advantages, batch.mask, LossOptions(**options), **others).loss
            loss = loss - entropy_coef * aggregate(token_entropy(logits), batch.mask)
        else:
            inputs = {} if ratio is None else {"importance_sampling_ratio": ratio}
            loss = loss_of_trl(batch, logits, inputs, **theirs)
        results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)
    assert results[0][1].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"loss_type": "bnpo"}, {}),
        (
            {"loss_type": "grpo", "delta": 1.5},
            {"surrogate": {"name": "clip", "dual": 1.5}, "reduction": "sequence_mean"},
        ),
        ({"loss_type": "cispo", "epsilon_high": 1.1}, {"surrogate": {"name": "cispo", "max_ratio": 1.1}}),
        ({"loss_type": "sapo"}, {"surrogate": "sapo", "reduction": "sequence_mean"}),
        ({"loss_type": "vespo"}, {"surrogate": "vespo"}),
        (
            {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 1.5},
            {"surrogate": {"name": "vespo", "shape_positive": 1.0, "rate_positive": 2.0, "shape_negative": 1.5}},
        ),
        (
            {"loss_type": "luspo", "importance_sampling_level": "sequence"},
            {"surrogate": "gspo", "reduction": "sequence_sum"},
        ),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence"},
            {"surrogate": "gspo", "reduction": "sequence_mean"},
        ),
        ({"loss_type": "bnpo", "off_policy_mask_threshold": 0.02}, {"off_policy_threshold": 0.02}),
        ({"loss_type": "vespo", "off_policy_mask_threshold": 0.0}, {"surrogate": "vespo", "off_policy_threshold": 0.0}),
        ({"loss_type": "bnpo", "beta": BETA, "use_bias_correction_kl": False}, {"kl_coef": BETA}),
        (
            {"loss_type": "bnpo", "beta": BETA, "use_bias_correction_kl": True},
            {"kl_coef": BETA, "kl_correction": "ratio"},
        ),
    ],
    ids=str,
)
def test_grpo_loss_is_that_of_trl(batch, theirs, ours):
    agree(batch, theirs, ours)


def test_the_comparison_of_losses_can_fail(batch):
    with pytest.raises(AssertionError):
        agree(batch, {"loss_type": "bnpo", "beta": BETA, "use_bias_correction_kl": True}, {"kl_coef": BETA})
    with pytest.raises(AssertionError):
        agree(batch, {"loss_type": "bnpo", "off_policy_mask_threshold": 0.02}, {})


def test_the_threshold_drops_some_tokens_and_not_all(batch):
    options = LossOptions(off_policy_threshold=0.02)
    log_probs, advantages = token_log_probs(batch.logits, batch.ids), batch.advantages[:, None].expand(BATCH, TIME)
    dropped = grpo_loss(log_probs, advantages, batch.mask, options, old_log_probs=batch.old).metrics
    assert 0 < dropped["off_policy/dropped"] < 1


@pytest.mark.parametrize("quantile", [0.2, 0.5])
def test_top_entropy_mask_is_that_of_trl(batch, quantile):
    factor = top_entropy_mask(token_entropy(batch.logits), batch.mask, share=quantile)
    assert 0 < factor.sum() < batch.mask.sum()
    theirs = {"loss_type": "bnpo", "top_entropy_quantile": quantile, "beta": BETA, "use_bias_correction_kl": False}
    agree(batch, theirs, {"kl_coef": BETA}, factor)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("out_of_bounds", ["truncate", "mask"])
def test_engine_weights_correct_as_in_trl(batch, level, out_of_bounds):
    """The formulas of `_generate_and_score_completions`, whose result is an input of the loss."""
    low, high = (0.8, 1.3) if level == "token" else (0.5, 2.5)
    engine = torch.where(torch.arange(TIME) == 1, torch.nan, batch.engine)
    difference = torch.where(batch.mask, batch.old - engine, 0.0).nan_to_num(0.0)
    ratio = (difference if level == "token" else difference.sum(1, keepdim=True)).exp()
    inside = (ratio >= low) & (ratio <= high)
    assert inside.any()
    assert not inside.all()
    ratio = ratio.clamp(low, high) if out_of_bounds == "truncate" else torch.where(inside, ratio, 0.0)
    factor = engine_weights(
        batch.old, batch.mask, engine_log_probs=engine, level=level, out_of_bounds=out_of_bounds, low=low, high=high
    )
    agree(batch, {"loss_type": "bnpo"}, {}, factor, ratio)


def test_an_entropy_bonus_is_that_of_trl(batch):
    agree(batch, {"loss_type": "bnpo", "entropy_coef": 0.05}, {}, entropy_coef=0.05)
