"""What the report says in words: every sentence in every branch, with figures that are reckoned by hand."""

import json
import math

import pytest
from rollout_files import write_rollouts

from srpo_core.report.escapes import escaped
from srpo_core.report.figures import figures, silent_share
from srpo_core.report.images import Images
from srpo_core.report.words import answers, percent
from srpo_core.rollouts import (
    CorrectRule,
    ScoringOptions,
    parse_rollout,
    score_rollouts,
    summarize_files,
    summarize_rollouts,
)
from srpo_core.rollouts.dependence import ALMOST_NOTHING, dependence


def summary_of(*lines, options=None):
    rollouts = [parse_rollout(json.dumps(line)) for line in lines]
    return summarize_rollouts(score_rollouts(rollouts, options), options)


def line(roles="PPRRO", *, seen=None, followed=None, repeated=None, **fields):
    """A response of one letter a role, whose tokens lose these nats in their second views."""
    given = {"tokens": list(roles), "roles": roles, "broken": "none"} | fields
    if seen is not None or followed is not None or repeated is not None:
        given["old_log_probs"] = [-8.0] * len(roles)
    for name, losses in (("corrupted", seen), ("counterfactual", followed), ("repeated", repeated)):
        if losses is not None:
            given[f"{name}_log_probs"] = [-8.0 - loss for loss in losses]
    return given


def sentence(number, *lines, options=None):
    return answers(summary_of(*lines, options=options))[number].sentence


def test_answers_of_nothing():
    assert answers(summary_of()) == []


@pytest.mark.parametrize(
    ("lines", "expected", "measured"),
    [
        # 2 of 5 tokens carry 3 of 5, 1 of 5 and 2 of 5.
        (
            [line(weights=[2, 1, 0.5, 0.5, 1])],
            "Perception tokens are 40.0 % of the tokens and carry 60.0 % of the weight: credit moved to perception.",
            True,
        ),
        (
            [line(weights=[0.5, 0.5, 1.5, 1.5, 1])],
            "Perception tokens are 40.0 % of the tokens and carry 20.0 % of the weight: credit moved away from "
            "perception.",
            True,
        ),
        (
            [line(weights=[1.5, 0.5, 1.75, 0.25, 1])],
            "Perception tokens are 40.0 % of the tokens and carry 40.0 % of the weight, so little credit moved to or "
            "from perception as a whole. Single tokens have weights from 0.25 to 1.75.",
            True,
        ),
        ([line(weights=[1] * 5)], "Every token has weight 1, as in GRPO: no credit was moved.", True),
        (
            [line("OOO", weights=[1] * 3)],
            "No token is part of a perception or of a reasoning, so every token has weight 1, as in GRPO.",
            True,
        ),
        ([line()], "This is not known, because no line has weights, scores, or log-probs of a second view.", False),
        ([{"text": "a"}], "This is not known, because no line has tokens.", False),
    ],
)
def test_where_the_credit_went(lines, expected, measured):
    answer = answers(summary_of(*lines))[0]
    assert (answer.question, answer.sentence, answer.measured) == ("Where did the credit go?", expected, measured)


def test_dependence_of_a_model_that_looks_at_the_image():
    # Losses 2, 0, 2.08, 0: a mean of 1.02. Each sum is 0.04 from twice the mean: error sqrt(2 * 2 * 0.04^2) / 4.
    both = [line(seen=[2, 0, 9, 9, 9]), line(seen=[2.08, 0, 9, 9, 9])]
    found = dependence(summary_of(*both), "perception")
    assert found.mean == pytest.approx(1.02, abs=1e-5)
    assert found.error == pytest.approx(0.02, abs=1e-5)
    assert (found.unmoved, found.threshold, found.is_noise, found.responses) == (0.5, ALMOST_NOTHING, False, 2)
    answer = answers(summary_of(*both))[1]
    assert answer.measured
    assert answer.sentence == (
        "The perceptions depend on the image: when the image is corrupted, a perception token loses 1.02 nats on "
        "average (standard error 0.02), over 2 responses; 50.0 % of these tokens change by less than 0.05 nats."
    )


