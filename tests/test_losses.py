"""Surrogates, penalties, aggregation and grpo_loss: reference, padding, gradients, precision, metrics, bad input."""

import math
from dataclasses import replace

import pytest
import reference
import torch
from batches import batches
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from srpo_core import (
    aggregate,
    cispo_surrogate,
    clipped_surrogate,
    grpo_loss,
    gspo_surrogate,
    gspo_token_surrogate,
    kl_penalty,
    sapo_surrogate,
    shared_baseline_weights,
)

SURROGATES = {
    "clip": (clipped_surrogate, {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5}),
    "cispo": (cispo_surrogate, {"max_ratio": 1.1}),
    "sapo": (sapo_surrogate, {"temperature_positive": 0.8, "temperature_negative": 1.3}),
    "gspo_token": (gspo_token_surrogate, {"clip_low": 0.05, "clip_high": 0.1}),
    "gspo": (gspo_surrogate, {"clip_low": 0.05, "clip_high": 0.1}),
}
TOKEN_RATIO = ["clip", "cispo", "sapo", "gspo_token"]
REDUCTIONS = ["token_mean", "sequence_mean", "constant", "sum"]
surrogates = pytest.mark.parametrize("name", SURROGATES)


def close(actual, expected, **tolerance):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, **({"rtol": 1e-9, "atol": 1e-12} | tolerance))


def inputs(batch, advantages=None):
    advantages = batch.token_advantages if advantages is None else advantages
    return batch.log_probs, batch.old_log_probs, advantages, batch.mask


def as_lists(*tensors):
    return [tensor.tolist() for tensor in tensors]


@surrogates
@given(batch=batches())
def test_surrogates_equal_the_reference(batch, name):
    function, options = SURROGATES[name]
    for chosen in ({}, options):
        actual = function(*inputs(batch), **chosen)
        close(actual, reference.surrogate(*as_lists(*inputs(batch)), name, **chosen))


@given(batches(), st.sampled_from(["k1", "k2", "k3"]))
def test_kl_penalty_equals_the_reference(batch, estimator):
    args = (batch.log_probs, batch.ref_log_probs, batch.mask)
    close(kl_penalty(*args, estimator=estimator), reference.kl_penalty(*as_lists(*args), estimator))


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


@surrogates
@given(batch=batches())
def test_invariant_8_padding_reaches_neither_loss_nor_gradient(batch, name):
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
        loss, metrics = grpo_loss(
            *inputs(filled, advantages), ref_log_probs=filled.ref_log_probs, kl_coef=0.1, surrogate=name
        )
        (gradient,) = torch.autograd.grad(loss, filled.log_probs)
        assert loss.isfinite()
        assert (gradient[~batch.mask] == 0).all()
        assert gradient.isfinite().all()
        assert all(metric.isfinite() for metric in metrics.values())
        results.append((loss, gradient))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("name", TOKEN_RATIO)
@given(batch=batches())
def test_invariant_13_a_weighted_advantage_is_a_weighted_loss(batch, name):
    """Value, gradient and every clip mask, so nothing but the size of a token's update changes."""
    function, options = SURROGATES[name]
    weights = shared_baseline_weights(batch.visual, batch.consistency, batch.roles, batch.mask)
    log_probs = batch.log_probs.clone().requires_grad_()
    batch = replace(batch, log_probs=log_probs)
    plain = function(*inputs(batch), **options)
    weighted = function(*inputs(batch, weights * batch.token_advantages), **options)
    close(weighted, weights * plain.detach())
    (plain_gradient,) = torch.autograd.grad(plain.sum(), log_probs)
    (weighted_gradient,) = torch.autograd.grad(weighted.sum(), log_probs)
    close(weighted_gradient, weights * plain_gradient)


@given(batches())
def test_invariant_14_mass_is_conserved_under_every_normalizer(batch):
    """Mean-one weights over a whole response leave its share of the batch alone, however losses are averaged."""
    roles = torch.where(batch.mask, batch.roles.clamp(1, 2), 0)
    batch = replace(batch, roles=roles, visual=batch.visual.nan_to_num(), consistency=batch.consistency.nan_to_num())
    weights = shared_baseline_weights(batch.visual, batch.consistency, batch.roles, batch.mask)
    for reduction in ("token_mean", "sequence_mean", "sum"):
        close(
            aggregate(weights, batch.mask, reduction=reduction),
            aggregate(batch.mask.double(), batch.mask, reduction=reduction),
        )


