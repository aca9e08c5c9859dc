"""The look at each batch: settings that make SRPO do nothing end a run at its first batch, and later are warned of."""

import logging
import math

import pytest
import torch
from test_batch import ADVANTAGES, OPTIONS, RESPONSES, TAGS, Characters, credited, plan_of, responses, tokens_of

from srpo_core import Role, RolloutBatch, SRPOConfig
from srpo_core.watch import FEW, RunWatch, batch_in_words

ASKING = ["Answer as <p>...</p><t>...</t>.\nWhat is this?"]
PLAIN = ["What is this?"]
BROKEN = ["it is a cat\x01", "so <t>broken\x01", "<p>a cat\x01", "<p>a</p></t>\x01"]


@pytest.fixture(autouse=True)
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="srpo_core")
    return caplog


def watch(options=OPTIONS, **more):
    return RunWatch(options, Characters(), **more)


def test_a_first_batch_with_roles_passes_in_silence(warnings):
    watch().look(responses(), prompts=PLAIN, image_counts=torch.tensor([[1, 0]] * 4))
    watch().look(responses([*BROKEN[:3], RESPONSES[0]]), prompts=PLAIN)  # a quarter is well-formed
    assert not warnings.records


def test_a_first_batch_without_roles_is_an_error_where_nobody_asks_for_tags(warnings):
    message = (
        "no response of the first batch has the structure <p>...</p><t>...</t> "
        r"\(2 unclosed, 1 no_perception, 1 stray_close\), and the prompts do not ask for it: put "
        r"srpo_core.system_prompt\(tags\) in a system message.* set srpo_perception_tags, srpo_reasoning_tags, "
        "srpo_answer_tags, or srpo_response_format, to your own"
    )
    with pytest.raises(ValueError, match=message):
        watch(named="srpo_{}").look(responses(BROKEN), prompts=PLAIN)
    assert not warnings.records


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"mix": 0.0}])
def test_plain_grpo_needs_no_roles(off, warnings):
    watched = watch(SRPOConfig(**TAGS, **off))
    for _ in range(3):
        watched.look(responses(BROKEN), prompts=PLAIN)
    assert not warnings.records


def test_few_well_formed_responses_are_warned_of_with_the_commonest_reason_and_a_response(warnings):
    watch().look(responses(BROKEN), prompts=ASKING)
    (record,) = warnings.records
    assert record.getMessage() == (
        "SRPO: 0 of 4 responses have the structure <p>...</p><t>...</t>, so the others are trained with weight 1; most "
        "often the fault is unclosed (2), as in 'so <t>broken\\x01'"
    )


def test_a_model_that_falls_out_of_the_format_later_is_warned_of_ever_more_rarely(warnings):
    watched = watch()
    watched.look(responses(), prompts=PLAIN)
    seen = []
    for _ in range(20):
        warnings.clear()
        watched.look(responses(BROKEN), prompts=PLAIN)  # an error only in a first batch
        seen.append(len(warnings.records))
    assert [number for number, warned in enumerate(seen, start=1) if warned] == [1, 2, 4, 8, 16]
    watched.look(responses(), prompts=PLAIN)
    warnings.clear()
    watched.look(responses(BROKEN), prompts=PLAIN)  # it had recovered: at once again
    assert len(warnings.records) == 1


def test_the_share_that_is_warned_of(warnings):
    assert FEW == 0.25
    for well_formed, warned in ((0, 1), (1, 1), (2, 0)):
        warnings.clear()
        texts = [RESPONSES[0]] * well_formed + [BROKEN[1]] * (8 - well_formed)
        watch().look(responses(texts, group_ids=range(8)), prompts=ASKING)
        assert len(warnings.records) == warned, well_formed


def test_a_long_response_is_cut_and_another_process_is_silent(warnings):
    texts = ["no tags " * 100] * 2
    watch().look(responses(texts, group_ids=(0, 0)), prompts=ASKING)
    assert warnings.records[0].getMessage().endswith("no tags no t...'")
    assert len(warnings.records[0].getMessage()) < 550
    warnings.clear()
    watch(warns=False).look(responses(texts, group_ids=(0, 0)), prompts=ASKING)
    assert not warnings.records


@pytest.mark.parametrize(("tag", "kind"), [("<p>", "perception"), ("<t>", "reasoning")])
def test_a_prompt_that_ends_inside_a_block_has_to_be_told(tag, kind):
    prompts = [*ASKING, f"What?\nassistant: {tag}\n"]
    with pytest.raises(
        ValueError, match=f"a prompt ends in '{tag}'.* inside the {kind} .*: pass the prompts as prompt"
    ):
        watch().look(responses(), prompts=prompts)
    texts = [text.removeprefix("<p>") for text in RESPONSES]
    ids, mask = tokens_of(texts)
    told = RolloutBatch.of(
        ids, mask, Characters(), OPTIONS, group_ids=torch.arange(4), prompt_ends=["What?\nassistant: <p>\n"] * 4
    )
    watch().look(told, prompts=["What?\nassistant: <p>\n"])


def test_a_corruption_that_changed_nothing_is_refused():
    counts = torch.tensor([[1, 1], [2, 2], [0, 0], [1, 1]])
    with pytest.raises(
        ValueError, match="^--corruption='patch_mask' left all 4 images of the first batch as they were"
    ):
        watch(named="--{}").look(responses(), prompts=ASKING, image_counts=counts)
    for fine in (counts - torch.tensor([0, 1]) * (counts > 0), torch.zeros(4, 2).long()):
        watch().look(responses(), prompts=ASKING, image_counts=fine)