def test_a_model_that_does_not_look_at_the_image():
    blind = [line(seen=[0.01, -0.02, 5, 5, 5]), line(seen=[0.0, 0.02, 5, 5, 5])]
    assert sentence(1, *blind) == (
        "The perceptions hardly depend on the image: when the image is corrupted, a perception token loses less than "
        "0.01 nats on average (standard error 0.01), over 2 responses; 100.0 % of these tokens change by less than "
        "0.05 nats."
    )


def test_no_verdict_where_the_figures_leave_doubt():
    """One response has no error, a large error decides nothing, and a gain is no loss."""
    assert sentence(1, line(seen=[2, 0, 0, 0, 0])) == (
        "When the image is corrupted, a perception token loses 1.00 nats on average, over 1 response; 50.0 % of these "
        "tokens change by less than 0.05 nats."
    )
    # Sums of 4 and 0 over 2 tokens each: mean 1, error sqrt(2 * (4 + 4)) / 4 = 1.
    assert sentence(1, line(seen=[2, 2, 0, 0, 0]), line(seen=[0, 0, 0, 0, 0])) == (
        "When the image is corrupted, a perception token loses 1.00 nats on average (standard error 1.00), over 2 "
        "responses; 50.0 % of these tokens change by less than 0.05 nats."
    )
    assert sentence(1, line(seen=[-2, -1, 0, 0, 0])) == (
        "When the image is corrupted, a perception token gains 1.50 nats on average, over 1 response; 0.0 % of these "
        "tokens change by less than 0.05 nats."
    )


def test_the_threshold_is_the_noise_where_it_is_larger():
    noisy = line(seen=[0.3, 0.1, 0, 0, 0], repeated=[0.1, -0.1, 0, 0, 0])
    found = dependence(summary_of(noisy), "perception")
    assert (found.threshold, found.is_noise) == (pytest.approx(0.2, rel=1e-4), True)
    assert found.unmoved == 0.5
    assert sentence(1, noisy).endswith(
        "50.0 % of these tokens change by less than 0.20 nats, which is twice the noise of two equal passes."
    )
    quiet = dependence(summary_of(line(seen=[0.3, 0.1, 0, 0, 0], repeated=[0] * 5)), "perception")
    assert (quiet.threshold, quiet.is_noise) == (ALMOST_NOTHING, False)


def test_each_token_counts_with_at_most_the_clip():
    barred = line(seen=[0, 0, 0, 0, 0])
    barred["corrupted_log_probs"][0] = None  # minus infinity
    assert dependence(summary_of(barred), "perception").mean == 2.5


def test_reasoning_that_follows_its_perception():
    both = [line(followed=[0, 0, 3, 1, 9], swapped=True), line(followed=[0, 0, 3, 1, 9], swapped=True)]
    told = answers(summary_of(*both))
    assert told[2].question == "Does the reasoning follow the perception?"
    assert told[2].sentence == (
        "The reasoning follows its perception: when the perception is replaced, a reasoning token loses 2.00 nats on "
        "average (standard error 0.00), over 2 responses; 0.0 % of these tokens change by less than 0.05 nats."
    )
    assert told[1].sentence == (
        "This is not measured: old_log_probs or corrupted_log_probs are missing. Score them with `srpo score "
        "rollouts.jsonl --model PATH`, or record them in training."
    )
    flat = [line(followed=[0] * 5), line(followed=[0] * 5)]
    assert sentence(2, *flat).startswith("The reasoning hardly depends on its perception: when the perception is ")


def test_responses_whose_perception_was_not_replaced_are_left_out():
    lines = [line(seen=[0] * 5, followed=[0, 0, 3, 1, 9], swapped=True), line(followed=[0] * 5, swapped=False)]
    found = dependence(summary_of(*lines), "reasoning")
    assert (found.mean, found.responses) == (2.0, 1)
    lonely = line(seen=[0] * 5, followed=[0] * 5, swapped=False)
    assert dependence(summary_of(lonely), "reasoning") is None
    assert sentence(2, lonely) == (
        "This is not measured: for no response was another perception found. Sample more responses to each prompt."
    )


