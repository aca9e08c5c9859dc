"""The tokens that count: log-ratios, reductions, and the value checks that name the one that is wrong."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "MAX_LOG_RATIO",
    "at_least_float32",
    "check_finite",
    "check_log_probs",
    "check_no_nan",
    "is_barred",
    "log_probs_where_real",
    "log_ratio_of",
    "masked_max",
    "masked_mean",
    "masked_min",
    "saturated",
]

#: Nats. Far outside every clip range, and e^20 is still an exact float32: a ratio saturates there instead of becoming
#: inf or NaN.
MAX_LOG_RATIO = 20.0


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32; float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


def is_barred(log_probs: Tensor) -> Tensor:
    """Where a token is impossible: minus infinity, or the lowest numbers of a dtype, which trainers write for it."""
    lowest = max(torch.finfo(log_probs.dtype).min, torch.finfo(torch.float32).min)
    # What a temperature or a sum has made of the lowest number is still far below any log-probability.
    return log_probs <= 0.25 * lowest


def log_ratio_of(log_probs: Tensor, other_log_probs: Tensor, where: Tensor) -> Tensor:
    """Log-ratio of the probabilities of each token in two contexts, nats, in at least float32; 0 where not `where`.

    The one policy for infinities. A log-probability of minus infinity is legal: some mask bars the token. Where both
    sides bar it the log-ratio is 0, where one does it is 20 nats in favor of the other, and either way no gradient
    flows. Plus infinity is not a log-probability: like NaN it makes the log-ratio NaN.
    """
    dtype = at_least_float32(torch.promote_types(log_probs.dtype, other_log_probs.dtype))
    barred, other_barred = is_barred(log_probs), is_barred(other_log_probs)
    wrong = (log_probs == torch.inf) | (other_log_probs == torch.inf)
    at_most = (MAX_LOG_RATIO * (other_barred.to(dtype) - barred.to(dtype))).masked_fill(wrong, torch.nan)
    # Chosen by torch.where, so the gradient of the difference, however infinite its sides, is 0 where it is not taken.
    difference = log_probs.to(dtype) - other_log_probs.to(dtype)
    return torch.where(where, torch.where(barred | other_barred | wrong, at_most, difference), 0.0)


def saturated(scores: Tensor) -> Tensor:
    """Scores, nats, in which an infinite one, such as a divergence where a token is barred, is one of 20 nats."""
    return torch.nan_to_num(scores, nan=torch.nan, posinf=MAX_LOG_RATIO, neginf=-MAX_LOG_RATIO)


def masked_mean(values: Tensor, where: Tensor, *, dim: int | None = None, empty: float = 0.0) -> Tensor:
    """Mean of `values` where `where`, in at least float32; `empty` if there is no such element."""
    total = torch.where(where, values.to(at_least_float32(values.dtype)), 0.0).sum(dim)
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
    _refuse(
        argument,
        "NaN",
        values.isnan() & where,
        "look for an all-masked attention row or an overflow in the pass that made it",
    )


def check_finite(argument: str, values: Tensor, where: Tensor) -> None:
    """Raise if a value that counts is NaN or infinite, naming the first. Reads the tensor on the host."""
    check_no_nan(argument, values, where)
    _refuse(argument, "infinite", values.isinf() & where, "pass a finite number, such as a clipped one")


def check_log_probs(argument: str, values: Tensor, where: Tensor) -> None:
    """Raise if a log-prob that counts is NaN or plus infinity; minus infinity is legal. Reads it on the host."""
    check_no_nan(argument, values, where)
    _refuse(
        argument,
        "inf",
        (values == torch.inf) & where,
        "a log-probability is at most 0, and minus infinity at a barred token; look for an overflow in the logits",
    )


def log_probs_where_real(*arguments: str) -> Callable[[Mapping[str, Any]], None]:
    """A stage of checks for ``typechecked``: these arguments, if given, must be log-probs where ``mask`` is True."""

    def check(bound: Mapping[str, Any]) -> None:
        for argument in arguments:
            if bound.get(argument) is not None:
                check_log_probs(argument, bound[argument], bound["mask"])

    return check


def _refuse(argument: str, what: str, wrong: Tensor, remedy: str) -> None:
    places = wrong.nonzero()
    if len(places):
        place = " token ".join(map(str, places[0].tolist()))
        raise ValueError(
            f"{argument} is {what} at trajectory {place} ({len(places)} such values where the mask is True); {remedy}"
        )
