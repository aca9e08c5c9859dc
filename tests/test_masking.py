"""Masked reductions: plain loops, what they are of nothing, NaN under the mask; and the checks that name a NaN."""

import math
import statistics

import pytest
import reference
import torch
from barred import barred_batches
from batches import batches
from helpers import as_lists, close
from hypothesis import given

from srpo_core.masking import (
    at_least_float32,
    check_log_probs,
    check_no_nan,
    is_barred,
    log_probs_where_real,
    log_ratio_of,
    masked_max,
    masked_mean,
    masked_min,
    saturated,
)


@given(batches())
def test_masked_mean_min_and_max_equal_plain_loops(batch):
    values, mask = batch.log_probs, batch.mask
    rows = [
        [x for x, real in zip(*row, strict=True) if real] for row in zip(values.tolist(), mask.tolist(), strict=True)
    ]
    real = [x for row in rows for x in row]
    close(masked_mean(values, mask), statistics.fmean(real) if real else 0.0)
    close(masked_mean(values, mask, empty=7.0), statistics.fmean(real) if real else 7.0)
    close(masked_mean(values, mask, dim=1, empty=7.0), [statistics.fmean(row) if row else 7.0 for row in rows])
    close(masked_min(values, mask, empty=7.0), min(real, default=7.0))
    close(masked_max(values, mask, empty=7.0), max(real, default=7.0))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_masked_reductions_of_nothing_are_what_is_asked_for(shape):
    values, mask = torch.zeros(shape), torch.zeros(shape).bool()
    for reduce in (masked_mean, masked_min, masked_max):
        assert reduce(values, mask, empty=7.0) == 7.0
    assert masked_mean(values, mask, dim=1, empty=7.0).tolist() == [7.0] * shape[0]


def test_the_gradient_of_a_masked_mean_stays_out_of_the_padding():
    values = torch.tensor([1.0, torch.nan, 3.0], requires_grad=True)
    masked_mean(values, torch.tensor([True, False, True])).backward()
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_at_least_float32_keeps_float64():
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    assert [*map(at_least_float32, dtypes)] == [torch.float32] * 3 + [torch.float64]


@given(barred_batches())
def test_log_ratio_of_equals_plain_loops_and_sends_no_gradient_to_barred_tokens(batch):
    first, second = (x.clone().requires_grad_() for x in (batch.log_probs, batch.old_log_probs))
    actual = log_ratio_of(first, second, batch.mask)
    lists = as_lists(first, second, batch.mask)
    close(
        actual,
        [
            [reference.log_ratio(p, q) if real else 0.0 for p, q, real in zip(*rows, strict=True)]
            for rows in zip(*lists, strict=True)
        ],
    )
    possible = (batch.mask & ~is_barred(first) & ~is_barred(second)).double()
    for gradient, sign in zip(torch.autograd.grad(actual.sum(), [first, second]), (1.0, -1.0), strict=True):
        assert torch.equal(gradient, sign * possible)


def test_log_ratio_of_half_precision_is_subtracted_in_float32():
    first, second = torch.tensor([[-3.0, -math.inf]]).bfloat16(), torch.tensor([[-3.001953125, -1.0]])
    actual = log_ratio_of(first, second, torch.ones(1, 2).bool())
    assert actual.dtype == torch.float32
    assert actual.tolist() == [[0.001953125, -20.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_barred_is_minus_infinity_and_the_lowest_numbers_but_no_log_prob_of_a_model(dtype):
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    values = torch.tensor([-math.inf, lowest, lowest / 2, -1e4, -1.0, 0.0, math.inf, math.nan], dtype=dtype)
    assert is_barred(values).tolist() == [True] * 3 + [False] * 5


def test_saturated_bounds_what_is_infinite_and_nothing_else():
    values = torch.tensor([math.inf, -math.inf, 300.0, -1.5, math.nan])
    assert saturated(values)[:4].tolist() == [20.0, -20.0, 300.0, -1.5]
    assert saturated(values)[4].isnan()


def test_check_no_nan_names_the_first_place_and_says_how_many():
    values, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
    values[0, 1], values[1, 0], values[1, 2] = math.nan, math.nan, math.nan
    with pytest.raises(ValueError, match="^x is NaN at trajectory 0 token 1 .3 such values"):
        check_no_nan("x", values, mask)
    mask[0, 1] = False
    with pytest.raises(ValueError, match="^x is NaN at trajectory 1 token 0 .2 such values"):
        check_no_nan("x", values, mask)
    with pytest.raises(ValueError, match="^rewards is NaN at trajectory 1 "):
        check_no_nan("rewards", values[:, 0], mask[:, 0])
    check_no_nan("x", values, values == 0)
    check_no_nan("x", torch.full((1, 2), math.inf), mask[:1, :2])  # an excluded token is no mistake


def test_check_log_probs_names_nan_and_plus_infinity_and_allows_minus_infinity():
    values, mask = torch.tensor([[-math.inf, -1.0], [math.inf, math.inf]]), torch.tensor([[True, True], [False, True]])
    with pytest.raises(ValueError, match="^x is inf at trajectory 1 token 1 .1 such values.* barred token; look for"):
        check_log_probs("x", values, mask)
    check_log_probs("x", values, values <= 0)
    with pytest.raises(ValueError, match="^x is NaN at trajectory 0 token 1"):
        check_log_probs("x", torch.tensor([[-1.0, math.nan]]), mask[:1])


def test_log_probs_where_real_looks_at_the_arguments_it_names_if_they_are_given():
    check = log_probs_where_real("a", "b")
    fine, wrong, mask = torch.zeros(1, 2), torch.tensor([[0.0, math.nan]]), torch.ones(1, 2).bool()
    check({"a": fine, "b": None, "mask": mask})
    check({"a": fine, "c": wrong, "mask": mask})
    check({"a": wrong, "mask": torch.tensor([[True, False]])})
    with pytest.raises(ValueError, match="^b is NaN at trajectory 0 token 1"):
        check({"a": fine, "b": wrong, "mask": mask})
