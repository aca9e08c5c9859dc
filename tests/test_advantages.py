"""Group-relative advantages and token advantages: reference, groups that lie anywhere, degenerate groups, bad input."""

import math

import pytest
import reference
import torch
from batches import batches
from helpers import close
from hypothesis import given
from hypothesis import strategies as st

from srpo_core import group_advantages, grpo_loss, role_advantages, shared_baseline_weights
from srpo_core.advantages import multi_reward_advantages, top_entropy_mask

NORMALIZATIONS = ["std", "none", "leave_one_out", "batch_std", "length_weighted"]
rewards_in_groups = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 1.0, -3.7, 100.0]), st.integers(-2, 3)), min_size=1, max_size=20
)


def lengths_of(rows):
    """Some numbers of tokens, all different."""
    return 3 + torch.arange(len(rows)) * 7 % 23


@given(rewards_in_groups, st.sampled_from(NORMALIZATIONS), st.sampled_from([0.0, 1e-4, 1.0]))
def test_group_advantages_equal_the_reference(pairs, normalization, epsilon):
    rewards, ids = zip(*pairs, strict=True)
    actual = group_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(ids),
        normalization=normalization,
        epsilon=epsilon,
        lengths=lengths_of(ids),
    )
    close(actual, reference.group_advantages(rewards, ids, normalization, epsilon, lengths_of(ids).tolist()))


@given(rewards_in_groups, st.sampled_from(NORMALIZATIONS))
def test_groups_may_lie_anywhere(pairs, normalization):
    rewards, ids = (torch.tensor(column) for column in zip(*pairs, strict=True))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    lengths = lengths_of(ids)
    straight = group_advantages(rewards, ids, normalization=normalization, lengths=lengths)
    permuted = group_advantages(rewards[order], ids[order], normalization=normalization, lengths=lengths[order])
    torch.testing.assert_close(permuted, straight[order])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_equal_rewards_and_lone_responses_have_advantage_exactly_zero(normalization):
    rewards = torch.tensor([0.1, 0.1, 0.1, 7.0, 0.1, 0.1, 0.1])
    ids = torch.tensor([0, 0, 0, 1, 0, 0, 0])
    epsilon = 0.0 if normalization in ("std", "batch_std") else 1e-4
    advantages = group_advantages(rewards, ids, normalization=normalization, epsilon=epsilon, lengths=lengths_of(ids))
    assert torch.equal(advantages, torch.zeros(7))


def test_group_advantages_by_hand():
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4).long(), epsilon=0.0)
    torch.testing.assert_close(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5]))


def test_group_advantages_by_the_std_of_the_batch_by_hand():
    """Means 1 and 10, and a batch whose standard deviation is that of 0, 2, 9, 11: sqrt(85 / 3)."""
    rewards = torch.tensor([0.0, 9.0, 2.0, 11.0], dtype=torch.float64)
    advantages = group_advantages(rewards, torch.tensor([0, 1, 0, 1]), normalization="batch_std", epsilon=0.5)
    scale = math.sqrt(85 / 3) + 0.5
    close(advantages, [-1 / scale, -1 / scale, 1 / scale, 1 / scale])


def test_group_advantages_with_a_baseline_weighted_by_length_by_hand():
    """The baseline is (10 * 1 + 30 * 0) / 40."""
    rewards, lengths = torch.tensor([1.0, 0.0]), torch.tensor([10, 30])
    advantages = group_advantages(rewards, torch.zeros(2).long(), normalization="length_weighted", lengths=lengths)
    assert advantages.tolist() == [0.75, -0.25]
    close((lengths * advantages).sum(), 0.0)
    with pytest.raises(ValueError, match=r"^lengths is None; .*'length_weighted' needs .*: pass lengths=mask.sum\(1\)"):
        group_advantages(rewards, torch.zeros(2).long(), normalization="length_weighted")


@pytest.mark.parametrize("size", [1e200, 1.0, 1e-200])
def test_group_advantages_by_the_std_of_the_batch_do_not_depend_on_the_unit(size):
    rewards = size * torch.tensor([1.0, 0.0, 3.0, 1.0], dtype=torch.float64)
    advantages = group_advantages(rewards, torch.tensor([0, 0, 1, 1]), normalization="batch_std", epsilon=0.0)
    scale = 2 * math.sqrt(4.75 / 3)  # of 1, 0, 3, 1, whose mean is 5/4
    close(advantages, [1 / scale, -1 / scale, 2 / scale, -2 / scale])


# Several rewards


@given(rewards_in_groups, st.integers(1, 3), st.sampled_from([0.0, 1e-4, 1.0]), st.booleans())
def test_multi_reward_advantages_equal_the_reference(pairs, kinds, epsilon, weighed):
    first, ids = zip(*pairs, strict=True)
    g = torch.Generator().manual_seed(len(ids))
    others = torch.randint(0, 3, (len(ids), kinds - 1), generator=g, dtype=torch.float64)
    rewards = torch.cat([torch.tensor(first, dtype=torch.float64)[:, None], others], dim=1)
    coefficients = torch.tensor([1.0, 0.5, 2.0][:kinds]) if weighed else None
    if epsilon == 0.0 and len(set(ids)) == len(ids):
        epsilon = 1e-4  # else nothing is divided by nothing, which the next test looks at
    actual = multi_reward_advantages(rewards, torch.tensor(ids), coefficients=coefficients, epsilon=epsilon)
    used = [1.0] * kinds if coefficients is None else coefficients.tolist()
    close(actual, reference.multi_reward_advantages(rewards.tolist(), ids, used, epsilon), atol=1e-9)


