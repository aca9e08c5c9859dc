"""Penalties, aggregation and grpo_loss: reference, padding, gradients, precision, metrics, bad input."""

import math
from dataclasses import fields, replace
from functools import partial

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

REDUCTIONS = ["token_mean", "sequence_mean", "sequence_sum", "constant", "sum"]
ESTIMATORS = ["k1", "k2", "k3", "abs"]
surrogates = pytest.mark.parametrize("name", SURROGATES)


def loss_of(batch, options, advantages=None, **more):
    advantages = batch.token_advantages if advantages is None else advantages
    others = {"old_log_probs": batch.old_log_probs, "ref_log_probs": batch.ref_log_probs} | more
    return grpo_loss(batch.log_probs, advantages, batch.mask, options, **others)


# The KL penalty


@given(batches(), st.sampled_from(ESTIMATORS), st.sampled_from([1.0, 20.0]), st.booleans())
def test_kl_penalty_equals_the_reference(batch, estimator, spread, corrected):
    ref = batch.log_probs + spread * (batch.ref_log_probs - batch.log_probs)
    old = batch.old_log_probs if corrected else None
    actual = kl_penalty(batch.log_probs, batch.mask, ref_log_probs=ref, estimator=estimator, old_log_probs=old)
    olds = old.tolist() if corrected else None
    close(actual, reference.kl_penalty(*as_lists(batch.log_probs, ref, batch.mask), estimator, olds))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_of_the_kl_penalty(estimator, corrected):
    g = torch.Generator().manual_seed(0)
    log_probs = torch.randn(2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    # Away from 5 nats, where k3 becomes its tangent, on both sides.
    ref = torch.randn(2, 3, generator=g, dtype=torch.float64) + torch.tensor([[0.0, 9.0, 0.0], [15.0, 0.0, -9.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    old = torch.randn(2, 3, generator=g, dtype=torch.float64) if corrected else None
    penalty = partial(kl_penalty, mask=mask, ref_log_probs=ref, estimator=estimator, old_log_probs=old)
    assert gradcheck(penalty, (log_probs,))


def test_kl_penalty_times_the_ratio_is_the_kl_and_its_gradient_off_policy():
    """Summed over a vocabulary with the probabilities of the policy that sampled, which is what sampling expects."""
    g = torch.Generator().manual_seed(0)
    logits, old, ref = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    policy, old, ref = (each.log_softmax(0) for each in (logits, old, ref))
    kl = (policy.exp() * (policy - ref)).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    mask = torch.ones(1, 5).bool()
    for estimator, corrected, unbiased in (("k1", True, True), ("k3", True, True), ("k3", False, False)):
        more = {"old_log_probs": old[None]} if corrected else {}
        estimates = kl_penalty(policy[None], mask, ref_log_probs=ref[None], estimator=estimator, **more)
        mean = (old.exp() * estimates[0]).sum()
        (gradient,) = torch.autograd.grad(mean, logits, retain_graph=True)
        assert torch.allclose(mean, kl) == unbiased
        assert torch.allclose(gradient, expected) == unbiased


@pytest.mark.parametrize(("nats", "slope"), [(3.0, -1.0), (-3.0, 1.0), (0.0, 0.0)])
def test_kl_penalty_abs_counts_each_nat_alike(nats, slope):
    assert value_and_slope(nats, estimator="abs") == (abs(nats), slope)


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


@given(barred_batches(), st.sampled_from(ESTIMATORS), st.booleans())
def test_kl_penalty_of_barred_tokens_equals_the_reference(batch, estimator, corrected):
    log_probs = batch.log_probs.clone().requires_grad_()
    others = {"ref_log_probs": batch.ref_log_probs, "estimator": estimator}
    others["old_log_probs"] = batch.old_log_probs if corrected else None
    penalty = kl_penalty(log_probs, batch.mask, **others)
    olds = batch.old_log_probs.tolist() if corrected else None
    close(penalty, reference.kl_penalty(*as_lists(batch.log_probs, batch.ref_log_probs, batch.mask), estimator, olds))
    (gradient,) = torch.autograd.grad(penalty.sum(), log_probs)
    barred = batch.log_probs.isneginf() | batch.ref_log_probs.isneginf()
    if corrected:
        barred |= batch.old_log_probs.isneginf()
    assert (gradient[barred | ~batch.mask] == 0).all()
    # The other tokens have the gradient that they have among themselves.
    alone = kl_penalty(log_probs, batch.mask & ~barred, **others)
    assert torch.equal(gradient, torch.autograd.grad(alone.sum(), log_probs)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("estimator", "by_reference", "by_policy"),
    [("k1", 20.0, -20.0), ("abs", 20.0, 20.0), ("k2", 200.0, 200.0), ("k3", 19.0, 142.4131591 + 15 * 147.4131591)],
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


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
@given(batch=batches())
def test_a_global_normalizer_makes_micro_batches_add_up(batch, reduction):
    real = batch.mask.any(1).sum() if reduction.startswith("sequence") else batch.mask.sum()
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
    for reduction in ("token_mean", "sequence_mean", "sequence_sum", "sum"):
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


@given(batches(), st.sampled_from([1.0, 10.0]))
def test_grpo_loss_with_a_corrected_kl_is_that_of_plain_loops(batch, spread):
    batch = replace(batch, log_probs=batch.old_log_probs + spread * (batch.log_probs - batch.old_log_probs))
    loss, metrics = loss_of(batch, LossOptions(kl_coef=0.3, kl_correction="ratio"))
    new, old, ref, advantages, mask = as_lists(
        batch.log_probs, batch.old_log_probs, batch.ref_log_probs, batch.token_advantages, batch.mask
    )
    policy = reference.aggregate(reference.surrogate(new, old, advantages, mask, "clip"), mask)
    kl = reference.aggregate(reference.kl_penalty(new, ref, mask, old_log_probs=old), mask)
    close(loss, policy + 0.3 * kl)
    close(metrics["kl/reference"], kl)


@surrogates
@given(batch=batches(), threshold=st.sampled_from([0.0, 0.05, 0.2, 100.0]))
def test_grpo_loss_with_a_threshold_is_that_of_plain_loops(batch, name, threshold):
    """Value, metric and gradient: the tokens that are dropped have none, the others what they had."""
    options = LossOptions(surrogate=SURROGATES[name], off_policy_threshold=threshold, kl_coef=0.1)
    batch = replace(batch, log_probs=batch.log_probs.clone().requires_grad_())
    loss, metrics = loss_of(batch, options)
    new, old, ref, advantages, mask = as_lists(
        batch.log_probs, batch.old_log_probs, batch.ref_log_probs, batch.token_advantages, batch.mask
    )
    dropped = reference.off_policy_dropped(new, old, advantages, mask, threshold)
    parameters = {each.name: getattr(SURROGATES[name], each.name) for each in fields(SURROGATES[name]) if each.init}
    losses = reference.surrogate(new, old, advantages, mask, name, **parameters)
    kept = [[0.0 if gone else x for x, gone in zip(*rows, strict=True)] for rows in zip(losses, dropped, strict=True)]
    policy = reference.aggregate(kept, mask)
    close(metrics["loss/policy"], policy)
    close(loss, policy + 0.1 * reference.aggregate(reference.kl_penalty(new, ref, mask), mask))
    close(metrics["off_policy/dropped"], sum(map(sum, dropped)) / max(sum(map(sum, mask)), 1))
    only = replace(options, kl_coef=0.0)
    (gradient,) = torch.autograd.grad(loss_of(batch, only).loss, batch.log_probs)
    (whole,) = torch.autograd.grad(loss_of(batch, replace(only, off_policy_threshold=None)).loss, batch.log_probs)
    close(gradient, torch.where(torch.tensor(dropped), 0.0, whole))


def test_a_threshold_drops_a_wrong_response_that_was_left_behind_and_no_right_one_by_hand():
    """Three responses whose old policy is likelier by 0.3 nats per token: right, wrong, and wrong but nearer."""
    old = torch.full((3, 2), -1.0, dtype=torch.float64)
    log_probs = (old - torch.tensor([[0.3, 0.3], [0.5, 0.1], [0.5, -0.1]], dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([[1.0], [-1.0], [-1.0]], dtype=torch.float64).expand(3, 2)
    options = LossOptions(off_policy_threshold=0.25, reduction="sum")
    loss, metrics = grpo_loss(log_probs, advantages, old < 0, options, old_log_probs=old)
    loss.backward()
    assert (log_probs.grad != 0).tolist() == [[True, True], [False, False], [False, True]]  # 0.8 > e^-0.5: clipped
    close(loss, -2 * math.exp(-0.3) + 0.8 + math.exp(0.1))
    close(metrics["off_policy/dropped"], 1 / 3)


def test_a_nan_is_not_hidden_by_a_threshold():
    log_probs = torch.tensor([[math.nan, -1.0]])
    options, mask = LossOptions(off_policy_threshold=0.1), torch.ones(1, 2).bool()
    assert grpo_loss(log_probs, -torch.ones(1, 2), mask, options, old_log_probs=-torch.ones(1, 2)).loss.isnan()


def test_luspo_is_gspo_with_the_sum_of_a_response():
    """Length times the loss of the response, averaged over responses: by hand, with lengths 1 and 3."""
    old = torch.full((2, 3), -1.0, dtype=torch.float64)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    log_probs = (old + torch.tensor([[0.1], [-0.1]])).requires_grad_()
    options = LossOptions(surrogate="gspo", reduction="sequence_sum")
    advantages = torch.tensor([[1.0], [2.0]], dtype=torch.float64).expand(2, 3)
    loss = grpo_loss(log_probs, advantages, mask, options, old_log_probs=old).loss
    close(loss, -(1 * math.exp(0.1) + 3 * 2 * math.exp(-0.1)) / 2, rtol=1e-6)


@given(batches(), st.sampled_from(["token_mean", "sequence_mean", "sum"]), st.sampled_from(["k1", "k2", "k3"]))
def test_options_that_are_off_leave_the_loss_as_it_was_bit_for_bit(batch, reduction, estimator):
    """The formulas of before, written out in float32, in the same order of operations."""
    new, old, ref, credit = (
        torch.where(batch.mask, each, 0.0).float()
        for each in (batch.log_probs, batch.old_log_probs, batch.ref_log_probs, batch.token_advantages)
    )
    new.requires_grad_()
    options = LossOptions(reduction=reduction, kl_coef=0.1, kl_estimator=estimator)
    loss = grpo_loss(new, credit, batch.mask, options, old_log_probs=old, ref_log_probs=ref).loss
    ratio, delta = (new - old).clamp(-20, 20).exp(), ref - new
    bounded = delta.clamp(max=5.0)
    k3 = torch.expm1(bounded) - bounded + math.expm1(5.0) * torch.relu(delta - 5.0)
    penalty = {"k1": -delta, "k2": 0.5 * delta.square(), "k3": k3}[estimator]
    policy = -torch.minimum(ratio * credit, ratio.clamp(0.8, 1.2) * credit)

    def total(losses):
        if reduction == "sequence_mean":
            lengths = batch.mask.sum(1)
            means = torch.where(lengths > 0, torch.where(batch.mask, losses, 0.0).sum(1) / lengths.clamp(min=1), 0.0)
            return means.sum() / batch.mask.any(1).sum().clamp(min=1)
        summed = torch.where(batch.mask, losses, 0.0).sum()
        return summed if reduction == "sum" else summed / batch.mask.sum().clamp(min=1)

    expected = total(policy) + 0.1 * total(penalty)
    assert torch.equal(loss, expected)
    for actual, wanted in zip(torch.autograd.grad(loss, new), torch.autograd.grad(expected, new), strict=True):
        close(actual, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        LossOptions(kl_coef=0.1, kl_correction="ratio", kl_estimator="abs", reduction="sequence_sum"),
        LossOptions(surrogate="vespo", off_policy_threshold=0.1),
        LossOptions(surrogate={"name": "cispo", "min_ratio": 0.5}),
    ],
    ids=lambda options: options.surrogate.name,
)
def test_grpo_loss_with_peers_options_compiles_whole(options, fresh_compiler):
    g = torch.Generator().manual_seed(0)
    old, ref, advantages = (torch.randn(3, 4, generator=g) for _ in range(3))
    mask = torch.rand(3, 4, generator=g) < 0.8

    def loss(log_probs):
        return grpo_loss(log_probs, advantages, mask, options, old_log_probs=old, ref_log_probs=ref)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        log_probs = (old + 0.3 * ref).requires_grad_()
        value, metrics = function(log_probs)
        results.append((value.detach(), metrics, torch.autograd.grad(value, log_probs)))
    torch.testing.assert_close(results[1], results[0])


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
