"""The options of losses and advantages that this package and verl both have, on the same tensors."""

import numpy as np
import pytest
import torch
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig

from srpo_core import LossOptions, aggregate, group_advantages, grpo_loss, kl_penalty
from srpo_core.advantages import multi_reward_advantages
from srpo_core.engine_gap import engine_weights

BATCH, TIME = 6, 5
GROUPS = [0, 1, 0, 1, 0, 1]


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(BATCH, TIME, generator=g)
    near = [old + 0.4 * torch.randn(BATCH, TIME, generator=g) for _ in range(2)]
    advantages = torch.randn(BATCH, 1, generator=g).expand(BATCH, TIME)
    mask = torch.arange(TIME) < torch.tensor([5, 3, 4, 1, 2, 5])[:, None]
    return old, *near, advantages, mask


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "abs"])
def test_kl_penalty_is_that_of_verl(tensors, estimator):
    _, log_probs, ref, _, mask = tensors
    gradients = []
    for penalty in (
        lambda x: kl_penalty(x, mask, ref_log_probs=ref, estimator=estimator),
        lambda x: core_algos.kl_penalty(x, ref, estimator) * mask,
    ):
        leaf = log_probs.clone().requires_grad_()
        value = penalty(leaf)
        gradients.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
    close(*gradients)


def test_the_gradient_of_k2_is_that_of_verls_straight_through_k3(tensors):
    _, log_probs, ref, _, mask = tensors
    ours, theirs = (log_probs.clone().requires_grad_() for _ in range(2))
    kl_penalty(ours, mask, ref_log_probs=ref, estimator="k2").sum().backward()
    (core_algos.kl_penalty(theirs, ref, "k3+") * mask).sum().backward()
    close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.3), (0.05, 4.0)])
def test_cispo_with_a_lower_bound_is_that_of_verl(tensors, low, high):
    old, log_probs, _, advantages, mask = tensors
    ours, theirs = (log_probs.clone().requires_grad_() for _ in range(2))
    surrogate = {"name": "cispo", "min_ratio": 1 - low, "max_ratio": 1 + high}
    loss, metrics = grpo_loss(ours, advantages, mask, LossOptions(surrogate=surrogate), old_log_probs=old)
    assert metrics["clip/low"] > 0
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=low, clip_ratio_high=high
    )
    expected, _ = core_algos.compute_policy_loss_cispo(old, theirs, advantages, mask.float(), config=config)
    close(loss, expected)
    close(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs))


@pytest.mark.parametrize(
    ("reduction", "mode"),
    [
        ("token_mean", "token-mean"),
        ("sequence_mean", "seq-mean-token-mean"),
        ("sequence_sum", "seq-mean-token-sum"),
        ("sum", "token-sum"),
    ],
)
def test_aggregate_is_that_of_verl(tensors, reduction, mode):
    losses, mask = tensors[0], tensors[-1].clone()
    mask[2] = False  # a response without tokens
    close(aggregate(losses, mask, reduction=reduction), core_algos.agg_loss(losses, mask.float(), mode))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("bounds", "threshold"), [({"high": 1.2}, 1.2), ({"low": 0.7, "high": 1.5}, "0.7_1.5")])
def test_engine_weights_are_those_of_verl(tensors, level, bounds, threshold):
    """A number truncates from above, and a pair sets to 0 what is outside (IcePop)."""
    old, engine, mask = tensors[0], tensors[1], tensors[-1]
    expected, _ = compute_rollout_correction_weights(old - engine, mask.float(), level, threshold)
    assert len(expected[mask].unique()) > 2
    how = "mask" if "low" in bounds else "truncate"
    close(engine_weights(old, mask, engine_log_probs=engine, level=level, out_of_bounds=how, **bounds), expected)


def test_the_length_weighted_baseline_is_verls_opo(tensors):
    mask = tensors[-1]
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.0])
    token_rewards = torch.zeros(BATCH, TIME)
    token_rewards[:, 0] = rewards
    expected, _ = core_algos.compute_opo_outcome_advantage(token_rewards, mask.float(), np.array(GROUPS))
    ours = group_advantages(rewards, torch.tensor(GROUPS), normalization="length_weighted", lengths=mask.sum(1))
    close(ours[:, None] * mask, expected)


def test_multi_reward_advantages_are_verls_gdpo_where_responses_are_of_one_length():
    """verl whitens over tokens: with responses of one token these are the responses."""
    rewards = torch.tensor([[1.0, 0.2], [0.0, 0.9], [0.0, 0.1], [1.0, 0.3], [1.0, 0.7], [0.0, 0.3]])
    mask = torch.ones(BATCH, 1)
    expected, _ = core_algos.compute_gdpo_outcome_advantage(
        rewards[:, :1],
        mask,
        np.array(GROUPS),
        config={"gdpo_reward_keys": ["right", "format"], "gdpo_reward_weights": [1.0, 0.5]},
        non_tensor_batch={"right": rewards[:, 0].numpy(), "format": rewards[:, 1].numpy()},
        batch={"prompts": torch.zeros(BATCH, 1), "attention_mask": torch.ones(BATCH, 2, dtype=torch.long)},
    )
    ours = multi_reward_advantages(rewards, torch.tensor(GROUPS), coefficients=torch.tensor([1.0, 0.5]), epsilon=1e-6)
    torch.testing.assert_close(ours[:, None], expected, rtol=1e-4, atol=1e-5)
