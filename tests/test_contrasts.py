"""Contrasts: the float64 reference, infinities, detachment, and bad input."""

import math

import pytest
import torch
from batches import batches
from hypothesis import given
from hypothesis import strategies as st
from reference import PERCEPTION, REASONING
from reference import scores as reference_scores

from srpo_core import perception_consistency, visual_dependency

KINDS = ["log_ratio", "positive", "abs", "k3"]
BOTH = pytest.mark.parametrize(
    ("score", "role"), [(visual_dependency, PERCEPTION), (perception_consistency, REASONING)]
)


@BOTH
@given(batch=batches(), kind=st.sampled_from(KINDS), clip=st.sampled_from([0.1, 1.0, 5.0]))
def test_equals_the_reference(batch, kind, clip, score, role):
    actual = score(batch.log_probs, batch.corrupted_log_probs, batch.roles, batch.mask, kind=kind, clip=clip)
    expected = reference_scores(
        batch.log_probs.tolist(),
        batch.corrupted_log_probs.tolist(),
        batch.roles.tolist(),
        batch.mask.tolist(),
        role,
        kind,
        clip,
    )
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_infinities(kind, score, role):
    """Excluded by both contexts: 0. By one: the clip, with the sign of the difference where the kind has one."""
    log_probs = torch.tensor([[-math.inf, -1.0, -math.inf]])
    other = torch.tensor([[-math.inf, -math.inf, -1.0]])
    actual = score(log_probs, other, torch.full((1, 3), role), torch.ones(1, 3).bool(), kind=kind)
    lost = {"log_ratio": -5.0, "positive": 0.0}.get(kind, 5.0)
    assert actual.tolist() == [[0.0, 5.0, lost]]


@BOTH
def test_k3_keeps_its_precision_near_zero(score, role):
    log_probs = torch.tensor([[-1.0]], dtype=torch.float64)
    actual = score(log_probs, log_probs - 1e-6, torch.tensor([[role]]), torch.tensor([[True]]), kind="k3")
    assert actual.item() == pytest.approx(0.5e-12, rel=1e-3)


@BOTH
def test_half_precision_is_subtracted_in_float32_without_a_gradient(score, role):
    log_probs = torch.tensor([[-3.0]], dtype=torch.bfloat16, requires_grad=True)
    other = torch.tensor([[-3.001953125]], requires_grad=True)
    actual = score(log_probs, other, torch.tensor([[role]]), torch.tensor([[True]]))
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(0.001953125)
    assert not actual.requires_grad


@BOTH
def test_wrong_values_and_options_are_named(score, role):
    zeros, roles, mask = torch.zeros(1, 2), torch.full((1, 2), role), torch.ones(1, 2).bool()
    nan = torch.tensor([[0.0, math.nan]])
    other = "corrupted_log_probs" if role == PERCEPTION else "counterfactual_log_probs"
    with pytest.raises(ValueError, match="^log_probs is NaN at trajectory 0 token 1"):
        score(nan, zeros, roles, mask)
    with pytest.raises(ValueError, match=f"{other} is NaN at trajectory 0 token 1"):
        score(zeros, nan, roles, mask)
    with pytest.raises(ValueError, match="clip must be above 0 nats, got 0.0"):
        score(zeros, zeros, roles, mask, clip=0.0)
    with pytest.raises(TypeError, match="kind must be one of 'log_ratio', .* got 'kl'"):
        score(zeros, zeros, roles, mask, kind="kl")
    with pytest.raises(ValueError, match="roles is 7 at trajectory 0 token 0"):
        score(zeros, zeros, torch.full((1, 2), 7), mask)
    with pytest.raises(TypeError, match=f"{other} must be .*nothing is broadcast"):
        score(zeros, zeros[:, :1], roles, mask)


@BOTH
def test_an_empty_batch_is_empty(score, role):
    empty = torch.zeros(0, 3)
    assert score(empty, empty, empty.long(), empty.bool()).shape == (0, 3)
