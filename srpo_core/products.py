"""Matrix products with the vocabulary, in the precision and with the memory that each device is fast at."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["add_product", "slices", "write_logits"]

# Vocabulary rows cast at a time where a product needs them in another dtype.
_CAST_ROWS = 2048


def write_logits(
    out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    slopes: Tensor | None,
) -> None:
    """Write the logits and, where there is room for them, the slopes of the soft-cap."""
    scale = 1.0 / temperature
    if hidden.dtype == out.dtype and bias is None and softcap is None:
        torch.addmm(out, hidden, weight.t(), beta=0, alpha=scale, out=out)
        return
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif out.device.type == "cuda":
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    elif torch.compiler.is_compiling():
        torch.mm(hidden.to(out.dtype), weight.to(out.dtype).t(), out=out)
    else:
        hidden = hidden.to(out.dtype)
        # One buffer for all: memory that is new each time costs more than the cast.
        cast = weight.new_empty(min(_CAST_ROWS, len(weight)), weight.shape[1], dtype=out.dtype)
        with _bfloat16_products():
            for rows in slices(0, len(weight), _CAST_ROWS):
                torch.mm(hidden, cast[: rows.stop - rows.start].copy_(weight[rows]).t(), out=out[:, rows])
    if bias is not None:
        out.add_(bias)
    if softcap is not None:
        out.div_(softcap).tanh_()
        if slopes is not None:
            slopes = slopes[: len(out)]
            torch.addcmul(torch.ones((), dtype=out.dtype, device=out.device), out, out, value=-1, out=slopes)
        scale *= softcap
    if scale != 1.0:
        out.mul_(scale)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        for rows in slices(0, len(total), _CAST_ROWS):
            total[rows] += left[rows] @ right


def slices(start: int, stop: int, size: int, multiple: int = 1) -> Iterator[slice]:
    """As few slices of at most `size` as cover the range, of equal length or nearly, in whole numbers of `multiple`."""
    units = (stop - start) // multiple
    count = -(-units // (size // multiple))
    for i in range(count):
        yield slice(start + i * units // count * multiple, start + (i + 1) * units // count * multiple)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Let float32 products use the bfloat16 units: exact where both factors were bfloat16, and several times faster."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is None:  # before torch 2.9: as exact, and slower
        yield
        return
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
