"""Each statistic against a reference with loops; nothing reads a tensor on the host; compiled equals eager."""

import math
import statistics

import pytest
import torch
from batches import batches
from helpers import as_lists, close
from hypothesis import given
from hypothesis import strategies as st

from srpo_core import Role, srpo_advantages
from srpo_core.diagnostics import QUANTILES, credit_diagnostics, credit_metrics, interference
from srpo_core.tags import BrokenReason

ROLES = {"perception": Role.PERCEPTION, "reasoning": Role.REASONING}


def quantile(values, percent):
    """Linear interpolation between order statistics, as numpy's default."""
    values = sorted(values)
    rank = percent / 100 * (len(values) - 1)
    low, high = math.floor(rank), math.ceil(rank)
    return values[low] + (rank - low) * (values[high] - values[low])


def inputs(batch):
    credit = srpo_advantages(
        batch.old_log_probs,
        batch.advantages,
        batch.roles,
        batch.mask,
        corrupted_log_probs=batch.corrupted_log_probs,
        counterfactual_log_probs=batch.counterfactual_log_probs,
    )
    # Scores are 0 at tokens of no role; the diagnostics must not rely on it.
    scores = torch.where(batch.scored, credit.scores, torch.nan)
    weights = torch.where(batch.mask, credit.weights, torch.nan)
    return weights, batch.roles, batch.mask, scores


def reference(batch, args, correct, donors, score_clip):
    weights, roles, mask, scores = as_lists(*args)
    rows, times = range(len(mask)), range(len(mask[0]))
    real = [(i, t) for i in rows for t in times if mask[i][t]]
    expected, scored = {}, []
    for name, role in ROLES.items():
        tokens = [(i, t) for i, t in real if roles[i][t] == role]
        scored += tokens
        expected[f"tokens/{name}/fraction"] = len(tokens) / len(real) if real else math.nan
        of_weight = {"": tokens, "/right": [p for p in tokens if correct[p[0]] == 1]}
        of_weight["/wrong"] = [p for p in tokens if correct[p[0]] == 0]
        for suffix, chosen in of_weight.items():
            values = [weights[i][t] for i, t in chosen]
            for key, percent in QUANTILES.items():
                expected[f"weight/{name}{suffix}/{key}"] = quantile(values, percent) if values else math.nan
            expected[f"weight/{name}{suffix}/mean"] = statistics.fmean(values) if values else math.nan
        values = [scores[i][t] for i, t in tokens]
        for key, percent in QUANTILES.items():
            expected[f"score/{name}/{key}"] = quantile(values, percent) if values else math.nan
        expected[f"score/{name}/std"] = statistics.pstdev(values) if values else math.nan
        expected[f"score/{name}/clipped"] = (
            statistics.fmean(abs(v) >= score_clip for v in values) if values else math.nan
        )
        noise = [(batch.old_log_probs[p] - batch.log_probs[p]).item() for p in tokens]
        noise = [max(-score_clip, min(score_clip, value)) for value in noise]
        rms = math.sqrt(statistics.fmean(v * v for v in noise)) if noise else math.nan
        expected[f"noise/{name}/rms"] = rms
        expected[f"noise/{name}/above"] = statistics.fmean(abs(v) > 2 * rms for v in values) if values else math.nan
    of_scored = [weights[i][t] for i, t in scored]
    square = len(of_scored) * sum(w * w for w in of_scored)
    expected["tokens/effective_fraction"] = sum(of_scored) ** 2 / square if square else math.nan
    plain = [batch.advantages[i].item() for i, _ in real]
    weighted = [weights[i][t] * batch.advantages[i].item() for i, t in real]
    norm = math.hypot(*plain) * math.hypot(*weighted)
    expected["advantage/cosine"] = sum(a * b for a, b in zip(plain, weighted, strict=True)) / norm if norm else math.nan
    alive = [i for i in rows if any(mask[i])]
    known = [correct[i] for i in alive if correct[i] >= 0]
    expected["right/fraction"] = statistics.fmean(known) if known else math.nan
    both = [i for i in rows if all(any(i == p[0] for p in scored if roles[p[0]][p[1]] == r) for r in ROLES.values())]
    expected["swap/coverage"] = statistics.fmean(donors[i] >= 0 for i in both) if both else math.nan
    return expected