def test_a_first_batch_without_any_image_is_warned_of(warnings):
    watch().look(responses(), prompts=ASKING, image_counts=torch.zeros(4, 2).long())
    assert "no prompt of the first batch has an image" in warnings.records[0].getMessage()


def test_an_empty_batch_is_nothing_to_warn_of(warnings):
    ids = torch.zeros(0, 3, dtype=torch.int64)
    empty = RolloutBatch.of(ids, ids > 0, Characters(), OPTIONS, group_ids=torch.zeros(0, dtype=torch.int64))
    watch().look(empty, prompts=[])
    assert not warnings.records


# In words


def means_by_a_loop(batch, made, role):
    """Of a role: its tokens, the sum of their weights and of their scores; and the tokens and weights of all."""
    tokens = weight = score = total = total_weight = 0
    for row, column in batch.mask.nonzero().tolist():
        total += 1
        total_weight += made.weights[row, column].item()
        if batch.segmentation.roles[row, column] == role:
            tokens += 1
            weight += made.weights[row, column].item()
            score += made.scores[row, column].item()
    return score / tokens, tokens / total, weight / total_weight


def test_batch_in_words_says_what_a_loop_counts():
    batch = responses()
    made = credited(batch, plan_of(batch), correct=torch.tensor([1, 0, 1, -1]))
    score, tokens, weight = means_by_a_loop(batch, made, Role.PERCEPTION)
    reasoning = means_by_a_loop(batch, made, Role.REASONING)[0]
    assert round(100 * tokens) != round(100 * weight)
    line = batch_in_words(batch, made, advantages=ADVANTAGES, step=12)
    assert line == (
        "step 12: 3 of 4 responses are well-formed (1 unclosed); a perception token depends on the image by "
        f"{score:.2f} nats and a reasoning token on the perception by {reasoning:.2f} nats; perception has "
        f"{round(100 * tokens)} % of the tokens and {round(100 * weight)} % of the weight; "
        "67 % of the answers are right"
    )


@pytest.mark.parametrize(
    ("advantages", "end"),
    [
        ([1.0, -1.0, 0.0, 0.0], "; 1 of 2 groups teaches nothing"),
        ([0.0, 0.0, 0.0, 0.0], "; 2 of 2 groups teach nothing"),
        ([0.0, 1.0, 0.0, -1.0], " % of the weight"),  # one response with an advantage is enough
    ],
)
def test_batch_in_words_counts_the_groups_without_an_advantage(advantages, end):
    batch, advantages = responses(), torch.tensor(advantages, dtype=torch.float64)
    made = credited(batch, plan_of(batch), advantages=advantages)
    line = batch_in_words(batch, made, advantages=advantages)
    assert line.endswith(end)
    assert ("teach" in line) == ("teach" in end)


def test_batch_in_words_names_the_faults_by_their_number_and_counts_only_what_is_trained():
    batch = responses(BROKEN)
    made = credited(batch, plan_of(batch))
    line = batch_in_words(batch, made, advantages=ADVANTAGES)
    assert line.startswith("0 of 4 responses are well-formed (2 unclosed, 1 no_perception, 1 stray_close); perception")
    masked = batch._replace(mask=batch.mask & torch.tensor([[True], [False], [False], [False]]))
    made = credited(masked, plan_of(batch))
    line = batch_in_words(masked, made, advantages=0 * ADVANTAGES)
    assert line.startswith("0 of 1 response is well-formed (1 no_perception); ")
    assert line.endswith("1 of 1 group teaches nothing")


def test_batch_in_words_leaves_out_what_is_not_known():
    batch = responses()
    made = credited(batch, plan_of(batch, has_images=False))
    line = batch_in_words(batch, made, advantages=ADVANTAGES)
    assert "image" not in line
    assert "; a reasoning token depends on the perception by " in line
    assert "right" not in line
    bare = made._replace(metrics={}, counterfactual_log_probs=None)
    assert batch_in_words(batch, bare, advantages=ADVANTAGES) == "3 of 4 responses are well-formed (1 unclosed)"
    empty = batch._replace(mask=batch.mask & False)
    made = credited(empty, plan_of(batch))
    assert batch_in_words(empty, made, advantages=ADVANTAGES, step=0) == "step 0: no response has a token to train on"


def gap_of(gap, score):
    return {"engine/gap/mean": torch.tensor(gap), "engine/score/mean": torch.tensor(score)}


def test_a_gap_above_the_scores_is_warned_of_once(warnings):
    own = watch()
    assert not own.look_at_engine(gap_of(0.1, 0.3))
    assert not own.look_at_engine(gap_of(math.nan, 0.3))
    assert not own.look_at_engine(gap_of(0.1, math.nan))
    assert not own.look_at_engine({})
    assert not warnings.records
    assert own.look_at_engine(gap_of(0.3, 0.1))
    assert own.look_at_engine(gap_of(0.4, 0.1))
    (record,) = warnings.records
    assert record.getMessage().startswith(
        "SRPO: the inference engine's log-probs differ from the trainer's own by 0.30 nats a token on average, and the "
        "scores are 0.10 nats on average: take every log-prob"
    )
    warnings.clear()
    assert watch(warns=False).look_at_engine(gap_of(0.3, 0.1))
    assert not warnings.records
