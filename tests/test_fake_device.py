"""Every public function of tensors on a GPU, without one: fake tensors of "cuda" have shapes and dtypes, but no values.

Whatever would wait for the device is refused: a value that is read on the host, a shape that depends on values, a copy
between the host and the device. Arguments come from the signatures, so a new function is among them at once. Gradients
are taken on the meta device, because the engine that computes them asks for a real device of "cuda".
"""

import inspect
import re
import shutil
import subprocess
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_signatures import CHECKED, SIZES, array_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import srpo_core
from srpo_core import LossOptions, OutputLayer
from srpo_core.counterfactuals import CounterfactualResponses
from srpo_core.masking import at_least_float32
from srpo_core.surrogates import Surrogate

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SURROGATES = Surrogate.known()
aten = torch.ops.aten

# What runs on the host, once per rollout batch, and why.
ON_THE_HOST = {
    "corrupt_images": "draws from a generator of the host, by the identity of each prompt",
    "corrupt_pixel_values": "draws from a generator of the host, by the identity of each prompt",
    "counterfactual_responses": "the new responses are as long as the longest of them",
    "span_counterfactuals": "the new responses are as long as the longest of them",
    "segment_responses": "decodes the tokens",
    "segment_roles": "parses each response",
    "credit": "takes a Plan, which is made on the host",
    "SpanCounterfactuals.reliance": "a method of what is made on the host; its tensors go to span_reliance",
    "gradient_reliance": "checks the gradient that it has just taken",
    "credit_diagnostics": "returns numbers, some of them of a random permutation",
    "interference": "counts on the host",
}


class Waits(Exception):
    """An operation for which a host waits for its device."""


class NoWaiting(TorchDispatchMode):
    """Refuses operations that would wait. On top of fake tensors, which alone let some of them pass."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            raise Waits(f"{func} reads a value")
        if torch.Tag.dynamic_output_shape in func.tags and not self._has_fixed_shape(func, args):
            raise Waits(f"the shape of what {func} makes depends on values")
        made = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            kinds = {tensor.device.type for tensor in tree_leaves((args, made)) if isinstance(tensor, torch.Tensor)}
            if len(kinds) > 1:
                raise Waits(f"{func} copies between {' and '.join(sorted(kinds))}")
        return made

    @staticmethod
    def _has_fixed_shape(func, args) -> bool:
        return func is aten.index.Tensor and all(
            index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1]
        )


# A build of PyTorch without CUDA cannot switch to a device of CUDA, not even for an index; this switch does nothing.
NO_SWITCH = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using NoSwitch = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, NoSwitch);
}
"""


@pytest.fixture(scope="module")
def cuda_can_be_faked(tmp_path_factory):
    if torch.backends.cuda.is_built():
        return
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("a build of PyTorch without CUDA needs g++ or clang++ for a fake device of CUDA")
    folder, torch_folder = tmp_path_factory.mktemp("guard"), Path(torch.__file__).parent
    (folder / "guard.cpp").write_text(NO_SWITCH)
    options = f"-shared -fPIC -std=c++17 -I{torch_folder}/include guard.cpp -o guard.so -L{torch_folder}/lib -lc10"
    subprocess.run([compiler, *options.split()], cwd=folder, check=True, capture_output=True)
    torch.ops.load_library(str(folder / "guard.so"))


@contextmanager
def on_fake_cuda():
    with torch.no_grad(), FakeTensorMode(), NoWaiting(), torch.device("cuda"):
        yield


@contextmanager
def on_meta():
    with NoWaiting(), torch.device("meta"):
        yield


