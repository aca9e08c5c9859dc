"""A streamed summary says what the diagnostics say of the whole batch, however the files are cut."""

import json

import numpy as np
import pytest
import torch
from batches import batches
from hypothesis import given, settings
from rollout_files import add_malformed, write_rollouts

from srpo_core import CreditOptions, Role, RoleTags, group_advantages, segment_responses, srpo_advantages
from srpo_core.diagnostics import credit_diagnostics, interference
from srpo_core.rollouts import (
    RolloutError,
    RolloutWriter,
    ScoringOptions,
    load,
    parse_rollout,
    read_rollouts,
    score_rollouts,
    summarize_files,
    summarize_rollouts,
)
from srpo_core.rollouts import summary as summary_module
from srpo_core.weights import role_scales


def write(path, batch, *, broken, correct, donors):
    with RolloutWriter(path) as writer:
        writer.write(
            [["x"] * int(row.sum()) for row in batch.mask],
            batch.mask,
            old_log_probs=batch.old_log_probs.clamp(max=0),
            corrupted_log_probs=batch.corrupted_log_probs.clamp(max=0),
            counterfactual_log_probs=batch.counterfactual_log_probs.clamp(max=0),
            repeated_log_probs=batch.log_probs.clamp(max=0),
            roles=batch.roles,
            broken=broken,
            advantages=batch.advantages,
            correct=correct,
            donors=donors,
        )
    return path


@given(batches(max_batch=4, max_time=12))
@settings(max_examples=25)
def test_names_and_values_are_those_of_the_diagnostics(tmp_path_factory, batch):
    rows = len(batch.mask)
    broken, correct = torch.arange(rows) % 3, torch.arange(rows) % 2 == 0
    donors = torch.arange(rows) - 1
    path = write(tmp_path_factory.mktemp("r") / "r.jsonl", batch, broken=broken, correct=correct, donors=donors)
    metrics = summarize_files([path]).metrics()

    old, corrupted, replaced, repeated = (
        values.clamp(max=0)
        for values in (
            batch.old_log_probs,
            batch.corrupted_log_probs,
            batch.counterfactual_log_probs,
            batch.log_probs,
        )
    )
    credit = srpo_advantages(
        old, batch.advantages, batch.roles, batch.mask, corrupted_log_probs=corrupted, counterfactual_log_probs=replaced
    )
    expected = credit_diagnostics(
        credit.weights,
        batch.roles,
        batch.mask,
        scores=credit.scores,
        broken=broken,
        advantages=batch.advantages,
        correct=correct,
        donors=donors,
        log_probs=old,
        repeated_log_probs=repeated,
        score_clip=5.0,
    )
    expected = {name: value for name, value in expected.items() if not value.isnan()}  # of which there is nothing
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        near = {"rel": 1e-3, "abs": 3e-5}  # log-probs are rounded in the file
        if name[-3:] in ("p05", "p50", "p95"):  # and quantiles lie between two points of a grid, each exact to 0.3 %
            near = {"rel": 6e-3, "abs": 6e-3 * 5 if name.startswith("score") else 6e-3}
        if not name.startswith("noise/") or name.endswith("rms"):
            assert metrics[name] == pytest.approx(value.item(), **near), name


def test_counted_beyond_the_noise():
    line = {"tokens": list("abcd"), "roles": "PPPP", "broken": "none", "old_log_probs": [-1, -1, -1, -1]}
    line |= {"corrupted_log_probs": [-1.5, -1.01, -1, -4], "repeated_log_probs": [-1.1, -1.1, -0.9, -0.9]}
    metrics = summarize_rollouts(score_rollouts([parse_rollout(json.dumps(line))])).metrics()
    assert metrics["noise/perception/rms"] == pytest.approx(0.1)
    assert metrics["noise/perception/above"] == 0.5


