"""Names that every doctest may use without importing them."""

import pytest
import torch

import srpo_core


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace["torch"] = torch
    doctest_namespace.update({name: getattr(srpo_core, name) for name in srpo_core.__all__})
