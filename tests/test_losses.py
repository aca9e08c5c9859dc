"""Penalties, aggregation and grpo_loss: reference, padding, gradients, precision, metrics, bad input."""

import math
from dataclasses import replace

import pytest
import reference
import torch
from barred import barred_batches
from batches import batches
from helpers import SURROGATES, as_lists, close
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from srpo_core import LossOptions, aggregate, grpo_loss, kl_penalty, shared_baseline_weights

REDUCTIONS = ["token_mean", "sequence_mean", "constant", "sum"]
surrogates = pytest.mark.parametrize("name", SURROGATES)


def loss_of(batch, options, advantages=None, **more):
    advantages = batch.token_advantages if advantages is None else advantages
    others = {"old_log_probs": batch.old_log_probs, "ref_log_probs": batch.ref_log_probs} | more
    return grpo_loss(batch.log_probs, advantages, batch.mask, options, **others)


# The KL penalty


@given(batches(), st.sampled_from(["k1", "k2", "k3"]), st.sampled_from([1.0, 20.0]))
def test_kl_penalty_equals_the_reference(batch, estimator, spread):
    ref = batch.log_probs + spread * (batch.ref_log_probs - batch.log_probs)
    actual = kl_penalty(batch.log_probs, batch.mask, ref_log_probs=ref, estimator=estimator)
    close(actual, reference.kl_penalty(*as_lists(batch.log_probs, ref, batch.mask), estimator))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradient_of_the_kl_penalty(estimator):
    g = torch.Generator().manual_seed(0)
    log_probs = torch.randn(2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    # Away from 5 nats, where k3 becomes its tangent, on both sides.
    ref = torch.randn(2, 3, generator=g, dtype=torch.float64) + torch.tensor([[0.0, 9.0, 0.0], [15.0, 0.0, -9.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert gradcheck(lambda x: kl_penalty(x, mask, ref_log_probs=ref, estimator=estimator), (log_probs,))


def value_and_slope(nats, dtype=torch.float64, estimator="k3"):
    """Of one token that is that much likelier under the reference; the slope is that by its log-prob."""
    log_probs = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    ref = torch.full((1, 1), nats, dtype=dtype)
    value = kl_penalty(log_probs, torch.tensor([[True]]), ref_log_probs=ref, estimator=estimator)
    (slope,) = torch.autograd.grad(value.sum(), log_probs)
    return value.item(), slope.item()


@pytest.mark.parametrize(
    ("nats", "value", "slope"),
    [
        (0.0, 0.0, 0.0),
        (-3.0, math.exp(-3) + 2, 1 - math.exp(-3)),
        (4.9, math.exp(4.9) - 5.9, 1 - math.exp(4.9)),
        (5.0, math.exp(5) - 6, 1 - math.exp(5)),
        # The tangent at 5: 142.41 there, and 147.41 for each nat beyond.
        (6.0, math.exp(5) - 6 + math.exp(5) - 1, 1 - math.exp(5)),
        (20.0, 142.4131591 + 15 * 147.4131591, -147.4131591),
        (500.0, 142.4131591 + 495 * 147.4131591, -147.4131591),
    ],
)
def test_k3_is_exact_up_to_5_nats_and_its_tangent_beyond(nats, value, slope):
    assert value_and_slope(nats) == (pytest.approx(value, rel=1e-9), pytest.approx(slope, rel=1e-9))


def test_k3_and_its_slope_are_continuous_at_5_nats():
    (below, slope_below), at, (above, slope_above) = (value_and_slope(nats) for nats in (5 - 1e-9, 5.0, 5 + 1e-9))
    assert below <= at[0] <= above
    assert above - below < 1e-6
    assert slope_below == pytest.approx(at[1], abs=1e-6)
    assert slope_above == pytest.approx(at[1], abs=1e-6)


@given(st.floats(-1e4, 1e4))
def test_the_gradient_of_k3_is_bounded_and_never_lost(nats):
    value, slope = value_and_slope(nats, dtype=torch.float32)
    assert 0.0 <= value < math.inf
    assert 1 - math.exp(5) - 1e-4 <= slope <= 1.0
    if nats > 5.0:  # the token that has left the reference furthest behind is pulled back hardest
        assert slope == pytest.approx(1 - math.exp(5))


@given(barred_batches(), st.sampled_from(["k1", "k2", "k3"]))
def test_kl_penalty_of_barred_tokens_equals_the_reference(batch, estimator):
    log_probs = batch.log_probs.clone().requires_grad_()
    penalty = kl_penalty(log_probs, batch.mask, ref_log_probs=batch.ref_log_probs, estimator=estimator)
    close(penalty, reference.kl_penalty(*as_lists(batch.log_probs, batch.ref_log_probs, batch.mask), estimator))
    (gradient,) = torch.autograd.grad(penalty.sum(), log_probs)
    barred = batch.log_probs.isneginf() | batch.ref_log_probs.isneginf()
    assert (gradient[barred | ~batch.mask] == 0).all()
    # The other tokens have the gradient that they have among themselves.
    alone = kl_penalty(log_probs, batch.mask & ~barred, ref_log_probs=batch.ref_log_probs, estimator=estimator)
    assert torch.equal(gradient, torch.autograd.grad(alone.sum(), log_probs)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("estimator", "by_reference", "by_policy"),
    [("k1", 20.0, -20.0), ("k2", 200.0, 200.0), ("k3", 19.0, 142.4131591 + 15 * 147.4131591)],
)
def test_kl_penalty_of_a_token_that_one_policy_bars_is_that_of_20_nats(dtype, estimator, by_reference, by_policy):
    inf = math.inf
    log_probs = torch.tensor([[-1.0, -inf, -inf]], dtype=dtype, requires_grad=True)
    ref = torch.tensor([[-inf, -1.0, -inf]], dtype=dtype)
    penalty = kl_penalty(log_probs, torch.ones(1, 3).bool(), ref_log_probs=ref, estimator=estimator)
    penalty.sum().backward()
    close(penalty, [[by_reference, by_policy, 0.0]], rtol=1e-6)
    assert log_probs.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_k3_keeps_its_precision_near_the_reference():
    value, _ = value_and_slope(1e-4, dtype=torch.float32)
    assert value == pytest.approx(5e-9, rel=0.01)


def test_kl_penalty_at_padding_is_zero_whatever_is_there():
    nan = torch.full((1, 2), torch.nan, requires_grad=True)
    penalty = kl_penalty(nan, torch.zeros(1, 2).bool(), ref_log_probs=nan.detach())
    penalty.sum().backward()
    assert torch.equal(penalty, torch.zeros(1, 2))
    assert torch.equal(nan.grad, torch.zeros(1, 2))


# Aggregation


@given(batches(), st.sampled_from(REDUCTIONS), st.sampled_from([None, 7.0]))
def test_aggregate_equals_the_reference(batch, reduction, normalizer):
    normalizer = {"constant": 7.0, "sum": None}.get(reduction, normalizer)
    actual = aggregate(batch.log_probs, batch.mask, reduction=reduction, normalizer=normalizer)
    close(actual, reference.aggregate(*as_lists(batch.log_probs, batch.mask), reduction, normalizer))
    if normalizer is not None:
        tensor = torch.tensor(normalizer, dtype=torch.float64)
        assert torch.equal(aggregate(batch.log_probs, batch.mask, reduction=reduction, normalizer=tensor), actual)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@given(batch=batches())
def test_a_global_normalizer_makes_micro_batches_add_up(batch, reduction):
    real = batch.mask.any(1).sum() if reduction == "sequence_mean" else batch.mask.sum()
    normalizer = real.clamp(min=1).double()
    parts = [
        aggregate(batch.log_probs[i : i + 1], batch.mask[i : i + 1], reduction=reduction, normalizer=normalizer)
        for i in range(len(batch.mask))
    ]
    close(sum(parts), aggregate(batch.log_probs, batch.mask, reduction=reduction))


@given(batches())
def test_mass_is_conserved_under_every_normalizer(batch):
    """Mean-one weights over a whole response leave its share of the batch alone, however losses are averaged."""
    roles = torch.where(batch.mask, batch.roles.clamp(1, 2), 0)
    weights = shared_baseline_weights(batch.scores.nan_to_num(), roles, batch.mask)
    for reduction in ("token_mean", "sequence_mean", "sum"):
        close(
            aggregate(weights, batch.mask, reduction=reduction),
            aggregate(batch.mask.double(), batch.mask, reduction=reduction),
        )


# The loss


@surrogates
@given(batch=batches())
def test_padding_reaches_neither_loss_nor_gradient(batch, name):
    """NaN, infinities and huge ratios under the mask; the gradient there is exactly 0."""
    results = []
    for filler in (torch.nan, torch.inf, -1e9, 3.0):
        filled = replace(
            batch,
            log_probs=torch.where(batch.mask, batch.log_probs, filler).requires_grad_(),
            old_log_probs=torch.where(batch.mask, batch.old_log_probs, -filler),
            ref_log_probs=torch.where(batch.mask, batch.ref_log_probs, filler),
        )
        advantages = torch.where(batch.mask, batch.token_advantages, filler)
        loss, metrics = loss_of(filled, LossOptions(surrogate=name, kl_coef=0.1), advantages)
        (gradient,) = torch.autograd.grad(loss, filled.log_probs)
        assert loss.isfinite()
        assert (gradient[~batch.mask] == 0).all()
        assert gradient.isfinite().all()
        assert all(metric.isfinite() for metric in metrics.values())
        results.append((loss, gradient))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@surrogates
def test_only_log_probs_get_a_gradient(name):
    log_probs, old, advantages, ref = (torch.zeros(1, 2, requires_grad=True) for _ in range(4))
    options = LossOptions(surrogate=name, kl_coef=0.1)
    mask = torch.ones(1, 2).bool()
    grpo_loss(log_probs, advantages + 1.0, mask, options, old_log_probs=old, ref_log_probs=ref).loss.backward()
    assert log_probs.grad is not None
    assert old.grad is advantages.grad is ref.grad is None


@pytest.mark.parametrize("name", ["advantages", "old_log_probs"])
def test_grpo_loss_of_exchanged_tensors_raises_instead_of_training_nothing(name):
    policy, other, mask = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2), torch.ones(1, 2).bool()
    tensors = {"log_probs": other, "advantages": other, "old_log_probs": other} | {name: policy}
    with pytest.raises(ValueError, match=f"^{name} requires a gradient and log_probs does not, so nothing would be"):
        grpo_loss(mask=mask, **tensors)
    with torch.no_grad():
        grpo_loss(mask=mask, **tensors)


@surrogates
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_learn_from_is_a_zero_loss_in_the_graph(name, shape, reduction):
    log_probs = torch.full(shape, torch.nan, requires_grad=True)
    filler = torch.full(shape, torch.nan)
    loss, metrics = grpo_loss(
        log_probs,
        filler,
        torch.zeros(shape).bool(),
        LossOptions(surrogate=name, kl_coef=0.1, reduction=reduction),
        old_log_probs=filler,
        ref_log_probs=filler,
        normalizer=3.0 if reduction == "constant" else None,
    )
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(log_probs.grad, torch.zeros(shape))
    assert all(metric.isfinite() for metric in metrics.values())


def test_bfloat16_is_no_further_from_the_truth_than_the_naive_formula_in_bfloat16():
    g = torch.Generator().manual_seed(0)
    old = -5 * torch.rand(8, 64, generator=g).bfloat16()
    log_probs = (old.float() + 0.1 * torch.randn(8, 64, generator=g)).bfloat16()
    advantages, mask = torch.randn(8, 64, generator=g).bfloat16(), torch.ones(8, 64).bool()
    truth = grpo_loss(log_probs.double(), advantages.double(), mask, old_log_probs=old.double()).loss
    ours = grpo_loss(log_probs, advantages, mask, old_log_probs=old).loss
    ratio = (log_probs - old).exp()
    naive = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    assert ours.dtype == torch.float32
    assert (ours - truth).abs() < 1e-6 < (naive - truth).abs()


@given(batches(), st.sampled_from([1.0, 40.0]))
def test_metrics_of_every_surrogate(batch, spread):
    """Ratios and divergences; those of one surrogate alone are in test_surrogates.py."""
    ref = batch.log_probs + spread * (batch.ref_log_probs - batch.log_probs)
    metrics = loss_of(batch, LossOptions(), ref_log_probs=ref).metrics
    ratio = (batch.log_probs - batch.old_log_probs).exp()[batch.mask]
    if len(ratio) == 0:
        assert metrics["ratio/max"] == metrics["ratio/min"] == metrics["ratio/mean"] == 1
        assert metrics["kl/old"] == metrics["kl/reference"] == 0
        return
    close(metrics["ratio/max"], ratio.max())
    close(metrics["ratio/min"], ratio.min())
    close(metrics["ratio/mean"], ratio.mean())
    for name, delta in (
        ("kl/old", batch.log_probs - batch.old_log_probs),
        ("kl/reference", ref - batch.log_probs),
    ):
        estimates = [reference.k3(nats) for nats in delta[batch.mask].tolist()]
        close(metrics[name], math.fsum(estimates) / len(estimates))
    assert all(metric.ndim == 0 and not metric.requires_grad for metric in metrics.values())
    assert "kl/reference" not in loss_of(batch, LossOptions(), ref_log_probs=None).metrics


@surrogates
@given(batch=barred_batches())
def test_loss_and_metrics_of_barred_tokens_equal_plain_loops(batch, name):
    options = LossOptions(surrogate=name, kl_coef=0.1)
    batch = replace(batch, log_probs=batch.log_probs.clone().requires_grad_())
    loss, metrics = loss_of(batch, options)
    new, old, ref, advantages, mask = as_lists(
        batch.log_probs, batch.old_log_probs, batch.ref_log_probs, batch.token_advantages, batch.mask
    )
    policy = reference.aggregate(reference.surrogate(new, old, advantages, mask, name), mask)
    kl = reference.aggregate(reference.kl_penalty(new, ref, mask), mask)
    close(loss, policy + 0.1 * kl)
    assert torch.autograd.grad(loss, batch.log_probs)[0].isfinite().all()
    deltas = [
        reference.log_ratio(p, q)
        for rows in zip(new, old, mask, strict=True)
        for p, q, real in zip(*rows, strict=True)
        if real
    ]
    ratios = [math.exp(delta) for delta in deltas] or [1.0]
    for key, expected in (
        ("ratio/mean", math.fsum(ratios) / len(ratios)),
        ("ratio/min", min(ratios)),
        ("ratio/max", max(ratios)),
        ("kl/old", math.fsum(map(reference.k3, deltas)) / max(len(deltas), 1)),
        ("kl/reference", kl),
    ):
        close(metrics[key], expected)


@surrogates
def test_barred_tokens_compile_whole(name, fresh_compiler):
    inf, mask = math.inf, torch.ones(1, 5).bool()
    old, ref = (torch.tensor([row]) for row in ([-1.0, -inf, -inf, -1.0, -2.0], [-inf, -inf, -1.0, -1.5, -2.0]))
    options = LossOptions(surrogate=name, kl_coef=0.1)

    def loss(log_probs):
        return grpo_loss(log_probs, mask.float(), mask, options, old_log_probs=old, ref_log_probs=ref)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        log_probs = torch.tensor([[-1.0, -inf, -1.0, -inf, -1.9]], requires_grad=True)
        value, metrics = function(log_probs)
        value.backward()
        # What only the reference bars still learns from its advantage.
        assert (log_probs.grad == 0).tolist() == [[False, True, True, True, False]]
        results.append((value.detach(), metrics, log_probs.grad))
    torch.testing.assert_close(results[1], results[0])


def test_one_outlier_does_not_rule_the_metric_of_the_sampling_policy():
    old = torch.zeros(1, 1000)
    log_probs = old.clone()
    log_probs[0, 0] = 20.0
    metrics = grpo_loss(log_probs, old, torch.ones(1, 1000).bool(), old_log_probs=old).metrics
    close(metrics["kl/old"], (142.4131591 + 15 * 147.4131591) / 1000, rtol=1e-5)


@given(batches(), st.sampled_from(REDUCTIONS))
def test_grpo_loss_is_policy_loss_plus_unweighted_kl(batch, reduction):
    sizes = {"reduction": reduction, "normalizer": 5.0 if reduction == "constant" else None}
    options = LossOptions(kl_coef=0.3, kl_estimator="k2", reduction=reduction)
    loss, metrics = loss_of(batch, options, normalizer=sizes["normalizer"])
    log_probs, old, ref, advantages, mask = as_lists(
        batch.log_probs, batch.old_log_probs, batch.ref_log_probs, batch.token_advantages, batch.mask
    )
    policy = reference.aggregate(reference.surrogate(log_probs, old, advantages, mask, "clip"), mask, **sizes)
    kl = reference.aggregate(reference.kl_penalty(log_probs, ref, mask, "k2"), mask, **sizes)
    close(metrics["loss/policy"], policy)
    close(loss, policy + 0.3 * kl)


# Bad input: options are checked where they are made, see test_options.py


@pytest.mark.parametrize(
    ("options", "normalizer", "message"),
    [
        ({"kl_coef": 0.1}, None, "ref_log_probs is None; kl_coef above 0"),
        ({"reduction": "constant"}, None, "normalizer is None; reduction='constant' needs one"),
        ({"reduction": "sum"}, 2.0, "normalizer must be None with reduction='sum'"),
        ({}, 0.0, "normalizer must be above 0, got 0.0"),
        ({}, math.nan, "normalizer must be above 0, got nan"),
    ],
)
def test_what_a_loss_needs_is_named(options, normalizer, message):
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=f"^{message}"):
        grpo_loss(zeros, zeros, zeros.bool(), LossOptions(**options), old_log_probs=zeros, normalizer=normalizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": torch.zeros(2)}, r"advantages must be .*one value per response becomes one per token with"),
        ({"mask": torch.ones(2, 3)}, r"mask must be Bool.*pass mask.bool\(\)"),
        ({"mask": torch.ones(1, 3).bool()}, "mask must be .*nothing is broadcast"),
        ({"old_log_probs": torch.zeros(2, 1)}, "old_log_probs must be .*nothing is broadcast"),
        ({"log_probs": torch.zeros(2, 3).long()}, "log_probs must be Float"),
        ({"ref_log_probs": torch.zeros(2, 1)}, "ref_log_probs must be"),
        ({"normalizer": torch.ones(2)}, "normalizer"),
        ({"options": {"kl_coef": 0.1}}, "options must be of type LossOptions"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {name: torch.zeros(2, 3) for name in ("log_probs", "old_log_probs", "advantages")}
    with pytest.raises(TypeError, match=message):
        grpo_loss(**(arguments | {"mask": torch.ones(2, 3).bool()} | change))