@contextmanager
def unchecked(monkeypatch):
    """Without the checks of values, as in a graph that is compiled; nothing is compiled here."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


def tensor_for(parameter, dtype, requires_grad=False):
    array = array_of(parameter.annotation)
    sizes = [int(name) if name.isdigit() else SIZES[name] for name in array.dim_str.replace("...", "images").split()]
    if "float32" in array.dtypes:
        return torch.ones(sizes, dtype=dtype, requires_grad=requires_grad)
    return torch.ones(sizes, dtype=torch.bool if "bool" in array.dtypes else torch.int64)


def arguments_of(name, dtype) -> dict[str, Any]:
    """All arguments that are tensors, also those that may be left out, and the others that are needed."""
    found = {}
    for each in inspect.signature(CHECKED[name]).parameters.values():
        if each.name == "self":
            found["self"] = self_of(name)
        elif each.name == "output":
            shape = SIZES["vocab"], SIZES["hidden_dim"]
            found["output"] = OutputLayer(torch.ones(shape, dtype=dtype, requires_grad=True))
        elif array_of(each.annotation) is not None:
            trained = each.name in ("hidden", "log_probs") and name in LOSSES
            found[each.name] = tensor_for(each, dtype, requires_grad=trained)
        else:
            assert each.default is not each.empty, f"say here what to pass as {each.name} of {name}"
    if found.get("normalizer") is not None:
        found["normalizer"] = found["normalizer"].new_ones((), dtype=torch.float32)
    return found


def self_of(name):
    if name.startswith("Surrogate."):
        return SURROGATES["clip"]()
    assert name.startswith("CounterfactualResponses."), f"say here what {name} is a method of"
    ids, real = (torch.ones(SIZES["batch"], SIZES["new_time"], dtype=dtype) for dtype in (torch.int64, torch.bool))
    return CounterfactualResponses(ids, real, real, positions=ids, donors=ids[:, 0])


LOSSES = {"grpo_loss", "srpo_loss", "kl_penalty", "Surrogate.__call__"}
LOSSES |= {"fused_linear_grpo_loss", "fused_linear_log_probs", "fused_linear_entropy"}
ON_THE_DEVICE = sorted(CHECKED.keys() - ON_THE_HOST)
READ_IN_CHECKS = {
    name for name in ON_THE_DEVICE if re.search(r"read on\s+the host", inspect.getdoc(CHECKED[name]) or "")
}
# Their docstrings refer to the function that says it.
READ_IN_CHECKS |= {"perception_consistency"}
# What only moves values keeps their dtype.
MOVES = {"CounterfactualResponses.carry_back"}
each_function = pytest.mark.parametrize("name", ON_THE_DEVICE)


def tensors_of(result):
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def test_the_probe_sees_what_would_wait(cuda_can_be_faked):
    with on_fake_cuda():
        values = torch.ones(2, 3, device="cuda")
        for waits in (
            lambda: values.sum().item(),
            lambda: bool(values.any()),
            lambda: values.nonzero(),
            lambda: values[values > 0],
            lambda: values.unique(),
            lambda: values.masked_select(values > 0),
            lambda: torch.ones(2, device="cpu").to("cuda"),
        ):
            with pytest.raises(Waits):
                waits()
        assert values[torch.zeros(2, dtype=torch.int64, device="cuda")].shape == (2, 3)
        assert (values + 1).device.type == "cuda"


def test_every_public_function_of_tensors_is_here():
    named = {name for name in srpo_core.__all__ if inspect.isfunction(getattr(srpo_core, name))}
    of_tensors = {
        name
        for name in named
        if any(array_of(each.annotation) for each in inspect.signature(getattr(srpo_core, name)).parameters.values())
    }
    assert of_tensors - {"plan"} <= CHECKED.keys()  # plan takes a RolloutBatch, which is made on the host
    assert ON_THE_HOST.keys() <= CHECKED.keys()
    assert {"group_advantages", "grpo_loss", "srpo_loss", "fused_linear_grpo_loss", "role_scales"} <= set(ON_THE_DEVICE)
    assert "credit_metrics" in ON_THE_DEVICE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_function
def test_no_function_waits_and_all_compute_in_at_least_float32(name, dtype, monkeypatch, cuda_can_be_faked):
    checks = unchecked(monkeypatch) if name in READ_IN_CHECKS else nullcontext()
    with on_fake_cuda(), checks:
        arguments = arguments_of(name, dtype)
        result = CHECKED[name](**arguments)
        if isinstance(result, srpo_core.Credit):  # which also holds some of the arguments as they are
            result = result._replace(old_log_probs=None, corrupted_log_probs=None, counterfactual_log_probs=None)
        made = tensors_of(result)
        assert made
        for tensor in made:
            assert tensor.device.type == "cuda"
            if tensor.is_floating_point():
                assert tensor.dtype == (dtype if name in MOVES else at_least_float32(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_gradient_waits_for_the_device_and_each_is_of_the_dtype_of_what_is_trained(name, dtype):
    with on_meta():
        arguments = arguments_of(name, dtype)
        loss = tensors_of(CHECKED[name](**arguments))[0]
        trained = [arguments.get("log_probs", arguments.get("hidden"))]
        trained += [arguments["output"].weight] if "output" in arguments else []
        for gradient in torch.autograd.grad(loss.sum(), trained):
            assert (gradient.dtype, gradient.device.type) == (dtype, "meta")


@pytest.mark.parametrize("name", sorted(READ_IN_CHECKS))
def test_checks_of_values_wait_where_the_docstring_says_so(name, cuda_can_be_faked):
    with on_fake_cuda(), pytest.raises(Waits):
        CHECKED[name](**arguments_of(name, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("function", ["grpo_loss", "srpo_loss", "fused_linear_grpo_loss"])
@pytest.mark.parametrize("device", [on_fake_cuda, on_meta])
def test_no_loss_waits_with_any_surrogate(device, function, surrogate, dtype, cuda_can_be_faked):
    with device():
        arguments = arguments_of(function, dtype)
        options = LossOptions(surrogate=surrogate, kl_coef=0.1)
        if function == "srpo_loss":
            weighted = {"strength": 0.0} if SURROGATES[surrogate].is_one_ratio else {"scale": "batch_rms"}
            options = srpo_core.SRPOConfig(surrogate=surrogate, kl_coef=0.1, baseline="median", **weighted)
        ways: list[dict[str, Any]] = [{}]
        if function == "fused_linear_grpo_loss":
            ways += [{"chunk_tokens": 2, "active_tokens": 5}]
            ways += [] if SURROGATES[surrogate].is_sequence_level else [{"vocab_columns": 4, "chunk_tokens": 1}]
        for way in ways:
            loss, metrics = CHECKED[function](**arguments, options=options, **way)
            if torch.is_grad_enabled():
                loss.backward()
            assert {each.device.type for each in (loss, *metrics.values())} == {arguments["mask"].device.type}
            assert {each.dtype for each in (loss, *metrics.values())} == {at_least_float32(dtype)}
