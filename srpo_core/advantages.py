"""Rewards -> group-relative advantages, and weights -> token advantages."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.checked import choose
from srpo_core.masking import at_least_float32, check_no_nan
from srpo_core.options import GroupOptions, Normalization
from srpo_core.typechecking import typechecked

__all__ = ["group_advantages", "role_advantages"]

_EPSILON = GroupOptions.range_of("epsilon")


def _no_nan_among_rewards(arguments: Mapping[str, Any]) -> None:
    check_no_nan("rewards", arguments["rewards"], torch.ones_like(arguments["rewards"], dtype=torch.bool))


@typechecked(values=(_no_nan_among_rewards,))
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
        Detached advantages in float32, or float64 if the rewards are. The memory grows with the square of the batch.

    Raises:
        ValueError: If `normalization` is unknown or `epsilon` out of range; outside ``torch.compile`` also if a reward
            is NaN.

    Example:
        >>> group_advantages(torch.tensor([1.0, 5.0, 0.0]), torch.tensor([7, 3, 7]), normalization="none")
        tensor([ 0.5000,  0.0000, -0.5000])

    References:
        GRPO, arXiv:2402.03300, section 4.1; Dr. GRPO, arXiv:2503.20783; RLOO, arXiv:2402.14740.
    """
    _EPSILON.check("epsilon", epsilon)
    normalize = choose("normalization", normalization, _NORMALIZATIONS)
    rewards = rewards.detach().to(at_least_float32(rewards.dtype))
    # Membership as a matrix instead of torch.unique, whose output size would have to reach the host.
    mates = group_ids[:, None] == group_ids[None, :]
    size = mates.sum(1)
    centered = rewards - _group_mean(rewards, mates)
    # Rounding leaves a trace of the mean in a group of equal rewards, and epsilon would let it through.
    equal = (torch.where(mates, rewards[None, :], rewards[:, None]) == rewards[:, None]).all(1)
    return torch.where(equal, 0.0, normalize(centered, mates, size, epsilon))


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
    return torch.where(mask, weights.detach() * advantages.detach()[:, None], 0.0)


def _group_mean(values: Tensor, mates: Tensor) -> Tensor:
    return torch.where(mates, values[None, :], 0.0).sum(1) / mates.sum(1)


def _by_std(centered: Tensor, mates: Tensor, size: Tensor, epsilon: float) -> Tensor:
    variance = torch.where(mates, centered.square()[None, :], 0.0).sum(1) / (size - 1).clamp(min=1)
    return centered / (variance.sqrt() + epsilon)


def _by_nothing(centered: Tensor, mates: Tensor, size: Tensor, epsilon: float) -> Tensor:
    return centered


def _leave_one_out(centered: Tensor, mates: Tensor, size: Tensor, epsilon: float) -> Tensor:
    # r_i - mean of the others = (r_i - mean of all) * n / (n - 1)
    return centered * size / (size - 1).clamp(min=1)


_NORMALIZATIONS = {"std": _by_std, "none": _by_nothing, "leave_one_out": _leave_one_out}
