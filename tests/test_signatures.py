"""Rules of every public function, read off its signature: what may be positional, and unknown names in every mode."""

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
import torch
from packaging.version import Version
from torch._dynamo.exc import Unsupported

import srpo_core
from srpo_core import OutputLayer, counterfactual_responses, grpo_loss
from srpo_core.counterfactuals import CounterfactualResponses
from srpo_core.reliance import SpanCounterfactuals, span_counterfactuals
from srpo_core.surrogates import Surrogate
from srpo_core.tags import RoleTagIds

SIZES = {"batch": 2, "time": 3, "new_time": 3, "images": 2, "channel": 3, "height": 8, "width": 8, "vocab": 4, "n": 2}
SIZES |= {"hidden_dim": 5, "spans": 2, "rewards": 3}


class Characters:
    eos_token_id = 0

    def decode(self, ids):
        return "".join(map(chr, ids))


def checked_functions():
    """Every function and method of the public modules whose arguments are checked, by its name."""
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.iter_modules(srpo_core.__path__, "srpo_core.")
        if not module.ispkg
    ]
    public = [getattr(module, name) for module in modules for name in getattr(module, "__all__", ())]
    found = {value.__name__: value for value in public if is_checked(value)}
    for cls in filter(inspect.isclass, public):
        found |= {f"{cls.__name__}.{name}": value for name, value in vars(cls).items() if is_checked(value)}
    return found


def is_checked(value):
    return inspect.isfunction(value) and value.__code__.co_name.startswith("typechecked_")


CHECKED = checked_functions()


def parts_of(annotation):
    return get_args(annotation) if get_origin(annotation) not in (Literal, None) else (annotation,)


def array_of(annotation):
    """The jaxtyping annotation in it, if there is one."""
    return next((part for part in parts_of(annotation) if hasattr(part, "dim_str")), None)


def literal_of(annotation):
    return next((get_args(part) for part in parts_of(annotation) if get_origin(part) is Literal), None)


def positional(function):
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [parameter for parameter in inspect.signature(function).parameters.values() if parameter.kind is kind]


# What may be positional


class Shape(NamedTuple):
    dtypes: frozenset[str]
    sizes: tuple[str, ...]

    def may_equal(self, other):
        """Whether one tensor fits both: of one dtype and as many axes, whatever their names."""
        return bool(self.dtypes & other.dtypes) and len(self.sizes) == len(other.sizes)


def shape_of(parameter):
    array = array_of(parameter.annotation)
    return None if array is None else Shape(frozenset(array.dtypes), tuple(array.dim_str.split()))


# What tells these apart is checked at run time: see test_exchanged_arguments_raise.
TOLD_APART = {
    "grpo_loss": {("log_probs", "advantages")},
    "Surrogate.__call__": {("log_probs", "advantages")},
    "counterfactual_responses": {("token_ids", "roles")},
    "span_counterfactuals": {("token_ids", "roles")},
}


def test_the_functions_with_many_tensors_are_among_the_checked_ones():
    """Else the rules below would hold of nothing."""
    assert {
        "grpo_loss", "srpo_loss", "srpo_advantages", "shared_baseline_weights", "fused_linear_grpo_loss",
        "Surrogate.__call__", "visual_dependency", "perception_consistency", "kl_penalty", "token_divergence",
        "credit_metrics", "CounterfactualResponses.carry_back", "SpanCounterfactuals.reliance",
    } <= CHECKED.keys()  # fmt: skip
    assert CHECKED["CounterfactualResponses.carry_back"] is CounterfactualResponses.carry_back
    assert CHECKED["SpanCounterfactuals.reliance"] is SpanCounterfactuals.reliance


@pytest.mark.parametrize("name", CHECKED)
def test_no_two_positional_tensors_can_be_exchanged_in_silence(name):
    tensors = [(parameter.name, shape) for parameter in positional(CHECKED[name]) if (shape := shape_of(parameter))]
    alike = {(a, b) for (a, one), (b, other) in combinations(tensors, 2) if one.may_equal(other)}
    assert alike == TOLD_APART.get(name, set())


@pytest.mark.parametrize("name", CHECKED)
def test_only_options_are_positional_with_a_default_and_no_positional_argument_may_be_none(name):
    for parameter in positional(CHECKED[name]):
        assert parameter.name == "options" or parameter.default is inspect.Parameter.empty
        assert type(None) not in parts_of(parameter.annotation)


