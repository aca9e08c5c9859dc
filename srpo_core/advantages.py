"""Rewards -> group-relative advantages, and weights -> token advantages."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.checked import choose
from srpo_core.masking import at_least_float32, check_finite
from srpo_core.options import GroupOptions, Normalization
from srpo_core.typechecking import typechecked

__all__ = ["group_advantages", "role_advantages"]

_EPSILON = GroupOptions.range_of("epsilon")


def _finite_rewards(arguments: Mapping[str, Any]) -> None:
    check_finite("rewards", arguments["rewards"], torch.ones_like(arguments["rewards"], dtype=torch.bool))


@typechecked(values=(_finite_rewards,))
def group_advantages(
    rewards: Float[Tensor, " batch"],
    group_ids: Int[Tensor, " batch"],
    *,
    normalization: Normalization = "std",
    epsilon: float = 1e-4,
) -> Float[Tensor, " batch"]:
    r"""The advantage of each response over the other responses to the same prompt.

    ``std`` (GRPO) is :math:`(r_i - \bar r) / (\sigma + \epsilon)` with the unbiased standard deviation, ``none`` (Dr.
    GRPO) is :math:`r_i - \bar r`, ``leave_one_out`` (RLOO) subtracts the mean of the *other* rewards. In a group of one
    response, and in a group of equal rewards, every advantage is exactly 0.

    Args:
        rewards: One per response, any unit.
        group_ids: Responses with equal ids answer one prompt; a group may lie anywhere in the batch.
        normalization: What the centered reward is divided by, and what it is centered on.
        epsilon: Added to the standard deviation, in the unit of the reward, at least 0.

    Returns:
        Detached advantages in float32, or float64 if the rewards are. They are computed in float64, so that neither
        the size of the rewards nor the order in which a device adds them up shows; the memory is linear in the batch.

    Raises:
        ValueError: If `normalization` is unknown or `epsilon` out of range; outside ``torch.compile`` also if a reward
            is NaN or infinite, for which the rewards are read on the host.

    Example:
        >>> group_advantages(torch.tensor([1.0, 5.0, 0.0]), torch.tensor([7, 3, 7]), normalization="none")
        tensor([ 0.5000,  0.0000, -0.5000])

    References:
        GRPO, arXiv:2402.03300, section 4.1; Dr. GRPO, arXiv:2503.20783; RLOO, arXiv:2402.14740.
    """
    _EPSILON.check("epsilon", epsilon)
    normalize = choose("normalization", normalization, _NORMALIZATIONS)
    values = rewards.detach().to(_widest(rewards))
    # The place of a group's first id among the sorted ids is its number. Not torch.unique, whose output size would have
    # to reach the host.
    group = torch.searchsorted(group_ids.sort().values, group_ids)
    size = _sum_of(torch.ones_like(values), group)
    # Shares are added up, and not rewards, whose sum may overflow.
    centered = values - _sum_of(values / size, group)
    # Rounding leaves a trace of the mean in a group of equal rewards, and epsilon would let it through.
    equal = _extreme_of(values, group, "amin") == _extreme_of(values, group, "amax")
    advantages = torch.where(equal, 0.0, normalize(centered, group, size, epsilon))
    return advantages.to(at_least_float32(rewards.dtype))


@typechecked
def role_advantages(
    weights: Float[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    r"""Token advantages :math:`A_{i,t} = w_{i,t} A_i`, the response's advantage times the token's weight; 0 at padding.

    Weights are positive, and the clipped objective is proportional to its advantage, so weighting the advantage weights
    the loss. Pass the result to a trainer that takes one advantage for each token.

    Args:
        weights: From :func:`~srpo_core.shared_baseline_weights`.
        advantages: One per response.
        mask: True at response tokens.

    Example:
        >>> role_advantages(torch.tensor([[1.5, 0.5]]), torch.tensor([-2.0]), torch.tensor([[True, True]]))
        tensor([[-3., -1.]])
    """
    dtype = at_least_float32(torch.promote_types(weights.dtype, advantages.dtype))
    return torch.where(mask, weights.detach().to(dtype) * advantages.detach().to(dtype)[:, None], 0.0)


def _widest(rewards: Tensor) -> torch.dtype:
    # Apple's GPUs have no float64.
    return at_least_float32(rewards.dtype) if rewards.device.type == "mps" else torch.float64


def _sum_of(values: Tensor, group: Tensor) -> Tensor:
    """The sum over each response's group, at each response."""
    return torch.zeros_like(values).index_add(0, group, values)[group]


def _extreme_of(values: Tensor, group: Tensor, reduce: str) -> Tensor:
    """The smallest or largest value of each response's group, at each response."""
    return torch.zeros_like(values).scatter_reduce(0, group, values, reduce, include_self=False)[group]


def _by_std(centered: Tensor, group: Tensor, size: Tensor, epsilon: float) -> Tensor:
    # In parts of the largest one: the square of a reward may overflow, or underflow where epsilon is 0.
    largest = _extreme_of(centered.abs(), group, "amax")
    parts = centered / torch.where(largest > 0, largest, 1.0)
    variance = _sum_of(parts.square(), group) / (size - 1).clamp(min=1)
    return centered / (largest * variance.sqrt() + epsilon)


def _by_nothing(centered: Tensor, group: Tensor, size: Tensor, epsilon: float) -> Tensor:
    return centered


def _leave_one_out(centered: Tensor, group: Tensor, size: Tensor, epsilon: float) -> Tensor:
    # r_i - mean of the others = (r_i - mean of all) * n / (n - 1)
    return centered * (size / (size - 1).clamp(min=1))


_NORMALIZATIONS = {"std": _by_std, "none": _by_nothing, "leave_one_out": _leave_one_out}