@surrogates
def test_gradients_away_from_kinks(name):
    function, options = SURROGATES[name]
    g = torch.Generator().manual_seed(3)
    old = -torch.rand(3, 4, generator=g, dtype=torch.float64)
    log_probs = (old + 0.03 * torch.randn(3, 4, generator=g, dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[:, None].expand(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]]).bool()
    if name in ("cispo", "gspo_token"):  # their values hold a stopped gradient: compare with the written derivative
        loss = function(log_probs, old, advantages, mask, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
        log_ratio = torch.where(mask, log_probs.detach() - old, 0.0)
        if name == "cispo":
            ratio = log_ratio.exp().clamp(max=options["max_ratio"])
        else:
            ratio = (log_ratio.sum(1) / mask.sum(1)).exp()[:, None]
        close(gradient, torch.where(mask, -ratio * advantages, 0.0))
    else:
        assert gradcheck(lambda x: function(x, old, advantages, mask, **options), (log_probs,))


def test_clipped_tokens_have_no_gradient_and_dual_clip_frees_runaway_ones():
    log_probs = torch.tensor([[0.5, -0.5, 0.5, -0.5, 2.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, -1.0]])
    losses = clipped_surrogate(log_probs, torch.zeros(1, 5), advantages, torch.ones(1, 5).bool(), dual_clip=3.0)
    losses.sum().backward()
    assert (log_probs.grad != 0).tolist() == [[False, True, True, False, False]]
    assert losses[0, 4].item() == 3.0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_gradient(estimator):
    g = torch.Generator().manual_seed(0)
    log_probs = torch.randn(2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(2, 3, generator=g, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert gradcheck(lambda x: kl_penalty(x, ref, mask, estimator=estimator), (log_probs,))


def test_k3_keeps_its_precision_near_the_reference():
    log_probs = torch.tensor([[-1.0]])
    assert kl_penalty(log_probs, log_probs + 1e-4, torch.tensor([[True]])).item() == pytest.approx(5e-9, rel=0.01)


def test_only_log_probs_get_a_gradient():
    tensors = [torch.zeros(1, 2, requires_grad=True) for _ in range(4)]
    log_probs, old, advantages, ref = tensors
    for name in TOKEN_RATIO:
        loss = grpo_loss(
            log_probs, old, advantages + 1.0, torch.ones(1, 2).bool(), ref_log_probs=ref, kl_coef=0.1, surrogate=name
        ).loss
        loss.backward()
    assert log_probs.grad is not None
    assert old.grad is advantages.grad is ref.grad is None


@surrogates
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_learn_from_is_a_zero_loss_in_the_graph(name, shape, reduction):
    log_probs = torch.full(shape, torch.nan, requires_grad=True)
    filler = torch.full(shape, torch.nan)
    loss, metrics = grpo_loss(
        log_probs,
        filler,
        filler,
        torch.zeros(shape).bool(),
        ref_log_probs=filler,
        kl_coef=0.1,
        surrogate=name,
        reduction=reduction,
        normalizer=3.0 if reduction == "constant" else None,
    )
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(log_probs.grad, torch.zeros(shape))
    assert all(metric.isfinite() for metric in metrics.values())


@pytest.mark.parametrize("name", TOKEN_RATIO)
def test_runaway_ratios_saturate(name):
    log_probs = torch.tensor([[500.0, -500.0]], requires_grad=True)
    loss = grpo_loss(log_probs, torch.zeros(1, 2), -torch.ones(1, 2), torch.ones(1, 2).bool(), surrogate=name).loss
    loss.backward()
    assert loss.isfinite()
    assert log_probs.grad.isfinite().all()


def test_a_runaway_kl_stays_finite():
    log_probs = torch.tensor([[-500.0]], requires_grad=True)
    penalty = kl_penalty(log_probs, torch.zeros(1, 1), torch.tensor([[True]]))
    penalty.sum().backward()
    assert penalty.isfinite()
    assert log_probs.grad.isfinite()


def test_bfloat16_is_no_further_from_the_truth_than_the_naive_formula_in_bfloat16():
    g = torch.Generator().manual_seed(0)
    old = -5 * torch.rand(8, 64, generator=g).bfloat16()
    log_probs = (old.float() + 0.1 * torch.randn(8, 64, generator=g)).bfloat16()
    advantages, mask = torch.randn(8, 64, generator=g).bfloat16(), torch.ones(8, 64).bool()
    truth = grpo_loss(log_probs.double(), old.double(), advantages.double(), mask).loss
    ours = grpo_loss(log_probs, old, advantages, mask).loss
    ratio = (log_probs - old).exp()
    naive = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    assert ours.dtype == torch.float32
    assert (ours - truth).abs() < 1e-6 < (naive - truth).abs()


@given(batches())
def test_metrics_of_the_ratio(batch):
    metrics = grpo_loss(
        *inputs(batch), clip_low=0.1, clip_high=0.2, dual_clip=1.3, ref_log_probs=batch.ref_log_probs
    ).metrics
    ratio = (batch.log_probs - batch.old_log_probs).exp()[batch.mask]
    credit = batch.token_advantages[batch.mask]
    if len(ratio) == 0:
        assert metrics["ratio/max"] == metrics["ratio/min"] == metrics["ratio/mean"] == 1
        return
    close(metrics["ratio/max"], ratio.max())
    close(metrics["ratio/min"], ratio.min())
    close(metrics["ratio/mean"], ratio.mean())
    close(metrics["clip/low"], ((ratio < 0.9) & (credit < 0)).double().mean())
    close(metrics["clip/high"], ((ratio > 1.2) & (credit > 0)).double().mean())
    close(metrics["clip/dual"], ((ratio > 1.3) & (credit < 0)).double().mean())
    close(metrics["kl/old"], (ratio - 1 - ratio.log()).mean())
    delta = (batch.ref_log_probs - batch.log_probs)[batch.mask]
    close(metrics["kl/reference"], (delta.exp() - delta - 1).mean())
    assert all(metric.ndim == 0 and not metric.requires_grad for metric in metrics.values())


@given(batches(), st.sampled_from(REDUCTIONS))
def test_grpo_loss_is_policy_loss_plus_unweighted_kl(batch, reduction):
    options = {"reduction": reduction, "normalizer": 5.0 if reduction == "constant" else None}
    loss, metrics = grpo_loss(
        *inputs(batch), ref_log_probs=batch.ref_log_probs, kl_coef=0.3, kl_estimator="k2", **options
    )
    policy = reference.aggregate(reference.surrogate(*as_lists(*inputs(batch)), "clip"), batch.mask.tolist(), **options)
    kl = reference.aggregate(
        reference.kl_penalty(*as_lists(batch.log_probs, batch.ref_log_probs, batch.mask), "k2"),
        batch.mask.tolist(),
        **options,
    )
    close(metrics["loss/policy"], policy)
    close(loss, policy + 0.3 * kl)


def test_gspo_refuses_token_advantages_and_says_why():
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
    with pytest.raises(ValueError, match=r"advantages differ inside a response; GSPO's sequence-level .*gspo_token"):
        grpo_loss(zeros, zeros, torch.tensor([[1.5, 0.5]]), mask, surrogate="gspo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_low": 1.0}, r"clip_low must be in \[0, 1\), got 1.0"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high must be at least 0"),
        ({"clip_high": math.nan}, "clip_high"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"surrogate": "cispo", "max_ratio": 0.0}, "max_ratio must be above 0"),
        ({"surrogate": "sapo", "temperature_positive": 0.0}, "temperature_positive must be above 0"),
        ({"surrogate": "sapo", "temperature_negative": -1.0}, "temperature_negative must be above 0"),
        ({"kl_coef": -0.1}, "kl_coef must be at least 0"),
        ({"kl_coef": 0.1}, "ref_log_probs is None; kl_coef above 0"),
        ({"reduction": "constant"}, "normalizer is None; reduction='constant' needs one"),
        ({"reduction": "sum", "normalizer": 2.0}, "normalizer must be None with reduction='sum'"),
        ({"normalizer": 0.0}, "normalizer must be above 0, got 0.0"),
    ],
)
def test_options_out_of_range_are_named(change, message):
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        grpo_loss(zeros, zeros, zeros, zeros.bool(), **change)


@pytest.mark.parametrize("option", ["surrogate", "reduction", "kl_estimator"])
def test_unknown_option_names_are_named(option):
    zeros = torch.zeros(1, 2)
    with pytest.raises(TypeError, match=f"{option} must be one of '.*', got 'typo'"):
        grpo_loss(zeros, zeros, zeros, zeros.bool(), **{option: "typo"})


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
    ],
)
def test_wrong_tensors_are_named(change, message):
    arguments = {name: torch.zeros(2, 3) for name in ("log_probs", "old_log_probs", "advantages")}
    with pytest.raises(TypeError, match=message):
        grpo_loss(**(arguments | {"mask": torch.ones(2, 3).bool()} | change))