def test_multi_reward_advantages_tell_apart_what_has_one_sum():
    """Right but malformed, and wrong but well-formed: a sum gives both the same advantage, and the third one less."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 1, 1])
    summed = group_advantages(rewards.sum(1), ids)
    assert summed[0] == summed[1]
    apart = multi_reward_advantages(rewards, ids, coefficients=torch.tensor([2.0, 1.0]))
    assert apart[0] > apart[1] > apart[2]
    assert apart[3:].tolist() == [0.0, 0.0]  # a group that says nothing
    close(apart.std(), 1.0, rtol=1e-3)


def test_multi_reward_advantages_of_equal_rewards_are_exactly_zero():
    for rewards in (torch.full((4, 2), 0.1), torch.ones(1, 3), torch.ones(0, 2)):
        advantages = multi_reward_advantages(rewards, torch.zeros(len(rewards)).long(), epsilon=0.0)
        assert torch.equal(advantages, torch.zeros(len(rewards)))


def test_bad_rewards_of_several_kinds_are_named():
    ids = torch.zeros(2).long()
    with pytest.raises(ValueError, match="^rewards is NaN at trajectory 1 "):
        multi_reward_advantages(torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), ids)
    with pytest.raises(ValueError, match="^rewards is infinite at trajectory 1 "):
        multi_reward_advantages(torch.tensor([[0.0, 1.0], [math.inf, -math.inf]]), ids)
    with pytest.raises(ValueError, match="^rewards has no column; pass one column for each kind"):
        multi_reward_advantages(torch.ones(2, 0), ids)
    with pytest.raises(TypeError, match="coefficients must be"):
        multi_reward_advantages(torch.ones(2, 2), ids, coefficients=torch.ones(3))
    with pytest.raises(ValueError, match="^epsilon must be at least 0, got -1"):
        multi_reward_advantages(torch.ones(2, 2), ids, epsilon=-1)


# The tokens of the highest entropy


@given(batches(), st.sampled_from([0.05, 0.2, 0.5, 1.0]))
def test_top_entropy_mask_equals_the_reference(batch, share):
    entropy = batch.log_probs.abs()  # NaN at padding
    actual = top_entropy_mask(entropy, batch.mask, share=share)
    assert actual.tolist() == reference.top_entropy_mask(entropy.tolist(), batch.mask.tolist(), share)
    if share == 1.0:
        assert torch.equal(actual, batch.mask)
    kept, left = entropy[actual], entropy[batch.mask & ~actual]
    if len(left):
        assert kept.min() > left.max()
        assert len(kept) == math.floor(share * (len(kept) + len(left) - 1)) + 1


def test_top_entropy_mask_keeps_what_ties_with_the_last_one():
    entropy = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert top_entropy_mask(entropy, entropy >= 0, share=0.25).tolist() == [[False, True, True, True, False]]


def test_top_entropy_mask_leaves_the_loss_of_the_others_out_and_the_mean_over_all():
    g = torch.Generator().manual_seed(0)
    old, entropy = -torch.rand(2, 6, generator=g), torch.rand(2, 6, generator=g)
    log_probs, mask = (old + 0.1).requires_grad_(), torch.ones(2, 6).bool()
    top = top_entropy_mask(entropy, mask, share=0.5)
    loss, _ = grpo_loss(log_probs, torch.ones(2, 6) * top, mask, old_log_probs=old)
    loss.backward()
    assert torch.equal(log_probs.grad != 0, top)
    close(loss, -math.exp(0.1) * top.sum() / 12, rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_a_share_of_tokens_out_of_range_is_named(share):
    with pytest.raises(ValueError, match=rf"^share must be in \(0, 1\], got {share}"):
        top_entropy_mask(torch.ones(1, 2), torch.ones(1, 2).bool(), share=share)


def test_no_advantage_needs_a_host_sync():
    rewards, ids = torch.zeros(3, device="meta"), torch.zeros(3, dtype=int, device="meta")
    mask = torch.zeros(3, 2, dtype=bool, device="meta")
    assert top_entropy_mask(torch.zeros(3, 2, device="meta"), mask).device.type == "meta"
    with pytest.raises(NotImplementedError):  # these look for NaN, once per rollout batch
        group_advantages(rewards, ids)


def test_advantages_and_the_entropy_mask_compile_whole(fresh_compiler):
    g = torch.Generator().manual_seed(0)
    rewards, ids, lengths = torch.rand(6, 2, generator=g), torch.tensor([0, 1, 0, 1, 0, 2]), torch.arange(6) + 1
    entropy, mask = torch.rand(6, 4, generator=g), torch.rand(6, 4, generator=g) < 0.7

    def everything():
        each = [group_advantages(rewards[:, 0], ids, normalization=kind, lengths=lengths) for kind in NORMALIZATIONS]
        return (*each, multi_reward_advantages(rewards, ids), top_entropy_mask(entropy, mask).float())

    torch.testing.assert_close(torch.compile(everything, fullgraph=True, backend="aot_eager")(), everything())


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
    with pytest.raises(ValueError, match="normalization must be one of 'std', 'none', 'leave_one_out', .* got 'mean'"):
        group_advantages(rewards, ids, normalization="mean")
    with pytest.raises(TypeError, match="advantages must be"):
        role_advantages(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2).bool())
    assert group_advantages(rewards[:0], ids[:0]).shape == (0,)
