"""Messages that name the argument, what was expected and what to pass instead; and what the wrapper leaves alone."""

import random
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from jaxtyping import Bool, Float, Int, TypeCheckError
from torch import Tensor

from srpo_core.typechecking import choose, typechecked


@typechecked
def function(
    values: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    ids: Int[Tensor, " batch"],
    *,
    scale: float | Float[Tensor, ""] = 1.0,
    other: Float[Tensor, "batch time"] | None = None,
    grid: Int[Tensor, "batch 3"] | None = None,
    kind: Literal["a", "b"] = "a",
    count: int = 1,
) -> Float[Tensor, "batch time"]:
    """Docstring."""
    return values[:1] if count == 0 else values


GOOD = {"values": torch.zeros(2, 3), "mask": torch.ones(2, 3).bool(), "ids": torch.zeros(2).long()}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"scale": 1},  # YAML writes whole numbers
        {"scale": torch.tensor(2.0)},
        {"other": torch.zeros(2, 3)},
        {"values": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {"grid": torch.zeros(2, 3, dtype=torch.int32)},
    ],
)
def test_right_arguments_pass(change):
    assert function(**(GOOD | change)).shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(2, 3)}, "function: mask must be Bool[Tensor, 'batch time'], got float32 of shape (2, 3); "
                                     "pass mask.bool()"),
        ({"mask": torch.ones(2, 4).bool()}, "batch=2 (from values), time=3 (from values), got bool of shape (2, 4); "
                                            "align it with values, nothing is broadcast"),
        ({"ids": torch.zeros(2, 3).long()}, "it needs 1 axis; pass one value per response, not one per token"),
        ({"values": torch.zeros(2)}, "values must be Float[Tensor, 'batch time'], got float32 of shape (2,): it needs "
                                     "2 axes; one value per response becomes one per token with"),
        ({"values": torch.zeros(2, 3, 4)}, "it needs 2 axes"),
        ({"values": torch.zeros(2, 3).long()}, "pass values.float()"),
        ({"ids": torch.zeros(2)}, "ids must be Int[Tensor, 'batch'], got float32 of shape (2,); pass ids.long()"),
        ({"values": [[0.0]]}, "values must be Float[Tensor, 'batch time'], got list; pass a torch.Tensor"),
        ({"other": torch.zeros(1, 3)}, "other must be"),
        ({"grid": torch.zeros(2, 4).long()}, "grid must be Int[Tensor, 'batch 3'], got int64 of shape (2, 4)"),
        ({"scale": torch.zeros(2)}, "scale must be Float[Tensor, ''], got float32 of shape (2,): it needs 0 axes"),
        ({"kind": "c"}, "function: kind must be one of 'a', 'b', got 'c'"),
        ({"count": "1"}, "function: count must be of type int, got '1'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_with_the_remedy(change, message):
    with pytest.raises(TypeCheckError) as error:
        function(**(GOOD | change))
    assert message in str(error.value)


def test_what_cannot_be_put_into_a_sentence_keeps_the_original_message():
    with pytest.raises(TypeCheckError, match="return value"):
        function(**GOOD, count=0)
    with pytest.raises(TypeCheckError, match="scale"):
        function(**GOOD, scale="wide")


def test_calls_that_python_itself_refuses_stay_as_python_says_them():
    with pytest.raises(TypeError, match="missing a required argument|missing"):
        function(GOOD["values"])


def test_the_wrapper_is_transparent():
    assert function.__name__ == "function"
    assert function.__doc__ == "Docstring."
    assert (
        torch.func.grad(lambda values: function(values, GOOD["mask"], GOOD["ids"]).sum())(torch.zeros(2, 3)).sum() == 6
    )


def test_choose_names_the_argument_and_its_options():
    assert choose("kind", "a", {"a": 1}) == 1
    with pytest.raises(ValueError, match="^kind must be one of 'a', 'b', got 'c'$"):
        choose("kind", "c", {"a": 1, "b": 2})


def test_checking_a_sequence_leaves_pythons_random_state_alone():
    @typechecked
    def sequence(ids: int | Sequence[int]) -> int:
        return 0

    state = random.getstate()
    sequence([1, 2, 3])
    with pytest.raises(TypeCheckError):
        sequence(["a"])  # type: ignore[list-item]
    assert random.getstate() == state