def test_interference_is_that_of_all_responses_that_have_the_divergences(tmp_path, monkeypatch):
    """Equal to the diagnostic of the concatenated batch, though it is summed a line at a time."""
    g = torch.Generator().manual_seed(0)
    parts = []
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        for rows, time in ((3, 5), (2, 9), (1, 2)):
            mask = torch.arange(time) < torch.randint(1, time + 1, (rows, 1), generator=g)
            roles = torch.randint(0, 3, (rows, time), generator=g)
            weights = torch.round(2 * torch.rand(rows, time, generator=g), decimals=3)
            down, up = (scale * torch.rand(rows, time, generator=g) for scale in (1e-4, 1e-3))
            columns = [torch.where(mask, values, torch.nan) for values in (down, up, weights)]
            given = dict(zip(("down_divergence", "up_divergence", "weights"), columns, strict=True))
            tokens = [["x"] * int(row.sum()) for row in mask]
            writer.write(tokens, mask, roles=roles, **given)
            # Of responses without divergences nothing is taken.
            writer.write(tokens, mask, roles=torch.where(mask, int(Role.PERCEPTION), 0), weights=3 * mask.float())
            parts.append([torch.nn.functional.pad(values, (0, 9 - time)) for values in (*columns, roles, mask)])
    whole = [torch.cat(columns) for columns in zip(*parts, strict=True)]
    down, up, weights, roles, mask = whole
    expected = interference(weights, roles, mask, down_divergence=down, up_divergence=up).item()
    assert 0 < expected < 1
    monkeypatch.setattr(summary_module, "_CHUNK_BYTES", 1)
    summary = summarize_files([tmp_path / "r.jsonl"])
    assert summary.metrics()["interference"] == pytest.approx(expected, rel=1e-4)
    assert summary.columns["diverged"].sum() == 6
    recomputed = summarize_files([tmp_path / "r.jsonl"], ScoringOptions(recompute=True))
    assert "interference" not in recomputed.metrics()


@pytest.mark.parametrize(
    ("down", "up", "weight", "expected"), [(0, 0, 2, 0), (1, 0, 2, np.inf), (1, 2, 2, 0.5), (1, 2, 1, 0)]
)
def test_interference_where_there_is_little_of_it(down, up, weight, expected):
    line = {"tokens": ["a"], "roles": "P", "broken": "none", "weights": [weight]}
    line |= {"down_divergence": [down], "up_divergence": [up]}
    rollout = parse_rollout(json.dumps(line))
    assert summarize_rollouts(score_rollouts([rollout])).metrics()["interference"] == expected
    down, up, weights = (torch.tensor([[float(value)]]) for value in (down, up, weight))
    roles, mask = torch.tensor([[Role.PERCEPTION]]), torch.tensor([[True]])
    assert interference(weights, roles, mask, down_divergence=down, up_divergence=up).item() == expected


@pytest.mark.parametrize("chunk", [1, 700, 2**20])
def test_summarize_files_however_they_are_cut(tmp_path, monkeypatch, chunk):
    paths = [write_rollouts(tmp_path / f"{name}.jsonl", steps=steps) for name, steps in (("a", 2), ("b", 1))]
    first, second = add_malformed(paths[1])
    whole = summarize_rollouts(score_rollouts(r for path in paths for r in read_rollouts(path, on_error=lambda _: 0)))
    monkeypatch.setattr(summary_module, "_CHUNK_BYTES", chunk)
    seen = []
    summary = summarize_files(paths, progress=lambda done, total: seen.append((done, total)))
    assert summary.metrics() == pytest.approx(whole.metrics(), rel=1e-5)
    assert [(error.path, error.line) for error in summary.errors] == [(str(paths[1]), first), (str(paths[1]), second)]
    assert summary.malformed == 2
    size = sum(path.stat().st_size for path in paths)
    assert seen[0] == (0, size)
    assert seen[-1] == (size, size)
    # Every place leads back to its response, and counts lines as an editor does.
    assert [row.rollout.text for row in load(summary, range(len(summary)))] == [
        rollout.text for path in paths for rollout in read_rollouts(path, on_error=lambda _: 0)
    ]
    place = summary.places[-1]
    assert json.loads(paths[1].read_text(encoding="utf-8").split("\n")[place.line - 1])["id"]
    with pytest.raises(RolloutError, match=f"b.jsonl, line {first}: not JSON"):
        summarize_files(paths, strict=True)


