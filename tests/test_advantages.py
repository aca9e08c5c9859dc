"""Group-relative advantages and token advantages: reference, groups that lie anywhere, degenerate groups, bad input."""

import math

import pytest
import torch
from batches import batches
from helpers import close
from hypothesis import given
from hypothesis import strategies as st
from reference import group_advantages as reference_group_advantages

from srpo_core import group_advantages, role_advantages, shared_baseline_weights

NORMALIZATIONS = ["std", "none", "leave_one_out"]
rewards_in_groups = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 1.0, -3.7, 100.0]), st.integers(-2, 3)), min_size=1, max_size=20
)


@given(rewards_in_groups, st.sampled_from(NORMALIZATIONS), st.sampled_from([0.0, 1e-4, 1.0]))
def test_group_advantages_equal_the_reference(pairs, normalization, epsilon):
    rewards, ids = zip(*pairs, strict=True)
    actual = group_advantages(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(ids), normalization=normalization, epsilon=epsilon
    )
    close(actual, reference_group_advantages(rewards, ids, normalization, epsilon))


@given(rewards_in_groups, st.sampled_from(NORMALIZATIONS))
def test_groups_may_lie_anywhere(pairs, normalization):
    rewards, ids = (torch.tensor(column) for column in zip(*pairs, strict=True))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    straight = group_advantages(rewards, ids, normalization=normalization)
    permuted = group_advantages(rewards[order], ids[order], normalization=normalization)
    torch.testing.assert_close(permuted, straight[order])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_equal_rewards_and_lone_responses_have_advantage_exactly_zero(normalization):
    rewards = torch.tensor([0.1, 0.1, 0.1, 7.0, 0.1, 0.1, 0.1])
    ids = torch.tensor([0, 0, 0, 1, 0, 0, 0])
    advantages = group_advantages(rewards, ids, normalization=normalization, epsilon=0.0)
    assert torch.equal(advantages, torch.zeros(7))


def test_group_advantages_by_hand():
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4).long(), epsilon=0.0)
    torch.testing.assert_close(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5]))


@given(batches())
def test_role_advantages_keep_the_sign_of_the_response(batch):
    weights = shared_baseline_weights(batch.scores, batch.roles, batch.mask)
    actual = role_advantages(weights, batch.advantages, batch.mask)
    expected = torch.where(batch.mask, batch.advantages[:, None].sign(), 0.0)
    assert torch.equal(actual.sign(), expected)


@given(batches())
def test_padding_is_zero_even_where_weights_are_nan(batch):
    weights = torch.where(batch.mask, 2.0, torch.nan)
    actual = role_advantages(weights.double(), batch.advantages, batch.mask)
    assert torch.equal(actual, torch.where(batch.mask, 2.0 * batch.advantages[:, None], 0.0))


def test_no_gradient_reaches_the_weights():
    weights, advantages = torch.ones(1, 2, requires_grad=True), torch.ones(1, requires_grad=True)
    assert not role_advantages(weights, advantages, torch.ones(1, 2).bool()).requires_grad
    assert not group_advantages(advantages, torch.zeros(1).long()).requires_grad


def test_bad_input_is_named():
    rewards, ids = torch.zeros(3), torch.zeros(3).long()
    with pytest.raises(TypeError, match=r"group_ids must be Int\[Tensor, 'batch'\] with batch=3 \(from rewards\)"):
        group_advantages(rewards, ids[:2])
    with pytest.raises(TypeError, match="group_ids must be Int.*pass group_ids.long"):
        group_advantages(rewards, rewards)
    with pytest.raises(TypeError, match="rewards must be .*one value per response, not one per token"):
        group_advantages(rewards[:, None], ids)
    with pytest.raises(ValueError, match="^rewards is NaN at trajectory 1"):
        group_advantages(torch.tensor([0.0, math.nan, 0.0]), ids)
    for epsilon in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"^epsilon must be at least 0, got {epsilon}"):
            group_advantages(rewards, ids, epsilon=epsilon)
    with pytest.raises(ValueError, match="normalization must be one of 'std', 'none', 'leave_one_out', got 'mean'"):
        group_advantages(rewards, ids, normalization="mean")
    with pytest.raises(TypeError, match="advantages must be"):
        role_advantages(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2).bool())
    assert group_advantages(rewards[:0], ids[:0]).shape == (0,)