def test_exchanged_arguments_raise():
    policy, other = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2)
    mask, ids, roles = torch.ones(1, 2).bool(), torch.tensor([[7, 8]]), torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="advantages requires a gradient and log_probs does not"):
        grpo_loss(other, policy, mask, old_log_probs=other)
    for surrogate in Surrogate.known().values():
        with pytest.raises(ValueError, match="advantages requires a gradient and log_probs does not"):
            surrogate()(other, policy, mask, old_log_probs=other)
    for function in (counterfactual_responses, span_counterfactuals):
        with pytest.raises(ValueError, match="roles is 7 at trajectory 0 token 0"):
            function(roles, ids, mask)


# An unknown name is a ValueError: eager, compiled, and without any checks of types


class Choice(NamedTuple):
    function: str
    argument: str
    names: tuple[str, ...]


CHOICES = [
    Choice(name, parameter.name, names)
    for name, function in CHECKED.items()
    for parameter in inspect.signature(function).parameters.values()
    if (names := literal_of(parameter.annotation)) is not None
]
# They run on the host and read values before anything else; nobody compiles them.
ON_THE_HOST = {"corrupt_images", "corrupt_pixel_values"}


def some_tensor(parameter):
    array = array_of(parameter.annotation)
    sizes = [int(name) if name.isdigit() else SIZES[name] for name in array.dim_str.replace("...", "images").split()]
    if parameter.name == "pixel_values":
        return torch.rand(2, 3, 8, 8)
    dtype = torch.bool if "bool" in array.dtypes else torch.float32 if "float32" in array.dtypes else torch.int64
    return torch.ones(sizes, dtype=dtype)


def needed_arguments(choice):
    others = {
        "output": OutputLayer(torch.ones(SIZES["vocab"], SIZES["hidden_dim"])),
        "tokenizer": Characters(),
        "tag_ids": RoleTagIds(1, 2, 3, 4),
        "eos_token_id": 0,
    }
    found = {"image_mean": 0.0, "image_std": 1.0} if choice.function == "corrupt_pixel_values" else {}
    for each in inspect.signature(CHECKED[choice.function]).parameters.values():
        if each.default is each.empty:
            found[each.name] = some_tensor(each) if array_of(each.annotation) is not None else others[each.name]
    return found


def call(choice, value, arguments) -> Any:
    return CHECKED[choice.function](**arguments, **{choice.argument: value})


def message_of(choice):
    return rf"{choice.argument} must be one of '.+', got 'typo'"


def test_the_functions_with_a_choice_are_found():
    assert len(CHOICES) >= 15
    assert {"kl_penalty", "aggregate", "visual_dependency", "token_divergence", "fused_linear_grpo_loss"} <= {
        choice.function for choice in CHOICES
    }


each_choice = pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.function}-{choice.argument}")


@each_choice
def test_an_unknown_name_is_a_value_error(choice):
    with pytest.raises(ValueError, match=message_of(choice)):
        call(choice, "typo", needed_arguments(choice))


@each_choice
def test_an_unknown_name_is_a_value_error_in_a_graph_that_must_be_whole(choice, fresh_compiler):
    """PyTorch wraps whatever is raised there, and quotes it; before torch 2.9 it only says that there was something."""
    if choice.function in ON_THE_HOST:
        pytest.skip("reads values on the host")
    quotes = Version(torch.__version__).release >= (2, 9)
    with pytest.raises(
        (ValueError, Unsupported), match=message_of(choice) if quotes else "Observed exception"
    ) as error:
        torch.compile(partial(call, choice), fullgraph=True, backend="eager")("typo", needed_arguments(choice))
    assert isinstance(error.value, ValueError) or not quotes or "raised exception ValueError(" in str(error.value)


def test_an_unknown_name_is_a_value_error_under_compile(fresh_compiler):
    """Where the graph may break, it is the very error. One function stands for all: this is slow."""
    choice = next(choice for choice in CHOICES if choice.function == "kl_penalty")
    with pytest.raises(ValueError, match=message_of(choice)):
        torch.compile(partial(call, choice), backend="eager")("typo", needed_arguments(choice))


def without_checks() -> None:
    """Run in a process of its own, with JAXTYPING_DISABLE=1."""
    for choice in CHOICES:
        try:
            call(choice, "typo", needed_arguments(choice))
        except ValueError as error:
            print(f"{choice.function}-{choice.argument}: {error}")


def test_an_unknown_name_is_a_value_error_without_checks_of_types():
    """With JAXTYPING_DISABLE=1, as some train."""
    out = subprocess.check_output(
        [sys.executable, "-c", "import test_signatures; test_signatures.without_checks()"],
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"JAXTYPING_DISABLE": "1"},
    )
    for choice, line in zip(CHOICES, out.splitlines(), strict=True):
        assert re.fullmatch(f"{choice.function}-{choice.argument}: {message_of(choice)}", line)