def test_what_was_not_measured_is_named_with_its_remedy(tmp_path):
    question, told, measured = answers(summary_of(line()))[1]
    assert question == "Does the model look at the image, and does the reasoning follow the perception?"
    assert not measured
    remedy = "Score them with `srpo score rollouts.jsonl --model PATH`, or record them in training."
    assert told == f"This is not measured: corrupted_log_probs and counterfactual_log_probs are missing. {remedy}"
    assert sentence(1, line("PPO")) == f"This is not measured: log-probs of the second views are missing. {remedy}"
    assert sentence(1, {"text": "a"}) == f"This is not measured: the lines hold texts without tokens. {remedy}"
    assert sentence(1, line("OO")) == (
        "This is not measured: no token is part of a perception or of a reasoning with the tags that were searched for."
    )
    assert sentence(2, line("PPO", seen=[0, 0, 0])) == (
        "This is not measured: no token is part of a reasoning with the tags that were searched for."
    )
    scores_too = line(followed=[0] * 5, scores=[0.5, 1.5, 0, 0, 0])
    assert sentence(1, scores_too).endswith(
        "The recorded scores of perception tokens are +1.00 nats on average; their kind is not recorded."
    )
    (tmp_path / "my file.jsonl").write_text(json.dumps(line()))
    assert "`srpo score 'my file.jsonl' --model PATH`" in answers(summarize_files([tmp_path / "my file.jsonl"]))[1][1]


@pytest.mark.parametrize(
    ("lines", "options", "expected", "measured"),
    [
        (
            [line(correct=True, correct_by="acc > 0"), line(correct=False, correct_by="acc > 0")],
            None,
            "50.0 % of the answers are right, by this rule: acc > 0.",
            True,
        ),
        (
            [line(correct=True, correct_by="acc > 0"), line()],
            None,
            "100.0 % of the 1 judged answers are right, by this rule: acc > 0.",
            True,
        ),
        (
            [line()],
            None,
            "This is not recorded. Name a reward function with the option `correct` of the trainer, or record rewards.",
            False,
        ),
        (
            [line(reward=0.3)],
            None,
            "This is not known, because the rewards are not only 0 and 1: pass --right '>=1', a threshold on the "
            "reward, or name the reward function that decides with the option `correct` of the trainer.",
            False,
        ),
        (
            [line(reward=0.3), line(reward=1.1)],
            ScoringOptions(right=CorrectRule.read(">=1")),
            "50.0 % of the answers are right, by this rule: reward >= 1 (--right).",
            True,
        ),
        (
            [line(reward=0.3, correct_by="acc > 0")],
            None,
            "This is not known: a rule is recorded, but no verdict.",
            False,
        ),
    ],
)
def test_whether_the_answers_are_right(lines, options, expected, measured):
    answer = answers(summary_of(*lines, options=options))[-1]
    assert (answer.question, answer.sentence, answer.measured) == ("Are the answers right?", expected, measured)


def test_answers_of_files_are_those_of_their_parts_together(tmp_path):
    """Sums over files cut anywhere: the mean by a loop over all tokens."""
    path = write_rollouts(tmp_path / "r.jsonl")
    losses = []
    summary = summarize_files([path])
    for text in path.read_text(encoding="utf-8").split("\n"):
        if text:
            (row,) = score_rollouts([parse_rollout(text)])
            if row.rollout.corrupted_log_probs is not None:
                losses += [
                    min(5.0, max(-5.0, float(old) - float(new)))
                    for old, new, role in zip(
                        row.rollout.old_log_probs, row.rollout.corrupted_log_probs, row.roles, strict=True
                    )
                    if role == 1
                ]
    found = dependence(summary, "perception")
    assert found.mean == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.unmoved == sum(abs(loss) < 0.05 for loss in losses) / len(losses)
    (grammar,) = summary.formats
    assert grammar.split("\n")[0] == "perception = <perception> ... </perception>"
    assert summary.formats[grammar] == len(summary)


def shown(summary):
    return {figure.label: figure for figure in figures(summary)}


