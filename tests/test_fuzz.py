"""The cases that the fuzzer of tests/fuzz/ found, and some thousand of its kind from random bytes."""

import random
from pathlib import Path

import pytest
from fuzz.targets import CORPUS, TARGETS, Data

CASES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_case_that_was_found_is_an_error_that_is_documented_or_none(path: Path):
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_random_bytes_give_documented_errors_and_sane_results(target):
    generator = random.Random(0)
    for _ in range(300):
        TARGETS[target](generator.randbytes(generator.randrange(200)))


def test_data_are_the_bytes_in_their_order_and_0_behind_the_end():
    data = Data(b"\x05\x02ab\x01\xff")
    assert data.byte(4) == 1
    assert data.text(9) == "ab"
    assert (data.byte(), data.byte(), data.rest()) == (255, 0, b"")
