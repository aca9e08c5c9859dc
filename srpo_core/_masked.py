"""Reductions over the tokens that count, and the value checks that name the one that is wrong."""

import torch
from torch import Tensor

from srpo_core.roles import Role


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32; float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


def masked_mean(values: Tensor, where: Tensor, *, dim: int | None = None, empty: float = 0.0) -> Tensor:
    """Mean of `values` where `where`; `empty` if there is no such element."""
    total = torch.where(where, values, 0.0).sum(dim)
    count = where.sum(dim)
    return torch.where(count > 0, total / count.clamp(min=1), empty)


def masked_min(values: Tensor, where: Tensor, *, empty: float) -> Tensor:
    """Least of `values` where `where`; `empty` if there is no such element."""
    return -masked_max(-values, where, empty=-empty)


def masked_max(values: Tensor, where: Tensor, *, empty: float) -> Tensor:
    """Greatest of `values` where `where`; `empty` if there is no such element."""
    if values.numel() == 0:
        return values.new_full((), empty)
    return torch.where(where.any(), torch.where(where, values, -torch.inf).amax(), empty)


def check_no_nan(argument: str, values: Tensor, where: Tensor) -> None:
    """Raise if a value that counts is NaN, naming the first. Reads the tensor on the host; off under compile."""
    if torch.compiler.is_compiling():
        return
    wrong = (values.isnan() & where).nonzero()
    if len(wrong):
        place = " token ".join(map(str, wrong[0].tolist()))
        raise ValueError(
            f"{argument} is NaN at trajectory {place} ({len(wrong)} such values where the mask is True); "
            "look for an all-masked attention row or an overflow in the pass that made it"
        )


def check_roles(roles: Tensor, mask: Tensor) -> None:
    """Raise if a real token has a role outside the enum. Reads the tensor on the host; off under compile."""
    if torch.compiler.is_compiling():
        return
    wrong = (((roles < min(Role)) | (roles > max(Role))) & mask).nonzero()
    if len(wrong):
        row, time = wrong[0].tolist()
        known = ", ".join(f"{role.value} ({role.name})" for role in Role)
        raise ValueError(
            f"roles is {roles[row, time]} at trajectory {row} token {time}; expected {known}: "
            "pass the roles of segment_responses or segment_roles"
        )
