"""One thread per test process, and few examples where hypothesis has many properties to try."""

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
