"""Rewards -> group-relative advantages, and weights -> token advantages."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from srpo_core.checked import Range, choose
from srpo_core.masking import at_least_float32, check_finite
from srpo_core.options import GroupOptions, Normalization
from srpo_core.typechecking import typechecked

__all__ = ["group_advantages", "multi_reward_advantages", "role_advantages", "top_entropy_mask"]

_EPSILON = GroupOptions.range_of("epsilon")
_SHARE = Range(above=0.0, at_most=1.0)


def _finite_rewards(arguments: Mapping[str, Any]) -> None:
    rewards = arguments["rewards"]
    if rewards.ndim == 2:  # the response is named, whichever of its rewards it is
        rewards = rewards.double().abs().sum(1)
    check_finite("rewards", rewards, torch.ones_like(rewards, dtype=torch.bool))


@typechecked(values=(_finite_rewards,))
def group_advantages(
    rewards: Float[Tensor, " batch"],
    group_ids: Int[Tensor, " batch"],
    *,
    normalization: Normalization = "std",
    epsilon: float = 1e-4,
    lengths: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    r"""The advantage of each response over the other responses to the same prompt.

    ===================  ==============================================================================================
    normalization        advantage
    ===================  ==============================================================================================
    ``std``              GRPO: :math:`(r_i - \bar r) / (\sigma + \epsilon)`, with the unbiased standard deviation of the
                         group
    ``batch_std``        :math:`(r_i - \bar r) / (\sigma_B + \epsilon)`, with that of all rewards of the batch, so that
                         groups of almost equal rewards are not blown up
    ``none``             Dr. GRPO: :math:`r_i - \bar r`
    ``leave_one_out``    RLOO: the reward less the mean of the *other* rewards
    ``length_weighted``  OPO: :math:`r_i - \sum_j l_j r_j / \sum_j l_j`, whose baseline has the least variance where the
                         gradient of a response grows with its length :math:`l_j`
    ===================  ==============================================================================================

    In a group of one response, and in a group of equal rewards, every advantage is exactly 0.

    Args:
        rewards: One per response, any unit.
        group_ids: Responses with equal ids answer one prompt; a group may lie anywhere in the batch.
        normalization: What the reward is centered on, and what the centered reward is divided by.
        epsilon: Added to the standard deviation, in the unit of the reward, at least 0.
        lengths: The number of tokens of each response, ``mask.sum(1)``; read by ``length_weighted`` alone.

    Returns:
        Detached advantages in float32, or float64 if the rewards are. They are computed in float64, so that neither
        the size of the rewards nor the order in which a device adds them up shows; the memory is linear in the batch.

    Raises:
        ValueError: If `normalization` is unknown, `epsilon` is out of range or `lengths` is missing; outside
            ``torch.compile`` also if a reward is NaN or infinite, for which the rewards are read on the host.

    Example:
        >>> group_advantages(torch.tensor([1.0, 5.0, 0.0]), torch.tensor([7, 3, 7]), normalization="none")
        tensor([ 0.5000,  0.0000, -0.5000])

    References:
        GRPO, arXiv:2402.03300, section 4.1; Dr. GRPO, arXiv:2503.20783; RLOO, arXiv:2402.14740; OPO,
        arXiv:2505.23585.
    """
    _EPSILON.check("epsilon", epsilon)
    normalize = choose("normalization", normalization, _NORMALIZATIONS)
    if normalization == "length_weighted" and lengths is None:
        raise ValueError(
            "lengths is None; normalization='length_weighted' needs the number of tokens of each response: pass "
            "lengths=mask.sum(1)"
        )
    values = rewards.detach().to(_widest(rewards))
    # The place of a group's first id among the sorted ids is its number. Not torch.unique, whose output size would have
    # to reach the host.
    group = torch.searchsorted(group_ids.sort().values, group_ids)
    size = _sum_of(torch.ones_like(values), group)
    # Shares are added up, and not rewards, whose sum may overflow.
    centered = values - _sum_of(values / size, group)
    # Rounding leaves a trace of the mean in a group of equal rewards, and epsilon would let it through.
    equal = _extreme_of(values, group, "amin") == _extreme_of(values, group, "amax")
    advantages = torch.where(equal, 0.0, normalize(_Groups(values, centered, group, size, lengths), epsilon))
    return advantages.to(at_least_float32(rewards.dtype))


@typechecked(values=(_finite_rewards,))
def multi_reward_advantages(
    rewards: Float[Tensor, "batch rewards"],
    group_ids: Int[Tensor, " batch"],
    *,
    coefficients: Float[Tensor, " rewards"] | None = None,
    epsilon: float = 1e-4,
) -> Float[Tensor, " batch"]:
    r"""The advantage of each response under several rewards, each of which is normalized before they are added up.

    .. math:: x_i = \sum_k c_k \frac{r_{ik} - \bar r_k}{\sigma_k + \epsilon}, \qquad
        A_i = \frac{x_i}{\sigma_x + \epsilon}

    with :math:`\bar r_k` and :math:`\sigma_k` over the group, and :math:`\sigma_x` over the batch, both unbiased. If
    the rewards were added up first, the one with the widest spread would hide the others. The mean of :math:`x` over a
    group is 0, so the batch is not centered once more.

    Args:
        rewards: One per response and kind, any unit.
        group_ids: Responses with equal ids answer one prompt; a group may lie anywhere in the batch.
        coefficients: How much each kind counts, :math:`c_k`. None: 1 each.
        epsilon: Added to each standard deviation, at least 0.

    Returns:
        Detached advantages in float32, or float64 if the rewards are; exactly 0 in a group whose responses are equal
        in every reward.

    Raises:
        ValueError: If `epsilon` is out of range; outside ``torch.compile`` also if a reward is NaN or
            infinite, for which the rewards are read on the host.

    Example:
        >>> from srpo_core.advantages import multi_reward_advantages
        >>> rewards = torch.tensor([[1.0, 0.0], [0.0, 10.0], [0.0, 0.0]])  # one is right, another one well-formed
        >>> advantages = multi_reward_advantages(rewards, torch.zeros(3).long(), coefficients=torch.tensor([2.0, 1.0]))
        >>> advantages.round(decimals=3)
        tensor([ 1.,  0., -1.])

    References:
        GDPO, arXiv:2601.05242.
    """
    _EPSILON.check("epsilon", epsilon)
    values = rewards.detach().to(_widest(rewards))
    columns = [group_advantages(column, group_ids, epsilon=epsilon) for column in values.unbind(1)]
    if not columns:
        raise ValueError("rewards has no column; pass one column for each kind of reward")
    each = torch.stack(columns, dim=1)
    total = each.sum(1) if coefficients is None else each @ coefficients.detach().to(each.dtype)
    advantages = torch.where(total == 0, 0.0, total / (_std(total) + epsilon))
    return advantages.to(at_least_float32(rewards.dtype))


@typechecked
def top_entropy_mask(
    entropy: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    share: float = 0.2,
) -> Bool[Tensor, "batch time"]:
    r"""Where the tokens of the batch with the highest entropy are, at which a policy decides.

    Multiply token advantages by it, and only these tokens are trained; with ``active="credited"``
    :func:`~srpo_core.fused_linear_grpo_loss` computes no others. A mean over tokens still counts all of them.

    Args:
        entropy: Of each next-token distribution, nats, such as that of
            :func:`~srpo_core.fused.fused_linear_log_probs_and_entropy`.
        mask: True at response tokens; elsewhere `entropy` may hold anything, even NaN.
        share: The share of the tokens that is kept, in (0, 1]. Of n tokens :math:`\lfloor share\,(n - 1)\rfloor + 1`
            are kept, and those of the same entropy as the last one of them.

    Raises:
        ValueError: If `share` is out of range.

    Example:
        >>> from srpo_core.advantages import top_entropy_mask
        >>> top_entropy_mask(torch.tensor([[0.1, 2.0, 0.3, 1.0]]), torch.tensor([[True, True, True, False]]), share=0.5)
        tensor([[False,  True,  True, False]])

    References:
        Wang et al. 2025, arXiv:2506.01939.
    """
    _SHARE.check("share", share)
    if entropy.numel() == 0:
        return mask.clone()
    entropy = torch.where(mask, entropy.detach(), -torch.inf)
    ordered = entropy.flatten().sort(descending=True).values
    last = (share * (mask.sum() - 1)).floor().clamp(min=0).long()
    # Not ordered[last]: that would read the number on the host.
    return mask & (entropy >= ordered.gather(0, last[None]))


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


class _Groups(NamedTuple):
    """Rewards, and what is known of the group of each."""

    rewards: Tensor
    centered: Tensor
    number: Tensor
    size: Tensor
    lengths: Tensor | None


def _by_std(groups: _Groups, epsilon: float) -> Tensor:
    # In parts of the largest one: the square of a reward may overflow, or underflow where epsilon is 0.
    largest = _extreme_of(groups.centered.abs(), groups.number, "amax")
    parts = groups.centered / torch.where(largest > 0, largest, 1.0)
    variance = _sum_of(parts.square(), groups.number) / (groups.size - 1).clamp(min=1)
    return groups.centered / (largest * variance.sqrt() + epsilon)


def _by_batch_std(groups: _Groups, epsilon: float) -> Tensor:
    return groups.centered / (_std(groups.rewards) + epsilon)


def _by_nothing(groups: _Groups, epsilon: float) -> Tensor:
    return groups.centered


def _leave_one_out(groups: _Groups, epsilon: float) -> Tensor:
    # r_i - mean of the others = (r_i - mean of all) * n / (n - 1)
    return groups.centered * (groups.size / (groups.size - 1).clamp(min=1))


def _length_weighted(groups: _Groups, epsilon: float) -> Tensor:
    assert groups.lengths is not None
    lengths = groups.lengths.to(groups.centered.dtype)
    share = lengths / _sum_of(lengths, groups.number).clamp(min=1)
    # Of what is centered already: large rewards that differ little keep their digits.
    return groups.centered - _sum_of(share * groups.centered, groups.number)


def _std(values: Tensor) -> Tensor:
    """Unbiased, also of numbers whose squares overflow; 0 of fewer than two."""
    if values.numel() < 2:
        return torch.zeros((), dtype=values.dtype, device=values.device)
    largest = values.abs().amax()
    return largest * (values / torch.where(largest > 0, largest, 1.0)).std()


_NORMALIZATIONS = {
    "std": _by_std,
    "none": _by_nothing,
    "leave_one_out": _leave_one_out,
    "batch_std": _by_batch_std,
    "length_weighted": _length_weighted,
}
