"""Reductions over the tokens that count, and the value checks that name the one that is wrong."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "at_least_float32",
    "check_no_nan",
    "masked_max",
    "masked_mean",
    "masked_min",
    "no_nan_where_real",
]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32; float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


def masked_mean(values: Tensor, where: Tensor, *, dim: int | None = None, empty: float = 0.0) -> Tensor:
    """Mean of `values` where `where`; `empty` if there is no such element."""
    total = torch.where(where, values, 0.0).sum(dim)
    count = where.sum(dim)
    return torch.where(count > 0, total / count.clamp(min=1), empty)


def masked_min(values: Tensor, where: Tensor, *, empty: float) -> Tensor:
    """Smallest of `values` where `where`; `empty` if there is no such element."""
    return -masked_max(-values, where, empty=-empty)


def masked_max(values: Tensor, where: Tensor, *, empty: float) -> Tensor:
    """Largest of `values` where `where`; `empty` if there is no such element."""
    if values.numel() == 0:
        return values.new_full((), empty)
    return torch.where(where.any(), torch.where(where, values, -torch.inf).amax(), empty)


def check_no_nan(argument: str, values: Tensor, where: Tensor) -> None:
    """Raise if a value that counts is NaN, naming the first. Reads the tensor on the host."""
    wrong = (values.isnan() & where).nonzero()
    if len(wrong):
        place = " token ".join(map(str, wrong[0].tolist()))
        raise ValueError(
            f"{argument} is NaN at trajectory {place} ({len(wrong)} such values where the mask is True); "
            "look for an all-masked attention row or an overflow in the pass that made it"
        )


def no_nan_where_real(*arguments: str) -> Callable[[Mapping[str, Any]], None]:
    """A stage of checks for ``typechecked``: none of these arguments, if given, may be NaN where ``mask`` is True."""

    def check(bound: Mapping[str, Any]) -> None:
        for argument in arguments:
            if bound.get(argument) is not None:
                check_no_nan(argument, bound[argument], bound["mask"])

    return check
