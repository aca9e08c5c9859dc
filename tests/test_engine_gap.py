"""The gap between an inference engine and the trainer, reckoned by loops."""

import math

import pytest
import reference
import torch
from barred import barred_batches
from batches import batches
from helpers import as_lists, close
from hypothesis import given
from hypothesis import strategies as st

from srpo_core import LossOptions, Role, grpo_loss
from srpo_core.batch import logged
from srpo_core.engine_gap import engine_gap, engine_weights

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


# The weights that correct for it

HOW = st.fixed_dictionaries(
    {
        "level": st.sampled_from(["token", "sequence"]),
        "out_of_bounds": st.sampled_from(["truncate", "mask"]),
        "low": st.sampled_from([0.0, 0.5]),
        "high": st.sampled_from([1.1, 2.0, math.inf]),
    }
)


@given(batches() | barred_batches(), HOW, st.sampled_from([0.0, 0.3]), st.integers(0, 99))
def test_engine_weights_equal_the_reference(batch, how, unknown, seed):
    g = torch.Generator().manual_seed(seed)
    engine = torch.where(torch.rand(batch.mask.shape, generator=g) < unknown, torch.nan, batch.log_probs)
    actual = engine_weights(batch.old_log_probs, batch.mask, engine_log_probs=engine, **how)
    close(actual, reference.engine_weights(*as_lists(batch.old_log_probs, engine, batch.mask), **how))
    assert (actual[~batch.mask] == 0).all()
    assert not actual.requires_grad


def test_engine_weights_by_hand():
    """Ratios 4, 1/4 and 1, and a token of which the engine said nothing."""
    old = torch.tensor([[0.25, 0.05, 0.5, 0.5]], dtype=torch.float64).log()
    engine = torch.tensor([[0.0625, 0.2, 0.5, math.nan]], dtype=torch.float64).log()

    def weights(**how):
        return engine_weights(old, old < 0, engine_log_probs=engine, **how)

    close(weights(), [[2.0, 0.25, 1.0, 1.0]])
    close(weights(low=0.5), [[2.0, 0.5, 1.0, 1.0]])
    close(weights(out_of_bounds="mask"), [[0.0, 0.25, 1.0, 1.0]])
    close(weights(out_of_bounds="mask", low=0.5, high=5.0), [[4.0, 0.0, 1.0, 1.0]])
    close(weights(level="sequence"), [[1.0, 1.0, 1.0, 1.0]])


def test_engine_weights_on_advantages_are_importance_sampling():
    """Summed over a vocabulary with the engine's probabilities: the gradient is what the trainer's own samples give."""
    g = torch.Generator().manual_seed(0)
    logits, engine_logits = (torch.randn(1, 6, generator=g, dtype=torch.float64) for _ in range(2))
    advantages, mask = torch.randn(1, 6, generator=g, dtype=torch.float64), torch.ones(1, 6).bool()
    old, engine = logits.log_softmax(1), engine_logits.log_softmax(1)

    def gradient(probabilities, weights):
        policy = logits.clone().requires_grad_()
        credit = advantages * weights * probabilities
        options = LossOptions(reduction="sum")
        loss = grpo_loss(policy.log_softmax(1), credit, mask, options, old_log_probs=old).loss
        return torch.autograd.grad(loss, policy)[0]

    weights = engine_weights(old, mask, engine_log_probs=engine, high=math.inf)
    close(gradient(engine.exp(), weights), gradient(old.exp(), 1.0))
    assert not torch.allclose(gradient(engine.exp(), 1.0), gradient(old.exp(), 1.0))


def test_engine_weights_of_a_sequence_fit_a_loss_of_one_ratio_and_those_of_tokens_are_refused():
    old = torch.tensor([[-1.0, -2.0], [-1.5, -1.0]], dtype=torch.float64)
    engine, options = old - torch.tensor([[0.1, 0.2], [-0.3, 0.0]]), LossOptions(surrogate="gspo", reduction="sum")
    advantages = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    weights = engine_weights(old, old < 0, engine_log_probs=engine, level="sequence")
    loss = grpo_loss(old, advantages * weights, old < 0, options, old_log_probs=old).loss
    close(loss, -2 * math.exp(0.3) + 4 * math.exp(-0.3), rtol=1e-6)
    of_tokens = engine_weights(old, old < 0, engine_log_probs=engine)
    with pytest.raises(ValueError, match="^advantages differ inside a response"):
        grpo_loss(old, advantages * of_tokens, old < 0, options, old_log_probs=old)


def test_engine_weights_of_one_log_prob_are_one_and_nothing_changes():
    old = -torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    for level in ("token", "sequence"):
        for out_of_bounds in ("truncate", "mask"):
            how = {"level": level, "out_of_bounds": out_of_bounds}
            assert torch.equal(engine_weights(old, old < 0, engine_log_probs=old, **how), torch.ones(2, 3))


def test_engine_weights_do_not_hide_a_nan_of_the_trainer():
    old, engine = torch.tensor([[math.nan, -1.0]]), -torch.ones(1, 2)
    for out_of_bounds in ("truncate", "mask"):
        weights = engine_weights(old, engine < 0, engine_log_probs=engine, out_of_bounds=out_of_bounds)
        assert weights.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"low": -0.1}, "low must be at least 0, got -0.1"),
        ({"high": 0.0}, "high must be above 0, got 0.0"),
        ({"high": math.nan}, "high must be above 0, got nan"),
        ({"low": 3.0}, "low must be at most high 2.0, got 3.0"),
        ({"level": "geometric"}, "level must be one of 'token', 'sequence', got 'geometric'"),
        ({"out_of_bounds": "clip"}, "out_of_bounds must be one of 'truncate', 'mask', got 'clip'"),
    ],
)
def test_wrong_arguments_of_the_weights_are_named(how, message):
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=f"^(engine_weights: )?{message}"):
        engine_weights(zeros, zeros.bool(), engine_log_probs=zeros, **how)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_engine_weights_need_no_host_sync_and_compile_whole(level, fresh_compiler):
    values, mask = torch.zeros(2, 3, device="meta"), torch.zeros(2, 3, dtype=bool, device="meta")
    assert engine_weights(values, mask, engine_log_probs=values, level=level).device.type == "meta"
    old, engine = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))

    def weights(old, engine):
        return engine_weights(old, old < 0.5, engine_log_probs=engine, level=level, out_of_bounds="mask", low=0.5)

    compiled = torch.compile(weights, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(old, engine), weights(old, engine))
