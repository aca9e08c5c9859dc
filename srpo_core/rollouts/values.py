"""The values of a trainer, turned one at a time into what a line of a rollout file can hold.

Each function raises :class:`Unwritable` where this is not possible. Its reason describes the kind of value and not the
value itself, because reasons are counted and each kind is warned of once.
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from srpo_core.roles import Role
from srpo_core.rollouts.record import DIVERGENCES, KINDS, LOG_PROBS, MAX_LOG_PROB, ROLE_LETTERS, is_whole, load_json
from srpo_core.tags import BrokenReason

_DECIMALS = 5  # of numbers per token: far below the noise between two passes
_LARGEST = float(np.finfo(np.float32).max)  # what a reader takes
_LETTERS = "".join(ROLE_LETTERS[role] for role in sorted(Role))


class Unwritable(Exception):
    """A value that a line cannot hold.

    Attributes:
        reason: The kind of value.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def reason_of(error: Exception) -> str:
    """The kind of an error, in a few words that do not depend on the value."""
    if isinstance(error, Unwritable):
        return error.reason
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def numbers(name: str, values: NDArray[Any]) -> list[float | None]:
    """The numbers of a response's tokens; None is a log-probability of minus infinity."""
    values = values.astype(np.float64)
    excluded = np.isneginf(values) if name in LOG_PROBS else np.zeros(values.shape, dtype=bool)
    kept = np.where(excluded, 0.0, values)
    if np.isnan(kept).any():
        raise Unwritable("NaN")
    if len(kept) and np.abs(kept).max() > _LARGEST:
        raise Unwritable("infinite, or beyond single precision")
    if name in LOG_PROBS and len(kept) and kept.max() > MAX_LOG_PROB:
        raise Unwritable("above 0, which no log-probability is")
    if name in ("weights", *DIVERGENCES) and len(kept) and kept.min() < 0:
        raise Unwritable("below 0")
    written: list[float | None]
    if name in DIVERGENCES:  # one small step moves a distribution by less than a decimal: keep digits instead
        written = [float(f"{value:.5g}") for value in kept.tolist()]
    else:
        written = (np.round(kept, _DECIMALS) + 0.0).tolist()  # + 0.0: -0.0 is 0.0
    for token in np.flatnonzero(excluded).tolist():
        written[token] = None
    return written


def letters(values: NDArray[Any]) -> str:
    """The roles of a response's tokens."""
    if not np.isin(values, [int(role) for role in Role]).all():
        raise Unwritable("not 0, 1 or 2")
    return "".join(_LETTERS[int(role)] for role in values)


def number(value: Any) -> float:
    """A finite number."""
    if isinstance(value, str | bytes):
        raise Unwritable(f"a {type(value).__name__}, which is no number")
    value = float(value)
    if not abs(value) <= _LARGEST:
        raise Unwritable("NaN" if math.isnan(value) else "infinite, or beyond single precision")
    return value


def flag(value: Any) -> bool | None:
    """True or false, also as 1 or 0; None for -1, "not known"."""
    value = number(value)
    if value not in (-1, 0, 1):
        raise Unwritable("neither true nor false")
    return None if value == -1 else bool(value)


def reason_name(value: Any) -> str:
    """The name of a :class:`~srpo_core.BrokenReason`."""
    try:
        return BrokenReason(int(value)).name.lower()
    except ValueError:
        raise Unwritable("none of BrokenReason") from None


def is_donor(value: Any) -> bool:
    """Whether an index is that of a donor; -1 is not."""
    return number(value) >= 0


def group(value: Any) -> int | str:
    """The name of a group."""
    value = _plain(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool) or not is_whole(value):
        raise Unwritable(f"a {type(value).__name__}, neither a whole number nor a text")
    return int(value)


def text(value: Any) -> str:
    """A text; numbers are spelled."""
    value = _plain(value)
    if isinstance(value, str | int | float | os.PathLike):
        return str(value)
    raise Unwritable(f"a {type(value).__name__}, which is no text")


def kind_of_block(value: Any) -> str:
    """``perception``, ``reasoning`` or ``answer``."""
    if value not in KINDS:
        raise Unwritable("no kind of block")
    return value


def extra(value: Any) -> tuple[dict[str, Any], list[Unwritable]]:
    """The part of an object that a line can hold, and the reasons why the rest is left out."""
    if not isinstance(value, Mapping):
        raise Unwritable(f"a {type(value).__name__}, not a mapping")
    kept: dict[str, Any] = {}
    faults: list[Unwritable] = []
    for name, item in value.items():
        try:
            encoded = json.dumps({str(name): item}, ensure_ascii=False, allow_nan=False, default=_jsonable)
            kept |= load_json(encoded.encode("utf-8", "replace"))
        except Exception as error:  # whatever an object of another package raises
            faults.append(error if isinstance(error, Unwritable) else Unwritable(f"not JSON ({type(error).__name__})"))
    return kept, faults


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as one of Python."""
    return value.item() if isinstance(value, np.generic | np.ndarray | Tensor) else value


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    raise Unwritable(f"a {type(value).__name__}, which JSON cannot hold")
