"""Messages that name the argument and what to pass instead, checks of values as a second stage, what stays alone."""

import random
import threading
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from jaxtyping import Bool, Float, Int, TypeCheckError
from torch import Tensor

from srpo_core.typechecking import typechecked


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


def test_a_typechecked_function_is_transparent():
    assert function.__name__ == "function"
    assert function.__doc__ == "Docstring."
    assert (
        torch.func.grad(lambda values: function(values, GOOD["mask"], GOOD["ids"]).sum())(torch.zeros(2, 3)).sum() == 6
    )


def test_an_unknown_name_is_a_value_error_in_eager_mode_too():
    for kind in ("c", 3, ["a"], None):
        with pytest.raises(
            ValueError, match=f"^function: kind must be one of 'a', 'b', got {kind!r}".replace("[", r"\[")
        ):
            function(**GOOD, kind=kind)


def test_checking_a_sequence_leaves_pythons_random_state_alone():
    @typechecked
    def sequence(ids: int | Sequence[int]) -> int:
        return 0

    state = random.getstate()
    sequence([1, 2, 3])
    with pytest.raises(TypeCheckError):
        sequence(["a"])  # type: ignore[list-item]
    assert random.getstate() == state


# Values, the second stage


class Stage:
    """Functions whose check notes which of them it ran for, and what it was given."""

    def __init__(self):
        self.ran = []
        self.inner = typechecked(values=(self.check("inner"),))(self._inner)
        self.outer = typechecked(values=(self.check("outer"), self.check("outer again")))(self._outer)
        self.free = typechecked(values=(self.check("free"),), on_device=False)(self._free)
        self.plain = typechecked(self._plain)

    def check(self, name):
        def note(arguments):
            self.ran.append(name)
            self.arguments = dict(arguments)
            if arguments["values"].device.type == "cpu" and arguments["values"].isnan().any():
                raise ValueError(f"values is NaN, says {name}")

        return note

    @staticmethod
    def _inner(values: Float[Tensor, "n"], *, scale: float = 1.0) -> Float[Tensor, "n"]:
        return values * scale

    def _outer(self, values: Float[Tensor, "n"], act: object = None) -> Float[Tensor, "n"]:
        if act is not None:
            act()
        return self.inner(values)

    def _free(self, values: Float[Tensor, "n"], other: Float[Tensor, "n"] | None = None) -> Float[Tensor, "n"]:
        return self.inner(values)

    def _plain(self, values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return self.inner(values)


ONE, NAN = torch.ones(2), torch.tensor([1.0, torch.nan])


def test_values_are_checked_in_the_outermost_call_only():
    stage = Stage()
    stage.outer(ONE)
    assert stage.ran == ["outer", "outer again"]
    stage.inner(ONE)
    assert stage.ran == ["outer", "outer again", "inner"]
    stage.plain(ONE)  # no values are its own business
    assert stage.ran[3:] == ["inner"]
    with pytest.raises(ValueError, match="says inner"):
        stage.plain(NAN)
    with pytest.raises(ValueError, match="says outer$"):
        stage.outer(NAN)
    # What a checked function computes itself is its own responsibility.
    Stage().outer(ONE, act=lambda: stage.inner(NAN))


def test_a_check_gets_the_arguments_by_name_however_they_were_passed():
    stage = Stage()
    stage.inner(ONE)
    assert [*stage.arguments] == ["values"]  # a default is not there
    stage.inner(scale=2, values=ONE)
    assert stage.arguments["scale"] == 2
    assert stage.arguments["values"] is ONE


def test_shapes_come_before_values():
    stage = Stage()
    with pytest.raises(TypeCheckError, match="values must be Float"):
        stage.outer(torch.ones(2, 2))
    with pytest.raises(TypeCheckError, match="values must be Float"):
        stage.outer(torch.ones(2).long())
    assert stage.ran == []


def test_values_are_checked_again_after_an_error():
    def fail():
        raise RuntimeError("inside")

    stage = Stage()
    for call, error in ((lambda: stage.outer(NAN), ValueError), (lambda: stage.outer(ONE, act=fail), RuntimeError)):
        with pytest.raises(error):
            call()
        stage.ran.clear()
        stage.inner(ONE)
        assert stage.ran == ["inner"]


def test_an_error_that_the_outer_call_survives_does_not_switch_checks_on_inside_it():
    stage = Stage()

    def survive():
        with pytest.raises(TypeCheckError):
            stage.inner("no tensor")
        stage.inner(ONE)

    stage.outer(ONE, act=survive)
    assert stage.ran == ["outer", "outer again"]


def test_each_thread_checks_for_itself():
    stage = Stage()

    def elsewhere():
        thread = threading.Thread(target=stage.inner, args=(ONE,))
        thread.start()
        thread.join()

    stage.outer(ONE, act=elsewhere)
    assert stage.ran == ["outer", "outer again", "inner"]  # that of the other thread, none of this one


def test_values_on_a_device_are_left_alone_where_a_step_must_not_wait():
    stage, meta = Stage(), torch.ones(2, device="meta")
    stage.free(meta)
    stage.free(ONE, other=meta)
    assert stage.ran == []
    stage.free(ONE)
    stage.free(ONE, other=None)
    assert stage.ran == ["free", "free"]
    with pytest.raises(ValueError, match="says free"):
        stage.free(NAN)
    stage.inner(meta)
    assert stage.ran[3:] == ["inner"]


def test_nothing_is_checked_in_a_compiled_graph(fresh_compiler):
    stage = Stage()
    compiled = torch.compile(lambda values: stage.inner(values) + 1.0, fullgraph=True, backend="eager")
    assert compiled(NAN).isnan().tolist() == [False, True]
    assert stage.ran == []


def test_a_typechecked_function_with_checks_of_values_is_transparent():
    @typechecked(values=(lambda arguments: None,))
    def documented(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Docstring."""
        return values

    assert documented.__name__ == "documented"
    assert documented.__doc__ == "Docstring."
    with pytest.raises(TypeError, match="missing"):
        documented()
