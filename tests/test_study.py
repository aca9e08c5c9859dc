"""The grounding study: are its worlds, arms and statistics what they are said to be?"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Generator
from typer.testing import CliRunner

from benchmarks.grounding import study
from benchmarks.grounding.arms import (
    ARMS,
    Oracle,
    Placebo,
    RelianceAlone,
    RightAgainstWrong,
    Scored,
    interference_of,
    mean_of_spans,
    with_other_copies,
)
from benchmarks.grounding.comparison import ENOUGH_SEEDS, best_rates, compare, interval, verdict
from benchmarks.grounding.model import Rollouts, TinyVLM
from benchmarks.grounding.readings import FIRST_FILLER, PATTERNS, VALUES, Readings
from benchmarks.grounding.runs import follows
from benchmarks.grounding.study import Setting, app
from benchmarks.grounding.train import TrainConfig, plan_views, roll_out, train
from benchmarks.grounding.warm_start import WarmStartConfig, warm_start
from benchmarks.grounding.world import (
    A_OPEN,
    FIRST_COLOR,
    P_CLOSE,
    P_OPEN,
    ZERO,
    PriorClash,
    evidence,
    measure,
    reward,
    to_words,
)
from srpo_core import Role, SRPOConfig

WORLD = Readings(relevance="fixed", filler=1)
GAUGED = WORLD.gauges
BRIEF = WarmStartConfig(
    misread=0.1,
    shortcut=0.5,
    shortcut_right=0.5,
    neutral=0.0,
    evidence_weight=8.0,
    stop_at_perception=None,
    max_steps=80,
    batch_size=16,
    learning_rate=5e-3,
)
TINY = TrainConfig(steps=2, prompts=6, group_size=4, updates=1)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def writer() -> TinyVLM:
    return warm_start(WORLD, BRIEF, seed=0)


@pytest.fixture(scope="module")
def batch(writer):
    return roll_out(writer, WORLD, replace(TINY, prompts=24), seeded(1), 1)[0]


# ---------------------------------------------------------------------------------------------------------------- world


@pytest.mark.parametrize("split", Readings.splits)
def test_an_image_shows_its_gauges_and_a_question_hints_as_the_split_says(split):
    problems = replace(WORLD, pixel_noise=0.0).sample(200, split, seeded())
    gauges = problems.images.unfold(3, 2, 2).permute(0, 3, 1, 2, 4) - 0.5  # n gauge c down right
    contrast = {"blind": 0.0, "low_contrast": 0.6}.get(split, 1.0)
    expected = (0.5 + contrast * PATTERNS[problems.readings]).clamp(0, 1) - 0.5
    torch.testing.assert_close(gauges, expected)
    assert torch.equal(problems.counts, problems.readings.gather(1, problems.colors))
    assert torch.equal(problems.shortcut, problems.hints.gather(1, problems.colors).sum(1))
    right = (problems.hints == problems.readings).double().mean().item()
    assert right == pytest.approx({"aligned": 1.0, "swapped": 1 / VALUES}.get(split, 0.0), abs=0.04)


def test_which_gauges_are_asked_for():
    assert WORLD.sample(9, "train", seeded()).colors.unique(dim=0).tolist() == [[2, 6]]
    problems = Readings().sample(2000, "train", seeded())
    assert len(problems.colors.unique(dim=0)) == 8 * 7 // 2
    assert torch.equal(problems.questions[:, [1, 3]], FIRST_COLOR + problems.colors)


@pytest.mark.parametrize("others", ["read", "recited", "words"])
@pytest.mark.parametrize("relevance", ["asked", "fixed"])
def test_a_demonstration_without_errors_earns_the_reward(others, relevance):
    world = Readings(others=others, relevance=relevance)
    problems = world.sample(300, "conflict", seeded())
    responses = world.demonstrate(problems, seeded(1), misread=0.0, shortcut=0.0)
    assert responses.shape[1] == world.response_length
    assert (reward(responses, problems) == 1).all()
    assert measure(responses, problems)["grounded"] == 1.0
    said = responses[:, 2 : 2 * world.gauges + 1 : 2]
    asked = torch.zeros_like(said, dtype=torch.bool).scatter(1, problems.colors, value=True)
    others_said = said[~asked]
    if others == "words":
        assert (others_said >= FIRST_FILLER).all()
    elif others == "read":
        assert torch.equal(others_said, ZERO + problems.readings[~asked])
    else:
        off = others_said - ZERO - problems.hints[~asked]
        assert (off.abs() <= 1).all()
        assert 0.3 < (off != 0).double().mean() < 0.5  # half, less those at an end of the scale


def test_a_lazy_demonstration_follows_the_hints():
    problems = WORLD.sample(200, "conflict", seeded())
    rates = measure(WORLD.demonstrate(problems, seeded(), misread=0.0, shortcut=1.0), problems)
    assert rates["bias"] == rates["consistent"] == 1.0
    assert rates["count"] == 0.0


@pytest.mark.parametrize("world", [WORLD, Readings(), PriorClash()], ids=["fixed", "asked", "clash"])
def test_evidence_is_what_was_asked_for_and_all_numbers_after_it(world):
    problems = world.sample(20, "train", seeded())
    responses = world.demonstrate(problems, seeded(), misread=0.0, shortcut=0.0)
    for row, found in enumerate(evidence(responses, problems)):
        words, asked = to_words(responses[row], world.vocabulary), problems.colors[row].tolist()
        labels = [world.vocabulary[FIRST_COLOR + label] for label in asked]
        close = words.index("</perception>")
        expected = [
            word.isdigit() and (place > close or words[place - 1] in labels) for place, word in enumerate(words)
        ]
        assert found.tolist() == expected


class Scribe:
    """Perceives zeros, then adds up whatever its prompt says it perceived; or answers 0."""

    device = torch.device("cpu")

    def __init__(self, adds: bool):
        self.adds = adds

    def generate(self, images, questions, *, max_tokens):
        said = torch.full((len(questions), GAUGED), 0)
        written = questions.shape[1] > GAUGED + 10  # a perception stands in the prompt
        if written:
            said = questions[:, -2 * GAUGED : -1 : 2] - ZERO
        counts = said[:, [2, 6]] if self.adds else 0 * said[:, [2, 6]]
        problems = WORLD.sample(len(questions), "aligned", seeded())
        readings = said.clone().index_copy(1, torch.tensor([2, 6]), counts)
        problems = replace(problems, readings=readings, counts=counts)
        words = WORLD.demonstrate(problems, seeded(), misread=0.0, shortcut=0.0)
        token_ids = words[:, 2 * GAUGED + 2 :] if written else words
        return Rollouts(token_ids, token_ids > 0, torch.zeros(token_ids.shape))


@pytest.mark.parametrize(("adds", "share"), [(True, 1.0), (False, 0.0)])
def test_the_probe_tells_answers_that_follow_the_perception(adds, share):
    # Overwritten counts sum to 0 in no case: each differs from the zero that was perceived.
    assert follows(Scribe(adds), WORLD, n=50, seed=0) == share


# ----------------------------------------------------------------------------------------------------------------- arms


def parameters_after(start: TinyVLM, method) -> list[torch.Tensor]:
    model = TinyVLM(patch=WORLD.patch, cells=WORLD.cells, vocabulary=len(WORLD.vocabulary))
    model.load_state_dict(start.state_dict())
    train(model, WORLD, method, TINY, seed=0)
    return [parameter.detach() for parameter in model.parameters()]


@pytest.fixture(scope="module")
def after_grpo(writer):
    return parameters_after(writer, ARMS["grpo"])


def test_no_strength_is_grpo_bit_for_bit(writer, after_grpo):
    found = parameters_after(writer, ARMS["strength 0"])
    assert all(torch.equal(a, b) for a, b in zip(found, after_grpo, strict=True))


@pytest.mark.parametrize("name", [name for name in ARMS if name not in ("grpo", "strength 0")])
def test_every_other_arm_trains_and_is_not_grpo(writer, after_grpo, name):
    found = parameters_after(writer, ARMS[name])
    assert all(parameter.isfinite().all() for parameter in found)
    assert any(not torch.equal(a, b) for a, b in zip(found, after_grpo, strict=True))


def test_scores_of_a_span_are_shared():
    scores = torch.tensor([[1.0, 3.0, 5.0, 7.0], [2.0, 4.0, 6.0, 8.0]])
    spans = torch.tensor([[0, 0, -1, 1], [-1, -1, -1, -1]])
    expected = torch.tensor([[2.0, 2.0, 5.0, 7.0], [2.0, 4.0, 6.0, 8.0]])
    torch.testing.assert_close(mean_of_spans(scores, spans), expected)


def test_what_follows_a_copy_is_scored_after_another_copy(writer, batch):
    chosen, log_probs = with_other_copies(writer, batch)
    donors = plan_views(batch, SRPOConfig()).counterfactual.donors.tolist()
    checked = 0
    for row, donor in enumerate(donors):
        words, other = (batch.token_ids[place].tolist() for place in (row, donor))
        places, theirs = (
            [place for place, word in enumerate(line) if ZERO <= word < ZERO + 10] for line in (words, other)
        )
        if donor < 0 or len(places) != GAUGED + 4 or len(theirs) != GAUGED + 4:
            continue
        # The readings and both copies are the donor's; the sum and the answer are scored, and are still the row's own.
        for mine, its in zip(places[: GAUGED + 2], theirs, strict=False):
            words[mine] = other[its]
        assert chosen[row].nonzero()[:, 0].tolist() == places[GAUGED + 2 :]
        problems = batch.problems.rows(torch.tensor([row]))
        logits = writer(problems.images, problems.questions, torch.tensor([words])).log_softmax(-1)
        for place in places[GAUGED + 2 :]:
            torch.testing.assert_close(log_probs[row, place], logits[0, place, batch.token_ids[row, place]])
        checked += 1
    assert checked > 5


def test_right_against_wrong_lifts_what_only_right_responses_say(batch):
    ids = torch.tensor([[P_OPEN, ZERO + 3, ZERO + 1, P_CLOSE]] * 2 + [[P_OPEN, ZERO + 2, ZERO + 1, P_CLOSE]] * 2)
    roles = torch.tensor([[0, 1, 1, 0]] * 4)
    segmentation = batch.segmentation._replace(roles=roles)
    made_up = batch._replace(
        token_ids=ids, mask=torch.ones(4, 4).bool(), segmentation=segmentation, group_ids=torch.zeros(4).long(),
        advantages=torch.tensor([1.0, 1.0, -1.0, -1.0]),
    )  # fmt: skip
    weights = RightAgainstWrong().weights(None, made_up)
    # All of the gap is at the first reading: 2 against a mean of 1, and 1/8 for the other; then mean one.
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2 / 1.0625, 0.125 / 1.0625, 1.0]] * 4))


def test_an_answer_apart_weighs_one(writer, batch):
    weights = Scored(answer=False).weights(writer, batch)
    after = (batch.token_ids == A_OPEN).cumsum(1) > 0
    assert (weights[after & batch.mask] == 1).all()
    assert not (Scored().weights(writer, batch)[after & batch.mask] == 1).all()


def test_a_placebo_has_the_same_weights_elsewhere(writer, batch):
    of = RelianceAlone()
    weights, shuffled = of.weights(writer, batch), Placebo(of).weights(writer, batch)
    assert not torch.equal(weights, shuffled)
    assert torch.equal(weights.sort(1).values, shuffled.sort(1).values)
    unscored = batch.segmentation.roles == int(Role.OTHER)
    assert torch.equal(weights[unscored], shuffled[unscored])


@pytest.mark.parametrize(
    ("arm", "roles"),
    [
        (RelianceAlone(), [Role.PERCEPTION]),
        (RelianceAlone(spans=True), [Role.PERCEPTION]),
        (Oracle(perception_only=True), [Role.PERCEPTION]),
        (Oracle(), [Role.PERCEPTION, Role.REASONING]),
        (Scored(), [Role.PERCEPTION, Role.REASONING]),
    ],
)
def test_weights_have_mean_one_where_they_move_and_are_one_elsewhere(writer, batch, arm, roles):
    weights = arm.weights(writer, batch)
    moved = batch.mask & torch.isin(batch.segmentation.roles, torch.tensor([int(role) for role in roles]))
    mean = (weights * moved).sum(1) / moved.sum(1)
    torch.testing.assert_close(mean[moved.any(1)], torch.ones(int(moved.any(1).sum())))
    assert (weights[batch.mask & ~moved] == 1).all()
    assert (weights[~batch.mask] == 0).all()


def test_the_oracle_lifts_the_evidence(writer, batch):
    weights, carrying = Oracle().weights(writer, batch), evidence(batch.token_ids, batch.problems)
    assert weights[carrying].min() > weights[batch.mask & (batch.segmentation.roles > 0) & ~carrying].max()


def test_readings_interfere_and_stray_words_do_not():
    felt = {}
    for others in ("read", "words"):
        world = replace(WORLD, others=others)
        model = warm_start(world, replace(BRIEF, max_steps=80), seed=0)
        batch, _ = roll_out(model, world, replace(TINY, prompts=64), seeded(1), 1)
        felt[others] = interference_of(model, batch, Oracle().weights(model, batch))
    assert felt["read"] > 3 * felt["words"]


# ----------------------------------------------------------------------------------------------------------- statistics


def told(arm: str, rate: float, seed: int, grounded: float, aligned: float = 0.9) -> dict:
    return {
        "world": "read", "arm": arm, "learning_rate": rate, "seed": seed, "grounded": grounded,
        "conflict": 1 - grounded, "reward": grounded / 2, "mixture": 0.5, "aligned": aligned, "follows": 0.8,
        "steps": [0, 10], "curve": [0.1, grounded], "steps_to_threshold": 100, "step_seconds": 0.1,
        "weights": {"asked": 1.0}, "interference": 1.0,
    }  # fmt: skip


def test_each_arm_is_compared_at_its_own_best_rate_seed_by_seed():
    runs = [told("grpo", 1.0, seed, 0.5 + seed / 10) for seed in range(3)]
    runs += [told("grpo", 2.0, seed, 0.1) for seed in range(3)]
    runs += [told("use", 1.0, seed, 0.2) for seed in range(3)]
    runs += [told("use", 2.0, seed, 0.6 + seed / 10) for seed in range(3)]
    assert best_rates(runs) == {("read", "grpo"): 1.0, ("read", "use"): 2.0}
    grpo, use = compare(runs)
    assert (grpo["learning_rate"], use["learning_rate"]) == (1.0, 2.0)
    # All pairs differ alike, so no resampling can tell another mean.
    assert use["against grpo"]["grounded"] == pytest.approx((0.1, 0.1, 0.1))
    assert "against grpo" not in grpo
    assert "against placebo" not in use


@pytest.mark.parametrize(
    ("use", "placebo", "aligned", "expected"),
    [
        (0.6, 0.5, 0.9, "gain"),
        (0.6, 0.6, 0.9, "no gain (placebo)"),
        (0.6, 0.5, 0.88, "no gain (guard)"),
        (0.5, 0.4, 0.9, "no gain"),
        (0.4, 0.3, 0.9, "worse than GRPO"),
        (0.6, None, 0.9, "above GRPO; no placebo"),
    ],
)
def test_a_gain_needs_grpo_and_the_placebo_beaten_and_the_guard_held(use, placebo, aligned, expected):
    runs = [told("grpo", 1.0, seed, 0.5) for seed in range(ENOUGH_SEEDS)]
    runs += [told("use", 1.0, seed, use, aligned) for seed in range(ENOUGH_SEEDS)]
    if placebo is not None:
        runs += [told("placebo of use", 1.0, seed, placebo) for seed in range(ENOUGH_SEEDS)]
    rows = {row["arm"]: row for row in compare(runs)}
    assert verdict(rows["use"]) == expected
    assert verdict(rows["grpo"]) == ""


def test_nothing_is_claimed_from_few_seeds():
    runs = [told(arm, 1.0, seed, grounded) for arm, grounded in (("grpo", 0.5), ("use", 0.6)) for seed in range(3)]
    assert verdict(compare(runs)[1]) == "explored only"


def test_an_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(1).normal(0.3, 1.0, (200, 16))
    covered = [low <= 0.3 <= high for low, high in (interval(row, draws=500) for row in draws)]
    assert 0.87 <= np.mean(covered) <= 0.99  # a percentile bootstrap of 16 is a little narrow


def test_the_command_finds_its_runs_again(monkeypatch, tmp_path):
    setting = Setting(WORLD, replace(BRIEF, max_steps=20), replace(TINY, steps=4))
    monkeypatch.setitem(study.WORLDS, "read", setting)
    monkeypatch.setattr(study, "EVALUATION", 32)
    arguments = ["explore", "--worlds", "read", "--arms", "grpo; use", "--rates", "0.001", "--seeds", "2"]
    arguments += ["--workers", "1", "--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    results = []
    for _ in range(2):
        shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert shown.exit_code == 0
        results.append(json.loads((tmp_path / "exploration.json").read_text()))
    assert results[0] == results[1]  # CPU seconds included: nothing ran twice
    arguments[arguments.index("grpo; use")] = "oracle"
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    added = json.loads((tmp_path / "exploration.json").read_text())["runs"]
    assert [run for run in added if run["arm"] != "oracle"] == results[0]["runs"]
    assert len(added) == len(results[0]["runs"]) + 2
    assert {(run["arm"], run["seed"]) for run in results[0]["runs"]} == {
        (a, s) for a in ("grpo", "use") for s in (0, 1)
    }
    assert "| use |" in (tmp_path / "exploration.md").read_text()


def test_unknown_names_are_refused():
    shown = CliRunner().invoke(app, ["explore", "--arms", "grpo; nonsense"])
    assert shown.exit_code != 0
    assert "nonsense" in shown.output