@given(batches(), st.data())
def test_credit_diagnostics_equal_a_reference_with_loops(batch, data):
    rows = len(batch.mask)
    correct = data.draw(st.lists(st.sampled_from([1, 0, -1]), min_size=rows, max_size=rows))
    donors = data.draw(st.lists(st.integers(-1, rows - 1), min_size=rows, max_size=rows))
    score_clip = data.draw(st.sampled_from([1e-3, 5.0]))
    args = inputs(batch)
    metrics = credit_diagnostics(
        *args[:3],
        scores=args[3],
        broken=torch.zeros(rows, dtype=torch.int64),
        advantages=batch.advantages,
        correct=torch.tensor(correct),
        donors=torch.tensor(donors),
        log_probs=batch.old_log_probs,
        repeated_log_probs=batch.log_probs,
        score_clip=score_clip,
    )
    expected = reference(batch, args, correct, donors, score_clip)
    old = credit_metrics(*args[:3], scores=args[3], broken=torch.zeros(rows, dtype=torch.int64))
    assert metrics.keys() == expected.keys() | old.keys()
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
    for name, value in old.items():
        assert torch.equal(metrics[name], value) or (metrics[name].isnan() and value.isnan()), name
    assert all(metric.ndim == 0 and not metric.requires_grad for metric in metrics.values())


@given(batches())
def test_without_its_argument_a_statistic_is_absent(batch):
    weights, roles, mask, scores = inputs(batch)
    names = credit_diagnostics(weights, roles, mask, scores=scores).keys()
    assert not [name for name in names if name.split("/")[0] in {"noise", "swap", "advantage", "broken", "right"}]
    assert not [name for name in names if "clipped" in name or "wrong" in name]


def tensors(batch, time, device="cpu"):
    g = torch.Generator().manual_seed(0)
    weights, scores, log_probs, repeated = (torch.rand(batch, time, generator=g) for _ in range(4))
    roles = torch.randint(0, 3, (batch, time), generator=g)
    advantages = torch.randn(batch, generator=g)
    donors = torch.arange(batch) - 1
    made = (weights, scores, roles, roles < 3, advantages, advantages > 0, donors, log_probs, repeated)
    return [tensor.to(device) for tensor in made]


def everything(weights, scores, roles, mask, advantages, correct, donors, log_probs, repeated):
    return credit_diagnostics(
        weights,
        roles,
        mask,
        scores=scores,
        broken=donors,
        advantages=advantages,
        correct=correct,
        donors=donors,
        log_probs=log_probs,
        repeated_log_probs=repeated,
        score_clip=1.0,
    )


