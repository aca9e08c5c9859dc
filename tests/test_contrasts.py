"""Contrasts: the float64 reference, infinities, detachment, and bad input."""

import math
from functools import partial

import pytest
import torch
from barred import barred_batches
from batches import batches
from helpers import as_lists, close
from hypothesis import given
from hypothesis import strategies as st
from reference import PERCEPTION, REASONING
from reference import scores as reference_scores

from srpo_core import perception_consistency, visual_dependency
from srpo_core.contrasts import clip_divergence, contrast

KINDS = ["log_ratio", "positive", "abs", "k3"]


def score_of(function, other_name, log_probs, roles, mask, *, other, **options):
    return function(log_probs, roles, mask, **{other_name: other}, **options)


BOTH = pytest.mark.parametrize(
    ("score", "role", "other_name"),
    [
        (partial(score_of, visual_dependency, "corrupted_log_probs"), PERCEPTION, "corrupted_log_probs"),
        (partial(score_of, perception_consistency, "counterfactual_log_probs"), REASONING, "counterfactual_log_probs"),
    ],
    ids=["visual_dependency", "perception_consistency"],
)


@BOTH
@given(batch=batches(), kind=st.sampled_from(KINDS), clip=st.sampled_from([0.1, 1.0, 5.0]))
def test_equals_the_reference(batch, kind, clip, score, role, other_name):
    tensors = (batch.log_probs, batch.corrupted_log_probs, batch.roles, batch.mask)
    log_probs, other, roles, mask = tensors
    actual = score(log_probs, roles, mask, other=other, kind=kind, clip=clip)
    close(actual, reference_scores(*as_lists(*tensors), role, kind, clip), rtol=1e-10)


@given(batches())
def test_visual_dependency_and_perception_consistency_are_zero_where_the_other_one_is_not(batch):
    """So that their sum is the score of each token under its role."""
    args, others = (batch.log_probs, batch.roles, batch.mask), batch.corrupted_log_probs
    visual = visual_dependency(*args, corrupted_log_probs=others)
    consistency = perception_consistency(*args, counterfactual_log_probs=others)
    assert torch.equal(visual * consistency, torch.zeros_like(visual))
    assert torch.equal((visual + consistency)[~batch.scored], torch.zeros(int((~batch.scored).sum())).double())
    assert torch.equal(visual + consistency, contrast(*args[:1], others, batch.scored, kind="log_ratio", clip=5.0))


@BOTH
@given(batch=barred_batches(), kind=st.sampled_from(KINDS), clip=st.sampled_from([0.1, 5.0, 30.0, math.inf]))
def test_barred_tokens_equal_the_reference(batch, kind, clip, score, role, other_name):
    tensors = (batch.log_probs, batch.corrupted_log_probs, batch.roles, batch.mask)
    log_probs, other, roles, mask = tensors
    actual = score(log_probs, roles, mask, other=other, kind=kind, clip=clip)
    close(actual, reference_scores(*as_lists(*tensors), role, kind, clip), rtol=1e-10)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_infinities(kind, score, role, other_name):
    """Barred by both contexts: 0. By one: the clip, with the sign of the difference where the kind has one."""
    log_probs = torch.tensor([[-math.inf, -1.0, -math.inf]])
    other = torch.tensor([[-math.inf, -math.inf, -1.0]])
    actual = score(log_probs, torch.full((1, 3), role), torch.ones(1, 3).bool(), other=other, kind=kind)
    lost = {"log_ratio": -5.0, "positive": 0.0}.get(kind, 5.0)
    assert actual.tolist() == [[0.0, 5.0, lost]]


@BOTH
def test_k3_keeps_its_precision_near_zero(score, role, other_name):
    log_probs = torch.tensor([[-1.0]], dtype=torch.float64)
    actual = score(log_probs, torch.tensor([[role]]), torch.tensor([[True]]), other=log_probs - 1e-6, kind="k3")
    assert actual.item() == pytest.approx(0.5e-12, rel=1e-3)


@BOTH
def test_half_precision_is_subtracted_in_float32_without_a_gradient(score, role, other_name):
    log_probs = torch.tensor([[-3.0]], dtype=torch.bfloat16, requires_grad=True)
    other = torch.tensor([[-3.001953125]], requires_grad=True)
    actual = score(log_probs, torch.tensor([[role]]), torch.tensor([[True]]), other=other)
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(0.001953125)
    assert not actual.requires_grad


@BOTH
def test_wrong_values_and_options_are_named(score, role, other_name):
    zeros, roles, mask = torch.zeros(1, 2), torch.full((1, 2), role), torch.ones(1, 2).bool()
    nan = torch.tensor([[0.0, math.nan]])
    with pytest.raises(ValueError, match="^log_probs is NaN at trajectory 0 token 1"):
        score(nan, roles, mask, other=zeros)
    with pytest.raises(ValueError, match=f"^{other_name} is NaN at trajectory 0 token 1"):
        score(zeros, roles, mask, other=nan)
    with pytest.raises(ValueError, match=f"^{other_name} is inf at trajectory 0 token 1.* barred token; look for"):
        score(zeros, roles, mask, other=torch.tensor([[0.0, math.inf]]))
    for clip in (0.0, math.nan):
        with pytest.raises(ValueError, match=f"^clip must be above 0, got {clip}"):
            score(zeros, roles, mask, other=zeros, clip=clip)
    with pytest.raises(ValueError, match="kind must be one of 'log_ratio', .* got 'kl'"):
        score(zeros, roles, mask, other=zeros, kind="kl")
    with pytest.raises(ValueError, match="^roles is 7 at trajectory 0 token 0"):
        score(zeros, torch.full((1, 2), 7), mask, other=zeros)
    with pytest.raises(TypeError, match=f"{other_name} must be .*nothing is broadcast"):
        score(zeros, roles, mask, other=zeros[:, :1])


@BOTH
def test_an_empty_batch_is_empty(score, role, other_name):
    empty = torch.zeros(0, 3)
    assert score(empty, empty.long(), empty.bool(), other=empty).shape == (0, 3)


@given(batches(), st.sampled_from([0.1, 5.0]))
def test_clip_divergence_is_the_divergence_where_it_is_read(batch, clip):
    divergence = torch.where(batch.scored, batch.scores.abs(), torch.nan).requires_grad_()
    actual = clip_divergence(divergence, batch.scored, clip=clip)
    close(actual, [[min(x, clip) if x == x else 0.0 for x in row] for row in divergence.tolist()])
    assert not actual.requires_grad
    assert clip_divergence(divergence.bfloat16(), batch.scored, clip=clip).dtype == torch.float32


def test_an_infinite_divergence_is_one_of_20_nats():
    """Where one context bars a token that the other allows; a score has to stay finite under any clip."""
    divergence, where = torch.tensor([[math.inf, 3.0, math.inf]]), torch.tensor([[True, True, False]])
    for clip, expected in ((5.0, 5.0), (30.0, 20.0), (math.inf, 20.0)):
        assert clip_divergence(divergence, where, clip=clip).tolist() == [[expected, min(3.0, clip), 0.0]]