def test_figures_are_marked_beyond_their_thresholds():
    good = shown(summary_of(*[line(seen=[1, 0, 0, 0, 0], followed=[0] * 5, advantage=1)] * 10))
    assert not any(figure.warning for figure in good.values())
    assert good["Well-formed"].value == "100.0 %"
    broken = [line(broken="unclosed")] * 2
    assert shown(summary_of(*[line()] * 8, *broken))["Well-formed"].warning == "See the reasons under Format."
    assert shown(summary_of(*[line()] * 18, *broken))["Well-formed"].warning == ""  # 90 %, not below
    clipped = shown(summary_of(line(seen=[7, 0, 0, 0, 0])))["Scores clipped"]
    assert (clipped.value, clipped.warning) == ("50.0 %", "Raise score_clip.")
    # (4 + 0 + 0 + 0)^2 / (4 * 16) = 1/4.
    few = shown(summary_of(line(weights=[4, 0, 0, 0, 1])))["Effective tokens"]
    assert (few.value, few.warning) == ("25.0 %", "A few tokens carry most of the weight: lower strength.")
    silent = summary_of(*[line(advantage=0)] * 2, line(advantage=1), line())
    assert silent_share(silent) == pytest.approx(2 / 3)
    assert shown(silent)["Advantage of 0"].warning == "Most groups teach nothing: choose other prompts."
    lonely = shown(summary_of(line(swapped=False)))["Perceptions replaced"]
    assert (lonely.value, lonely.warning) == ("0.0 %", "Sample more responses to each prompt.")


def test_what_is_not_known_is_a_dash_and_no_figure_is_without_an_explanation():
    unknown = shown(summary_of({"text": "a"}))
    assert [unknown[name].value for name in ("Right answers", "Weight on perception", "Effective tokens")] == ["-"] * 3
    assert "Interference" not in unknown
    assert silent_share(summary_of(line())) is None
    for figure in figures(
        summary_of(line(seen=[1] * 5, followed=[1] * 5, repeated=[0.1] * 5, swapped=True, advantage=1))
    ):
        assert figure.help.endswith(".")
        assert len(figure.help) > 40
        assert "nan" not in f"{figure.value}{figure.note}".lower()


def test_percent_does_not_show_a_few_as_none():
    assert [percent(value) for value in (0, 1e-5, 0.0006, 0.5, 0.99999, 1, None)] == [
        "0.0 %",
        "< 0.1 %",
        "0.1 %",
        "50.0 %",
        "> 99.9 %",
        "100.0 %",
        "-",
    ]
    assert percent(3, 0) == "-"
    assert not math.isnan(float(percent(2, 3).split()[0]))


def test_escaped_shows_what_is_hidden_and_keeps_what_is_not():
    assert escaped("a\x1b[31m\x07\x00\x9b") == "a\\x1b[31m\\x07\\x00\\x9b"
    assert escaped("\u202eevil\u202c\u2066\u200b\ufeff") == "\\u202eevil\\u202c\\u2066\\u200b\\ufeff"
    assert escaped("\U000e0041") == "\\U000e0041"
    # Letters, emoji with their joiners, and the line break are shown as they are.
    text = "é 猫 \u0645\u06cc\u200c\u062e\u0648 👩\u200d🔬\n"
    assert escaped(text) == text
    assert escaped("\n\t", keep="") == "\\x0a\\x09"


def test_missing_images_are_counted_once_each(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    images = Images([tmp_path], budget=10**6)
    assert images.missing_in_words() == ""
    for name in ("x.png", "x.png", "y.png", "a.png", "https://example.org/z.png", None):
        assert images.add(name, 0) is None
    assert images.missing_in_words() == (
        "2 of 4 images were not found: x.png, y.png (relative paths start at the folder of the rollout file); 1 was "
        "not readable as PNG, JPEG, GIF or WebP: a.png; 1 was on the network, from which the page loads nothing: "
        "https://example.org/z.png."
    )
    many = Images([tmp_path], budget=10**6)
    for number in range(12):
        many.add(f"{number}.png", 0)
    assert many.missing_in_words().startswith("12 of 12 images were not found: 0.png, 1.png, 2.png and 9 more (rel")