def test_two_processes_say_the_same(tmp_path, monkeypatch):
    path = write_rollouts(tmp_path / "r.jsonl")
    alone = summarize_files([path])
    monkeypatch.setattr(summary_module, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(summary_module, "_CHUNK_BYTES", 4000)
    together = summarize_files([path], workers=2)
    assert together.metrics() == pytest.approx(alone.metrics(), rel=1e-6)
    assert together.places == alone.places


def test_roles_are_those_of_the_segmentation(tmp_path):
    """Read from the text where they are not recorded, with the tags of the line."""
    tags = RoleTags(("<p>", "</p>"), ("<t>", "</t>"), None)

    class Characters:
        eos_token_id = 0

        def decode(self, ids):
            return "".join(chr(token) if token else "$" for token in ids)

    responses = ["<p>me</p><t>u</t>", "<p> </p><t>u</t>", "<p>me<t>u</t>"]
    ids = torch.tensor([[*map(ord, text.ljust(18, "~"))] for text in responses])
    mask = ids != ord("~")
    ids[0, 17], mask[0, 17] = 0, True
    with RolloutWriter(tmp_path / "r.jsonl", tokenizer=Characters(), tags=tags) as writer:
        writer.write(ids, mask)
    expected = segment_responses(ids, mask, Characters(), tags=tags)
    for row, scored in enumerate(score_rollouts(read_rollouts(tmp_path / "r.jsonl"))):
        assert scored.roles.tolist() == expected.roles[row, mask[row]].tolist()
        assert scored.broken == expected.broken[row]


def test_score_rollouts_keeps_what_is_recorded_unless_asked_to_recompute():
    line = {"tokens": ["a", "b"], "roles": "PP", "broken": "none", "weights": [3, 1], "scores": [1, 9]}
    line |= {"old_log_probs": [-1, -1], "corrupted_log_probs": [-3, -1]}
    (recorded,) = score_rollouts([parse_rollout(json.dumps(line))])
    assert recorded.weights.tolist() == [3, 1]
    assert recorded.scores.tolist() == [1, 5]  # clipped as scores are
    (computed,) = score_rollouts([parse_rollout(json.dumps(line))], ScoringOptions(recompute=True))
    assert computed.scores.tolist() == [2, 0]
    assert computed.weights[0] > 1 > computed.weights[1]
    del line["old_log_probs"], line["corrupted_log_probs"]
    (from_scores,) = score_rollouts([parse_rollout(json.dumps(line))], ScoringOptions(recompute=True))
    assert from_scores.scores.tolist() == [1, 5]
    assert from_scores.weights[0] < 1 < from_scores.weights[1]


def test_summarize_rollouts_of_text_alone_and_of_nothing():
    rollouts = [parse_rollout('{"text": "<perception>a"}'), parse_rollout('{"tokens": []}')]
    summary = summarize_rollouts(score_rollouts(rollouts))
    assert "tokens/effective_fraction" not in summary.metrics()  # absent is neither 0 nor 1
    assert not summary.columns["contrast"].any()
    assert "weight/perception/mean" not in summarize_rollouts([]).metrics()


def test_the_scale_of_the_batch_is_that_of_all_files(tmp_path):
    paths = [write_rollouts(tmp_path / name, steps=1, hostile=False) for name in ("a.jsonl", "b.jsonl")]
    options = ScoringOptions(CreditOptions(scale="batch_rms", consistency_scale=2.0), recompute=True)
    used = summarize_files(paths, options).options.config
    rows = [scored for path in paths for scored in score_rollouts(read_rollouts(path))]
    time = max(len(row.scores) for row in rows)
    scores = torch.tensor(np.stack([np.pad(row.scores, (0, time - len(row.scores))) for row in rows]))
    roles = torch.tensor(np.stack([np.pad(row.roles, (0, time - len(row.roles))) for row in rows]))
    scales, _ = role_scales(scores, roles, torch.ones_like(roles, dtype=torch.bool))
    assert used.visual_scale == pytest.approx(scales.visual.item(), rel=1e-5)
    assert used.consistency_scale == pytest.approx(2 * scales.consistency.item(), rel=1e-5)


def test_advantages_come_from_the_groups_unless_recorded(tmp_path):
    summary = summarize_files([write_rollouts(tmp_path / "r.jsonl", hostile=False)])
    rewards = torch.tensor(summary.columns["reward"])
    numbers = {group: number for number, group in enumerate(dict.fromkeys(summary.groups))}
    expected = group_advantages(rewards, torch.tensor([numbers[group] for group in summary.groups]))
    known = np.array([group is not None for group in summary.groups])
    np.testing.assert_allclose(summary.advantages[known], expected[torch.tensor(known)], atol=1e-9)
    assert np.isnan(summary.advantages[~known]).all()
    assert (~known).sum() == 2
    recorded = summarize_rollouts(score_rollouts([parse_rollout('{"tokens": ["a"], "advantage": -0.5}')]))
    assert recorded.advantages.tolist() == [-0.5]


def test_a_sample_holds_each_kind_and_grows_at_its_end(tmp_path):
    summary = summarize_files([write_rollouts(tmp_path / "r.jsonl", steps=20)])
    sample = summary.sample(60, per_kind=3)
    assert len(sample) == len(set(sample.tolist())) == 60
    assert summary.sample(40, per_kind=3).tolist() == sample[:40].tolist()
    kinds = list(zip(*(summary.columns[name] for name in ("broken", "right", "perception_right")), strict=True))
    for kind in set(kinds):
        assert sum(kinds[row] == kind for row in sample.tolist()) >= min(3, kinds.count(kind))
    assert summary.sample(60, seed=1).tolist() != sample.tolist()
    assert sorted(summary.sample(10**6).tolist()) == list(range(len(summary)))


def test_options_that_a_file_cannot_serve_are_refused():
    with pytest.raises(ValueError, match="visual_score='jsd' needs more than a rollout file holds; choose 'log_ratio'"):
        ScoringOptions(CreditOptions(visual_score="jsd"))
    with pytest.raises(ValueError, match="scale='ema_rms' needs more than a rollout file holds; choose 'fixed' or"):
        ScoringOptions(CreditOptions(scale="ema_rms"))
    with pytest.raises(ValueError, match="answer_role must be one of 'reasoning', 'other', got 'perception'"):
        ScoringOptions(answer_role="perception")
    rollout = parse_rollout('{"tokens": ["a"], "roles": "P"}')
    with pytest.raises(ValueError, match="sign='advantage' needs 'advantage' in every line"):
        list(score_rollouts([rollout], ScoringOptions(CreditOptions(sign="advantage"))))
    with pytest.raises(ValueError, match="scale='batch_rms' needs all rollouts at once: use summarize_files"):
        list(score_rollouts([rollout], ScoringOptions(CreditOptions(scale="batch_rms"))))


def test_answers_count_as_the_options_say():
    rollout = parse_rollout('{"tokens": ["<perception>", "a", "</perception>", "<answer>", "b", "</answer>"]}')
    roles = {
        role: next(score_rollouts([rollout], ScoringOptions(answer_role=role))).roles for role in ("reasoning", "other")
    }
    assert roles["reasoning"].tolist() == [0, 1, 0, 0, 2, 0]
    assert roles["other"].tolist() == [0, 1, 0, 0, 0, 0]
