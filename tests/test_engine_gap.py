"""The gap between an inference engine and the trainer, reckoned by loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srpo_core import Role
from srpo_core.batch import logged
from srpo_core.engine_gap import engine_gap

P, R, O = int(Role.PERCEPTION), int(Role.REASONING), int(Role.OTHER)  # noqa: E741


def quantile(values, share):
    """Linearly interpolated, by hand."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), time=st.integers(1, 9))
def test_engine_gap_is_the_mean_and_quantile_of_absolute_differences_over_known_tokens(seed, rows, time):
    g = torch.Generator().manual_seed(seed)
    own, engine = -3 * torch.rand(2, rows, time, generator=g, dtype=torch.float64)
    scores = torch.randn(rows, time, generator=g, dtype=torch.float64)
    roles = torch.randint(3, (rows, time), generator=g)
    mask = torch.rand(rows, time, generator=g) < 0.7
    engine = torch.where(torch.rand(rows, time, generator=g) < 0.2, torch.nan, engine)
    padded, padded_scores = torch.where(mask, own, torch.nan), torch.where(mask, scores, torch.nan)
    found = engine_gap(padded, roles, mask, scores=padded_scores, engine_log_probs=engine)

    gaps, absolute = [], []
    for row in range(rows):
        for token in range(time):
            if not mask[row, token]:
                continue
            if not math.isnan(engine[row, token].item()):
                gaps.append(abs(own[row, token].item() - engine[row, token].item()))
            if roles[row, token].item() in (P, R):
                absolute.append(abs(scores[row, token].item()))
    expected = {
        "engine/gap/mean": sum(gaps) / len(gaps) if gaps else math.nan,
        "engine/gap/p95": quantile(gaps, 0.95) if gaps else math.nan,
        "engine/score/mean": sum(absolute) / len(absolute) if absolute else math.nan,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, nan_ok=True, abs=1e-9), name


def test_engine_gap_of_nothing_is_absent_and_not_zero():
    nothing = torch.zeros(0, 4)
    metrics = engine_gap(nothing, nothing.long(), nothing.bool(), scores=nothing, engine_log_probs=nothing)
    assert all(value.isnan() for value in metrics.values())
    assert logged(metrics) == {}


def test_engine_gap_counts_a_token_that_one_side_bars_as_a_finite_gap():
    own = torch.tensor([[-torch.inf, -1.0]])
    roles = torch.tensor([[P, O]])
    metrics = engine_gap(own, roles, roles >= 0, scores=0 * own.exp(), engine_log_probs=-torch.ones(1, 2))
    assert metrics["engine/gap/mean"] == 10.0  # 20 nats, as in every contrast, over two tokens


def test_engine_gap_needs_no_host_sync():
    values, roles = torch.zeros(2, 3, device="meta"), torch.zeros(2, 3, dtype=int, device="meta")
    metrics = engine_gap(values, roles, roles == 0, scores=values, engine_log_probs=values)
    assert all(metric.device.type == "meta" and metric.ndim == 0 for metric in metrics.values())
