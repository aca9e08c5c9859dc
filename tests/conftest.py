"""One thread per test process, few examples per property of hypothesis, and no coverage of what compiles."""

import shutil

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("default", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture
def cpp_compiler():
    """Inductor writes C++ for a CPU; a machine without a compiler can trace a graph whole but not build it."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile's CPU backend needs g++ or clang++")


@pytest.fixture
def fresh_compiler():
    """No graph of another test."""
    torch.compiler.reset()


def pytest_collection_modifyitems(items):
    """Coverage follows the compiler through its own code, which doubles the time; eager tests run the same lines."""
    for item in items:
        if "fresh_compiler" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.no_cover)
