"""Numbers that nobody plans for: each gives a finite result that is right, or an error or a NaN that is documented."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srpo_core import (
    CreditOptions,
    LossOptions,
    OutputLayer,
    aggregate,
    fused_linear_grpo_loss,
    fused_linear_log_probs,
    group_advantages,
    grpo_loss,
    kl_penalty,
    role_advantages,
    shared_baseline_weights,
    srpo_advantages,
    srpo_loss,
    token_divergence,
    token_log_probs,
)
from srpo_core.masking import check_finite, masked_mean
from srpo_core.options import Baseline, KLEstimator, WeightMap
from srpo_core.reliance import apply_reliance
from srpo_core.surrogates import Surrogate
from srpo_core.weights import role_scales

INF, NAN = math.inf, math.nan
NORMALIZATIONS = ["std", "none", "leave_one_out"]
SURROGATES = Surrogate.known()
ROLES, MASK = torch.tensor([[1, 1, 2, 2]]), torch.ones(1, 4, dtype=torch.bool)


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor has that is made meanwhile."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(made) if isinstance(tensor, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


# Groups


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_group_advantages_of_100_000_responses_are_linear_in_memory_and_right(normalization):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(12_500, 8, generator=generator, dtype=torch.float64)
    order = torch.randperm(100_000, generator=generator)
    ids = (torch.arange(12_500).repeat_interleave(8) * 7 - 5)[order]
    with LargestTensor() as largest:
        actual = group_advantages(rewards.flatten()[order], ids, normalization=normalization)
    assert largest.elements == 100_000
    in_groups = rewards.numpy()
    centered = in_groups - in_groups.mean(1, keepdims=True)
    by_hand = {
        "std": centered / (in_groups.std(1, ddof=1, keepdims=True) + 1e-4),
        "none": centered,
        "leave_one_out": in_groups - (in_groups.sum(1, keepdims=True) - in_groups) / 7,
    }
    expected = torch.from_numpy(by_hand[normalization]).flatten()[order]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_group_advantages_of_one_group_of_100_000_are_as_exact_as_float32_can_hold():
    rewards = torch.rand(100_000, generator=torch.Generator().manual_seed(1))
    values = rewards.double().numpy()
    expected = torch.from_numpy((values - values.mean()) / (values.std(ddof=1) + 1e-4)).float()
    actual = group_advantages(rewards, torch.zeros(100_000).long())
    torch.testing.assert_close(actual, expected, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-40),  # denormal
        (torch.float16, 65504.0),
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
    ],
)
def test_group_advantages_do_not_depend_on_the_unit_of_the_reward(dtype, size):
    rewards = torch.tensor([size, 0.0, 0.0, 0.0], dtype=dtype)
    advantages = group_advantages(rewards, torch.zeros(4).long(), epsilon=0.0)
    torch.testing.assert_close(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=advantages.dtype))


@pytest.mark.parametrize("reward", [INF, -INF, NAN])
def test_a_reward_that_is_not_finite_is_named(reward):
    name = "NaN" if math.isnan(reward) else "infinite"
    with pytest.raises(ValueError, match=rf"^rewards is {name} at trajectory 1 \(1 such"):
        group_advantages(torch.tensor([0.0, reward]), torch.zeros(2).long())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_group_ids_may_be_of_any_signed_type_and_as_large_as_it_holds(dtype):
    limits = torch.iinfo(dtype)
    ids = torch.tensor([limits.max, limits.min, limits.max, limits.min], dtype=dtype)
    advantages = group_advantages(torch.tensor([1.0, 8.0, 0.0, 4.0]), ids, normalization="none")
    assert advantages.tolist() == [0.5, 2.0, -0.5, -2.0]


# Scores and weights


def test_check_finite_names_the_first_value_that_counts():
    values, where = torch.tensor([NAN, 1.0, -INF, INF]), torch.tensor([False, True, True, True])
    with pytest.raises(ValueError, match=r"^x is infinite at trajectory 2 \(2 such values.*; pass a finite number"):
        check_finite("x", values, where)
    check_finite("x", values, torch.tensor([False, True, False, False]))


@pytest.mark.parametrize("weight_map", WeightMap.__args__)
@pytest.mark.parametrize("baseline", Baseline.__args__)
def test_weights_of_an_infinite_score_are_those_of_20_nats(baseline, weight_map):
    options = CreditOptions(baseline=baseline, weight_map=weight_map)
    actual = shared_baseline_weights(torch.tensor([[INF, 0.0, -INF, 1.0]]), ROLES, MASK, options)
    expected = shared_baseline_weights(torch.tensor([[20.0, 0.0, -20.0, 1.0]]), ROLES, MASK, options)
    assert actual.isfinite().all()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("weight_map", WeightMap.__args__)
@pytest.mark.parametrize("baseline", Baseline.__args__)
@pytest.mark.parametrize("scores", [[1e30, 0, 0, -1e30], [1e4, -1e4, 0, 0], [1e-40, 0, 0, 0], [65504, 0, -65504, 0]])
def test_weights_of_any_score_are_positive_and_finite(scores, baseline, weight_map):
    options = CreditOptions(baseline=baseline, weight_map=weight_map, strength=10.0)
    weights = shared_baseline_weights(torch.tensor([scores]).float(), ROLES, MASK, options)
    assert weights.isfinite().all()
    assert (weights > 0).all()


def test_scales_of_infinite_and_huge_scores_stay_finite():
    scales, state = role_scales(torch.tensor([[INF, 0.0, 1e30, -1e30]]), ROLES, MASK)
    torch.testing.assert_close(torch.stack(scales), torch.tensor([20.0 / math.sqrt(2.0), 1e15]))
    assert all(value.isfinite() for value in state)


def test_an_infinite_reliance_is_named():
    reliance = torch.tensor([[1.0, INF, NAN, NAN]])  # read at perception tokens only
    log_probs, message = -torch.ones(1, 4), "^reliance is infinite at trajectory 0 token 1"
    with pytest.raises(ValueError, match=message):
        apply_reliance(log_probs, ROLES, MASK, reliance=reliance)
    with pytest.raises(ValueError, match=message):
        srpo_advantages(log_probs, torch.ones(1), ROLES, MASK, reliance=reliance)


@pytest.mark.parametrize("advantage", [INF, -INF, NAN])
def test_an_advantage_that_is_not_finite_is_named_unless_its_response_is_padding(advantage):
    log_probs, roles = -torch.ones(2, 4), ROLES.expand(2, 4)
    mask = torch.tensor([[True] * 4, [False] * 4])
    name = "NaN" if math.isnan(advantage) else "infinite"
    with pytest.raises(ValueError, match=f"^advantages is {name} at trajectory 0 "):
        srpo_advantages(log_probs, torch.tensor([advantage, 1.0]), roles, mask)
    made = srpo_advantages(log_probs, torch.tensor([2.0, advantage]), roles, mask)
    assert made.advantages.tolist() == [[2.0] * 4, [0.0] * 4]
    assert all(value.isfinite() for value in made.metrics.values())


# Losses


@pytest.mark.parametrize("estimator", KLEstimator.__args__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", SURROGATES)
def test_losses_gradients_and_metrics_are_finite_up_to_10_000_nats_and_ratios_of_1e30(name, dtype, estimator):
    """Every pair of hostile log-probs, in one response each; the log-ratios run to 10,000, a ratio of 1e30 is 69."""
    sides = torch.tensor([-1e4, -70.0, -1.0, -6e-8, -1e-40, 0.0, -INF], dtype=dtype)
    log_probs, old = (side.repeat(2, 1) for side in torch.cartesian_prod(sides, sides).unbind(1))
    log_probs, old = log_probs.T.clone().requires_grad_(), old.T.contiguous()
    options = LossOptions(surrogate=SURROGATES[name](), kl_coef=0.1, kl_estimator=estimator, reduction="sum")
    for advantage in (1e4, -1e4, 1.0, -1.0, 1e-40, 0.0):
        advantages = torch.full(log_probs.shape, advantage)
        mask = torch.ones(log_probs.shape, dtype=torch.bool)
        loss, metrics = grpo_loss(log_probs, advantages, mask, options, old_log_probs=old, ref_log_probs=old)
        (gradient,) = torch.autograd.grad(loss, log_probs)
        assert loss.isfinite()
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gradient.isfinite().all()
        assert {key: value for key, value in metrics.items() if not value.isfinite()} == {}
        assert metrics["ratio/max"] == pytest.approx(math.exp(20), rel=1e-6)


def test_a_loss_beyond_float32_is_no_number_that_could_be_trusted():
    log_probs = torch.full((1, 1), -1e4, requires_grad=True)
    options = LossOptions(kl_coef=1.0, kl_estimator="k2")
    arguments = torch.ones(1, 1), torch.ones(1, 1).bool(), options
    loss, _ = grpo_loss(log_probs, *arguments, old_log_probs=log_probs.detach(), ref_log_probs=torch.tensor([[-1e30]]))
    assert loss == INF


@pytest.mark.parametrize("estimator", KLEstimator.__args__)
def test_kl_penalty_of_denormal_distances_is_zero_and_not_noise(estimator):
    tiny = torch.tensor([[-1e-40]])
    penalty = kl_penalty(tiny, torch.tensor([[True]]), ref_log_probs=torch.zeros(1, 1), estimator=estimator)
    assert penalty.abs() <= 1e-40


@pytest.mark.parametrize("name", SURROGATES)
def test_rows_without_a_token_and_rows_of_one_token_add_what_they_should(name):
    """Rows: all masked and full of NaN; a single token; both together give the loss of the single token."""
    log_probs = torch.tensor([[NAN, NAN], [-1.0, NAN]]).requires_grad_()
    old, advantages = torch.tensor([[INF, NAN], [-1.0, NAN]]), torch.tensor([[NAN, INF], [2.0, NAN]])
    mask = torch.tensor([[False, False], [True, False]])
    for reduction in ("token_mean", "sequence_mean", "sum"):
        options = LossOptions(surrogate=SURROGATES[name](), reduction=reduction)
        loss, metrics = grpo_loss(log_probs, advantages, mask, options, old_log_probs=old)
        (gradient,) = torch.autograd.grad(loss, log_probs)
        # CISPO and VESPO are -A log p, SAPO -4 sigmoid(0) A / k; the others are -A on policy.
        assert loss == {"cispo": 2.0, "vespo": 2.0, "sapo": -4.0}.get(name, -2.0)
        assert gradient.tolist() == [[0.0, 0.0], [-2.0, 0.0]]
        assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("role", [1, 2])
def test_a_response_of_one_token_has_weight_one(role):
    log_probs, others = -torch.ones(1, 1), -5.0 * torch.ones(1, 1)
    made = srpo_advantages(
        log_probs,
        torch.tensor([3.0]),
        torch.tensor([[role]]),
        torch.tensor([[True]]),
        corrupted_log_probs=others,
        counterfactual_log_probs=others,
    )
    assert (made.weights.item(), made.scores.item(), made.advantages.item()) == (1.0, 4.0, 3.0)


def test_a_row_of_a_million_tokens_is_within_float32_of_float64():
    time = 1_000_000
    generator = torch.Generator().manual_seed(2)
    old = -3.0 * torch.rand(1, time, generator=generator)
    log_probs = (old + 0.2 * torch.randn(1, time, generator=generator)).requires_grad_()
    roles, mask = torch.randint(0, 3, (1, time), generator=generator), torch.rand(1, time, generator=generator) < 0.9
    corrupted = old - torch.rand(1, time, generator=generator)
    loss, metrics = srpo_loss(
        log_probs, torch.tensor([1.7]), roles, mask, old_log_probs=old, corrupted_log_probs=corrupted
    )
    (gradient,) = torch.autograd.grad(loss, log_probs)

    # The defaults, written out in numpy.
    real, member = mask[0].numpy(), (mask & (roles > 0))[0].numpy()
    lp, o, c = (x.detach()[0].double().numpy() for x in (log_probs, old, corrupted))
    score = np.where(member & (roles[0].numpy() == 1), np.clip(o - c, -5.0, 5.0), 0.0)
    bound = math.log(2.0)
    value = np.exp(bound * np.tanh((score - score[member].mean()) / bound))
    weight = np.where(member, value / value[member].mean(), 1.0)
    ratio, advantage = np.exp(lp - o), 1.7 * weight
    expected = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)[real].mean()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert metrics["ratio/mean"].item() == pytest.approx(ratio[real].mean(), rel=1e-6)
    open_ = real & (ratio < 1.2)
    assert gradient.double().sum().item() == pytest.approx(-(ratio * advantage)[open_].sum() / real.sum(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SURROGATES)
def test_a_vocabulary_of_one_is_certain_and_has_no_gradient(name, dtype):
    hidden = torch.full((1, 2, 3), 6e4, dtype=dtype).requires_grad_()
    weight = torch.full((1, 3), 6e4, dtype=dtype).requires_grad_()  # a logit of 1e10, far beyond float16
    ids, mask = torch.zeros(1, 2).long(), torch.ones(1, 2).bool()
    assert fused_linear_log_probs(hidden, OutputLayer(weight), ids, mask).tolist() == [[0.0, 0.0]]
    options = LossOptions(surrogate=SURROGATES[name]())
    loss, metrics = fused_linear_grpo_loss(
        hidden, OutputLayer(weight), ids, torch.ones(1, 2), mask, options, old_log_probs=torch.zeros(1, 2)
    )
    loss.backward()
    assert loss.item() == pytest.approx({"cispo": 0.0, "vespo": 0.0, "sapo": -2.0}.get(name, -1.0))
    assert not hidden.grad.any()
    assert not weight.grad.any()
    assert metrics["ratio/max"] == 1.0
    logits = torch.full((1, 2, 1), 1e30)
    assert token_log_probs(logits, ids).tolist() == [[0.0, 0.0]]
    assert token_divergence(logits, other_logits=-logits, kind="topk_kl").tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("logits", [[INF, 0.0], [-INF, -INF]])
def test_logits_without_a_distribution_are_nan_as_documented(logits):
    log_probs = token_log_probs(torch.tensor([[logits]]), torch.tensor([[0]]))
    assert log_probs.isnan().all()
    old, mask = torch.zeros(1, 1), torch.tensor([[True]])
    with pytest.raises(ValueError, match="old_log_probs is NaN at trajectory 0 token 0"):
        srpo_advantages(log_probs, torch.ones(1), torch.zeros(1, 1).long(), mask)
    assert grpo_loss(log_probs, old, mask, old_log_probs=old).loss.isnan()


def test_float16_products_and_sums_of_float16_do_not_overflow():
    weights = torch.full((1, 70_000), 2.0, dtype=torch.float16)
    mask = torch.ones(1, 70_000, dtype=torch.bool)
    assert aggregate(weights, mask).item() == 2.0
    assert role_advantages(weights, torch.tensor([60_000.0]), mask).unique().item() == 120_000.0
    assert role_advantages(weights, torch.tensor([60_000.0], dtype=torch.float16), mask).unique().item() == 120_000.0


def test_masked_mean_of_float16_is_added_up_in_float32():
    values = torch.full((3, 70_000), 2.0, dtype=torch.float16)
    assert masked_mean(values, torch.ones(3, 70_000, dtype=torch.bool), dim=1).tolist() == [2.0, 2.0, 2.0]