def test_nothing_is_read_on_the_host():
    """Tensors on the meta device have no values: reading one, as a host sync does, raises."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros((), device="meta").item()
    assert all(metric.device.type == "meta" for metric in everything(*tensors(3, 5, device="meta")).values())


def test_compiled_whole_equals_eager(fresh_compiler):
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")(*tensors(3, 5))
    torch.testing.assert_close(compiled, everything(*tensors(3, 5)), equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_of_an_empty_batch_nothing_is_measured(shape):
    assert all(metric.isnan() for metric in everything(*tensors(*shape)).values())


def test_a_role_without_tokens_is_not_measured_and_the_other_one_is():
    ones, roles = torch.ones(1, 3), torch.tensor([[Role.OTHER, Role.PERCEPTION, Role.PERCEPTION]])
    metrics = credit_diagnostics(ones, roles, ones.bool(), scores=ones, correct=torch.tensor([1]), score_clip=2.0)
    absent = {name for name, metric in metrics.items() if metric.isnan()}
    of_reasoning = {name for name in metrics if "reasoning" in name}
    wrong = {name for name in metrics if "wrong" in name}
    # Shares are known: no token is reasoning, which holds none of the weight.
    assert absent == (of_reasoning | wrong) - {"tokens/reasoning/fraction", "weight/reasoning/mass"}
    assert metrics["tokens/reasoning/fraction"] == metrics["weight/reasoning/mass"] == 0


def test_a_token_that_both_passes_exclude_is_no_noise():
    excluded = torch.tensor([[-torch.inf, -1.0]])
    roles, mask = torch.tensor([[1, 1]]), torch.ones(1, 2).bool()
    ones = torch.ones(1, 2)
    metrics = credit_diagnostics(
        ones, roles, mask, scores=ones, log_probs=excluded, repeated_log_probs=excluded.clone()
    )
    assert metrics["noise/perception/rms"] == 0


def test_errors_name_the_argument():
    ones, roles = torch.ones(1, 2), torch.tensor([[1, 2]])
    args = (ones, roles, ones.bool())
    for score_clip in (0.0, math.nan):
        with pytest.raises(ValueError, match=f"^score_clip must be above 0, got {score_clip}"):
            credit_diagnostics(*args, scores=ones, score_clip=score_clip)
    with pytest.raises(ValueError, match="^log_probs is None; repeated_log_probs needs"):
        credit_diagnostics(*args, scores=ones, repeated_log_probs=ones)
    with pytest.raises(TypeError, match="advantages must be .*pass one value per response"):
        credit_diagnostics(*args, scores=ones, advantages=ones)
    for function in (credit_metrics, credit_diagnostics):
        with pytest.raises(TypeError, match="scores must be .*nothing is broadcast"):
            function(*args, scores=ones[:, :1])


@given(batches())
def test_interference_is_the_ratio_over_the_perception_that_weighs_more_than_one(batch):
    weights = inputs(batch)[0]
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.rand(batch.mask.shape, generator=generator).double() for _ in range(2))
    down, up = (torch.where(batch.mask, divergence, torch.nan) for divergence in (down, up))
    places = [
        (row, time)
        for row, time in batch.mask.nonzero().tolist()
        if batch.roles[row, time] == Role.PERCEPTION and weights[row, time] > 1
    ]
    expected = 0.0
    if places:
        means = [statistics.fmean(divergence[place].item() for place in places) for divergence in (down, up)]
        expected = means[0] / means[1]
    found = interference(weights, batch.roles, batch.mask, down_divergence=down, up_divergence=up)
    assert found.shape == ()
    assert found.item() == pytest.approx(expected)


def test_interference_without_an_effect_is_none_and_without_a_rival_is_infinite():
    weights, roles = torch.tensor([[2.0, 0.5]]), torch.tensor([[Role.PERCEPTION, Role.PERCEPTION]])
    none, some = torch.zeros(1, 2), torch.ones(1, 2)
    assert interference(weights, roles, roles > 0, down_divergence=none, up_divergence=none) == 0
    assert interference(weights, roles, roles > 0, down_divergence=some, up_divergence=none) == math.inf


@given(batches(), st.data())
def test_credit_metrics_equal_a_reference_with_loops(batch, data):
    rows = len(batch.mask)
    broken = data.draw(st.lists(st.sampled_from([0, 0, *BrokenReason]), min_size=rows, max_size=rows))
    args = inputs(batch)
    weights, roles, mask, scores = as_lists(*args)
    metrics = credit_metrics(*args[:3], scores=args[3], broken=torch.tensor(broken, dtype=torch.int64))
    alive = [i for i in range(rows) if any(mask[i])]

    def share(of):
        return sum(map(of, alive)) / len(alive) if alive else math.nan

    expected = {"broken/fraction": share(lambda i: broken[i] != 0)}
    for reason in BrokenReason:
        if reason:
            expected[f"broken/{reason.name.lower()}"] = share(lambda i, reason=reason: broken[i] == reason)
    real = [(i, t) for i in alive for t in range(len(mask[i])) if mask[i][t]]
    total = math.fsum(weights[i][t] for i, t in real)
    for name, role in ROLES.items():
        tokens = [(i, t) for i, t in real if roles[i][t] == role]
        values = [weights[i][t] for i, t in tokens]
        expected[f"weight/{name}/mean"] = statistics.fmean(values) if values else math.nan
        expected[f"weight/{name}/min"] = min(values, default=math.nan)
        expected[f"weight/{name}/max"] = max(values, default=math.nan)
        expected[f"weight/{name}/mass"] = math.fsum(values) / total if real else math.nan
        expected[f"score/{name}/mean"] = statistics.fmean(scores[i][t] for i, t in tokens) if tokens else math.nan
    expected["structured/fraction"] = share(lambda i: any(roles[i][t] in ROLES.values() for k, t in real if k == i))
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        close(metrics[name], value, equal_nan=True)
