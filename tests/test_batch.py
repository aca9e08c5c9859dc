"""One batch, one driver: what has to be scored, the credit of the scores, the record."""

import math

import pytest
import torch
from helpers import close

from srpo_core import (
    CreditOptions,
    Role,
    RolloutBatch,
    SRPOConfig,
    counterfactual_responses,
    credit,
    plan,
    segment_responses,
    srpo_advantages,
)
from srpo_core.batch import MAIN_METRICS, ending_ids, logged, prompt_id, record
from srpo_core.diagnostics import credit_diagnostics
from srpo_core.engine_gap import ENGINE_METRICS
from srpo_core.reliance import span_counterfactuals
from srpo_core.rollouts import RolloutWriter, read_rollouts
from srpo_core.tags import BrokenReason

TAGS = {"perception_tags": ("<p>", "</p>"), "reasoning_tags": ("<t>", "</t>"), "answer_tags": None}
OPTIONS = SRPOConfig(**TAGS)
EOS, PAD = 1, 0
RESPONSES = [
    "<p>a cat</p><t>so two</t>\x01",
    "<p>three dogs</p><t>it is 3</t>\x01",
    "<p>no</p><t>none</t>\x01",
    "so <t>broken\x01",
]


class Characters:
    """A token for each character."""

    eos_token_id, pad_token_id = EOS, PAD

    def decode(self, ids):
        return "".join(map(chr, ids))


def tokens_of(texts, width=None):
    width = width or max(map(len, texts))
    ids = torch.tensor([[*map(ord, text), *[PAD] * (width - len(text))] for text in texts])
    return ids, ids != PAD


def responses(texts=RESPONSES, options=OPTIONS, group_ids=(0, 0, 1, 1)):
    return RolloutBatch.of(*tokens_of(texts), Characters(), options, group_ids=torch.tensor(group_ids))


def log_probs_of(ids, image, seed=0):
    """A policy by which each token depends on everything before it and on the image."""
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(256, generator=g, dtype=torch.float64)
    context = torch.cumsum(table[ids.clamp(min=0)], dim=1) + {"original": 0.0, "corrupted": 0.7}[image]
    return -torch.nn.functional.softplus(torch.sin(3.0 * context))


def scored_views(batch, planned):
    return {
        view.name: log_probs_of((view.responses or batch).token_ids, view.image).masked_fill(
            ~(view.responses or batch).mask, math.nan
        )
        for view in planned.views
    }


def old_log_probs_of(batch):
    return log_probs_of(batch.token_ids, "original").masked_fill(~batch.mask, math.nan)


ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)


def credited(batch, planned, options=OPTIONS, *, scored=None, **more):
    arguments = {"old_log_probs": old_log_probs_of(batch), "advantages": ADVANTAGES, "step": 0} | more
    return credit(batch, planned, scored_views(batch, planned) if scored is None else scored, options, **arguments)


def plan_of(batch, options=OPTIONS, **more):
    return plan(batch, options, **({"has_images": True, "pad_token_id": PAD} | more))


def assert_equal(actual, expected):
    """Tuples of tensors, equal bit for bit."""
    for name, one, other in zip(expected._fields, actual, expected, strict=True):
        assert torch.equal(one, other), name


# RolloutBatch, ending_ids, prompt_id


def test_rollout_batch_of_reads_the_open_block_off_the_prompts():
    texts = ["a cat</p><t>so two</t>\x01", "<p>a</p><t>b</t>\x01", "so two</t>\x01"]
    ids, mask = tokens_of(texts)
    ends = ["Look <p>...</p>\nassistant: <p>", "Look <p>...</p>\nassistant:", "assistant: <t>\n"]
    batch = RolloutBatch.of(ids, mask, Characters(), OPTIONS, group_ids=torch.arange(3), prompt_ends=ends)
    assert batch.open_at_start.tolist() == [1, 0, 2]
    letters = ["".join("OPR"[role] for role in row[:24]) for row in batch.segmentation.roles.tolist()]
    # Counted by hand; reasoning that no perception precedes has no role.
    assert letters[0] == "PPPPP" + "OOOO" + "OOO" + "RRRRRR" + "OOOO" + "O"
    assert batch.segmentation.broken.tolist() == [0, 0, int(BrokenReason.NO_PERCEPTION)]
    with pytest.raises(ValueError, match="prompt_ends must have one text per response, 3, got 1"):
        RolloutBatch.of(ids, mask, Characters(), OPTIONS, group_ids=torch.arange(3), prompt_ends=ends[:1])


def test_prompt_id_is_the_prompts_own():
    prompt, pixels = torch.tensor([5, 6, 7]), torch.rand(8, 3)
    ids = [
        prompt_id(prompt),
        prompt_id(torch.tensor([5, 6])),
        prompt_id(torch.tensor([7, 6, 5])),
        prompt_id(prompt, {"pixel_values": pixels}),
        prompt_id(prompt, {"pixel_values": pixels + 0.25}),
        prompt_id(prompt, {"pixel_values_videos": pixels}),
        prompt_id(prompt, {"pixel_values": pixels.reshape(4, 6)}),
    ]
    assert len(set(ids)) == len(ids)
    assert all(0 <= number < 2**48 for number in ids)
    # Whatever the dtype of the ids, the other inputs that are no tensors, and the place in memory.
    assert prompt_id(prompt.int(), {"name": "cat"}) == ids[0] == prompt_id(torch.tensor([0, 5, 6, 7])[1:], {})
    assert prompt_id(prompt, {"pixel_values": pixels.clone(), "note": None}) == ids[3]
    assert prompt_id(prompt, {"pixel_values": torch.rand(4, 5, dtype=torch.bfloat16)}) not in ids


def test_rollout_batch_of_segments_by_the_options():
    batch = responses()
    ids, mask = tokens_of(RESPONSES)
    assert_equal(batch.segmentation, segment_responses(ids, mask, Characters(), tags=OPTIONS.tags, eos_token_id=EOS))
    assert batch.segmentation.broken.tolist() == [0, 0, 0, int(BrokenReason.UNCLOSED)]
    assert torch.equal(batch.token_ids, ids)
    assert batch.attended is None


def test_rollout_batch_of_takes_the_answer_role_and_the_endings():
    options = SRPOConfig(**TAGS | {"answer_tags": ("<a>", "</a>")}, answer_role="other")
    ids, mask = tokens_of(["<p>a</p><a>b</a>\x01", "<p>a</p><t>b\x02"])
    group_ids = torch.tensor([0, 1])
    batch = RolloutBatch.of(ids, mask, Characters(), options, group_ids=group_ids)
    assert not (batch.segmentation.roles == Role.REASONING)[0].any()
    assert batch.segmentation.broken.tolist() == [0, 0]  # the second one was cut short, for all the tokenizer knows
    batch = RolloutBatch.of(ids, mask, Characters(), options, group_ids=group_ids, ending=(EOS, 2))
    assert batch.segmentation.broken.tolist() == [0, int(BrokenReason.UNCLOSED)]


def test_ending_ids_joins_the_sources_in_order():
    class Source:
        def __init__(self, eos_token_id):
            self.eos_token_id = eos_token_id

    assert ending_ids(Source(7)) == (7,)
    assert ending_ids(Source(7), Source([9, 7, 3])) == (3, 7, 9)
    assert ending_ids(Source(None), Source(5)) == (5,)
    assert ending_ids(Source(0), None) == (0,)
    for sources in ((Source(None),), (Source(None), Source(None)), (object(), None)):
        with pytest.raises(ValueError, match="neither the tokenizer nor the generation config has an eos_token_id"):
            ending_ids(*sources)


# plan


def test_plan_names_the_views_in_order():
    batch = responses()
    planned = plan_of(batch, SRPOConfig(**TAGS, reliance_spans=2))
    assert [(view.name, view.image) for view in planned.views] == [
        ("corrupted", "corrupted"),
        ("counterfactual", "original"),
        ("span_0", "original"),
        ("span_1", "original"),
    ]
    corrupted, counterfactual, *spans = planned.views
    assert corrupted.responses is None
    assert counterfactual.responses is planned.counterfactual
    assert [view.responses for view in spans] == list(planned.spans.responses)


@pytest.mark.parametrize("kind", ["swap", "drop", "mask"])
def test_plan_makes_the_counterfactual_that_the_options_say(kind):
    batch = responses()
    made = plan_of(batch, SRPOConfig(**TAGS, counterfactual=kind)).counterfactual
    roles, _, boundary = batch.segmentation
    by_hand = counterfactual_responses(
        batch.token_ids, roles, batch.mask, kind=kind, group_ids=batch.group_ids, boundary=boundary, pad_token_id=PAD
    )
    assert_equal(made, by_hand)
    if kind == "swap":
        assert made.donors.tolist() == [1, 0, 0, -1]


def test_plan_shows_the_counterfactual_the_image_that_the_options_say():
    options = SRPOConfig(**TAGS, counterfactual_image="corrupted")
    assert [view.image for view in plan_of(responses(), options).views] == ["corrupted", "corrupted"]
    assert [view.image for view in plan_of(responses(), options, has_images=False).views] == ["original"]


def test_plan_without_images_asks_for_nothing_about_images():
    planned = plan_of(responses(), SRPOConfig(**TAGS, reliance_spans=2), has_images=False)
    assert [view.name for view in planned.views] == ["counterfactual"]
    assert planned.spans is None


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"mix": 0.0}])
def test_plan_leaves_the_spans_out_where_every_weight_is_1(off):
    planned = plan_of(responses(), SRPOConfig(**TAGS, reliance_spans=2, **off))
    assert [view.name for view in planned.views] == ["corrupted", "counterfactual"]


def test_plan_hands_on_perception_keys():
    same = torch.tensor([4, 4, 5, 6])  # the first two say the same
    assert plan_of(responses(), perception_keys=same).counterfactual.donors.tolist() == [2, 2, 0, -1]


def test_plan_makes_the_spans_of_the_perception():
    batch = responses()
    planned = plan_of(batch, SRPOConfig(**TAGS, reliance_spans=3))
    roles, _, boundary = batch.segmentation
    by_hand = span_counterfactuals(batch.token_ids, roles, batch.mask, spans=3, boundary=boundary, pad_token_id=PAD)
    assert torch.equal(planned.spans.spans, by_hand.spans)
    for made, expected in zip(planned.spans.responses, by_hand.responses, strict=True):
        assert_equal(made, expected)


def test_prompts_and_tool_outputs_in_the_batch_stay_where_they_are():
    """What is attended but was not sampled is context in the counterfactual too, and is never trained on."""
    text = "what?<p>a cat</p>[tool]<t>so two</t>\x01"
    ids, attended = tokens_of([text, "what?<p>three dogs</p>[tool]<t>it is 3</t>\x01"])
    outputs = torch.tensor([[*map(ord, "[tool]")]])
    mask = attended.clone()
    mask[:, :5] = False
    for row in range(2):
        start = int((ids[row].unfold(0, 6, 1) == outputs).all(1).nonzero())
        mask[row, start : start + 6] = False
    batch = RolloutBatch.of(ids, mask, Characters(), OPTIONS, group_ids=torch.tensor([0, 0]), attended=attended)
    planned = plan_of(batch)
    swapped = Characters().decode(planned.counterfactual.token_ids[0].tolist())
    assert swapped == "what?<p>three dogs</p>[tool]<t>so two</t>\x01"
    # Adapters run the model on what is attended in a view, prompts included.
    assert torch.equal(planned.counterfactual.mask, planned.counterfactual.attention_mask)
    # A tool's output is not sampled, so its log-probs are nobody's: they may be anything.
    scored = scored_views(batch, planned)
    old = log_probs_of(ids, "original")
    made = credit(batch, planned, scored, OPTIONS, old_log_probs=old.masked_fill(~mask, math.nan),
                  advantages=ADVANTAGES[:2], step=0)  # fmt: skip
    assert (made.weights[~mask] == 0).all()
    assert made.weights[mask].isfinite().all()
    assert (made.scores[batch.segmentation.roles == Role.REASONING] != 0).all()


# credit


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"reliance_spans": 2, "reliance_mode": "share"},
        {"counterfactual": "mask", "visual_score": "k3", "score_clip": 1.0},
        {"mix_warmup_steps": 4, "scale": "ema_rms", "baseline": "median", "sign": "advantage"},
        {"counterfactual_image": "corrupted", "weight_map": "softmax"},
        {"strength": 0.0},
    ],
    ids=str,
)
def test_credit_equals_the_path_by_hand(change):
    options = SRPOConfig(**TAGS, **change)
    batch = responses(options=options)
    planned = plan_of(batch, options)
    scored, old = scored_views(batch, planned), old_log_probs_of(batch)
    roles, broken, _ = batch.segmentation
    reliance = None
    if "reliance_spans" in change:
        passes = [scored["span_0"], scored["span_1"]]
        reliance = planned.spans.reliance(passes, roles, batch.mask, original_log_probs=old)
    state = None
    for step in (1, 2):
        made = credited(batch, planned, options, step=step, scale_state=state)
        by_hand = srpo_advantages(
            old,
            ADVANTAGES,
            roles,
            batch.mask,
            options.at_step(step),
            corrupted_log_probs=scored["corrupted"],
            counterfactual_log_probs=planned.counterfactual.carry_back(
                scored["counterfactual"], original_log_probs=old
            ),
            reliance=reliance,
            broken=broken,
            scale_state=state,
        )
        for name in ("advantages", "weights", "scores"):
            assert torch.equal(getattr(made, name), getattr(by_hand, name)), name
        for name in ("old_log_probs", "corrupted_log_probs", "counterfactual_log_probs"):
            torch.testing.assert_close(getattr(made, name), getattr(by_hand, name), rtol=0, atol=0, equal_nan=True)
        assert made.scale_state == by_hand.scale_state
        assert by_hand.metrics.items() <= made.metrics.items()
        state = made.scale_state
    assert (state is not None) == (options.scale == "ema_rms")
    if options.strength == 0.0:
        assert torch.equal(made.advantages, torch.where(batch.mask, ADVANTAGES[:, None], 0.0))
    else:
        assert not torch.equal(made.weights, batch.mask.double())


def test_credit_without_images_has_no_score_of_the_perception():
    batch = responses()
    planned = plan_of(batch, has_images=False)
    made = credited(batch, planned)
    assert (made.scores[batch.segmentation.roles == Role.PERCEPTION] == 0).all()
    assert (made.scores[batch.segmentation.roles == Role.REASONING] != 0).any()
    assert made.corrupted_log_probs is None
    # What nobody asked for is not read.
    ignored = credited(batch, planned, scored=scored_views(batch, planned) | {"corrupted": torch.zeros(1)})
    assert torch.equal(ignored.weights, made.weights)


def test_a_row_without_images_does_not_depend_on_them():
    """Not on the noise between two passes either, and not on whatever was scored there."""
    batch = responses()
    planned = plan_of(batch)
    scored = scored_views(batch, planned)
    scored["corrupted"][1] = math.nan
    counts = torch.tensor([[1, 0], [0, 0], [2, 1], [1, 0]])
    made = credited(batch, planned, scored=scored, image_counts=counts)
    perception = batch.segmentation.roles == Role.PERCEPTION
    assert (made.scores[1][perception[1]] == 0).all()
    assert (made.scores[0][perception[0]] != 0).all()
    all_have = credited(batch, planned, image_counts=torch.ones(4, 2).long())
    assert torch.equal(made.weights[[0, 2, 3]], all_have.weights[[0, 2, 3]])
    close(made.metrics["corruption/unchanged"], 1 / 4)


def test_a_view_that_was_not_scored_is_named():
    batch = responses()
    options = SRPOConfig(**TAGS, reliance_spans=2)
    planned = plan_of(batch, options)
    scored = scored_views(batch, planned)
    del scored["corrupted"], scored["span_1"]
    message = "no log-probs of corrupted, span_1; score each of plan.views: corrupted, counterfactual, span_0, span_1"
    with pytest.raises(ValueError, match=message):
        credited(batch, planned, options, scored=scored)


@pytest.mark.parametrize("name", ["corrupted", "counterfactual", "span_0"])
@pytest.mark.parametrize("counted", [False, True])
def test_a_view_of_a_wrong_shape_is_named(name, counted):
    batch = responses()
    options = SRPOConfig(**TAGS, reliance_spans=1)
    planned = plan_of(batch, options)
    scored = scored_views(batch, planned)
    scored[name] = scored[name][:, 1:]
    counts = torch.ones(4, 2).long() if counted else None
    with pytest.raises(ValueError, match=rf"scored\['{name}'\] must have shape \(4, \d+\), .*, got \(4, \d+\)"):
        credited(batch, planned, options, scored=scored, image_counts=counts)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("old_log_probs", torch.zeros(4, 3)),
        ("advantages", torch.zeros(4, 3)),
        ("image_counts", torch.ones(4).long()),
        ("image_counts", torch.ones(4, 3).long()),
        ("correct", torch.ones(4)),
    ],
)
def test_a_tensor_of_a_wrong_kind_is_named(argument, value):
    batch = responses()
    with pytest.raises((TypeError, ValueError), match=argument):
        credited(batch, plan_of(batch), **{argument: value})


def test_nan_in_a_view_is_named():
    batch = responses()
    planned = plan_of(batch)
    scored = scored_views(batch, planned)
    scored["corrupted"][2, 4] = math.nan
    with pytest.raises(ValueError, match="corrupted_log_probs is NaN at trajectory 2 token 4"):
        credited(batch, planned, scored=scored)


def test_tokens_may_be_taken_out_of_training_after_planning():
    """As trainers do that mask stale or truncated samples: the views were planned and scored for all."""
    batch = responses()
    planned = plan_of(batch)
    scored = scored_views(batch, planned)
    smaller = batch._replace(mask=batch.mask.clone())
    smaller.mask[0] = False
    smaller.mask[1, -4:] = False
    old = old_log_probs_of(batch)
    old[~smaller.mask] = math.nan
    scored["corrupted"][~smaller.mask] = math.nan
    made = credited(smaller, planned, scored=scored, old_log_probs=old)
    assert (made.weights[~smaller.mask] == 0).all()
    whole = credited(batch, planned)
    assert torch.equal(made.weights[2:], whole.weights[2:])
    scored_tokens = smaller.mask & (batch.segmentation.roles > 0)
    assert torch.equal(made.scores[scored_tokens], whole.scores[scored_tokens])
    close(made.weights[1][scored_tokens[1]].mean(), 1.0)
    assert made.weights[3][smaller.mask[3]].tolist() == [1.0] * len(RESPONSES[3])


def test_an_empty_batch_is_credited():
    batch = responses()._replace(mask=torch.zeros(4, len(RESPONSES[1])).bool())
    planned = plan_of(batch)
    made = credited(batch, planned, image_counts=torch.zeros(4, 2).long())
    assert (made.advantages == 0).all()
    # Of nothing there is nothing to measure, and nothing is logged.
    assert all(value.isnan() for value in made.metrics.values())
    assert logged(made.metrics) == {}


VOCABULARY = {
    *(
        f"weight/{role}/{what}"
        for role in ("perception", "reasoning")
        for what in ("mean", "min", "max", "mass", "p05", "p50", "p95")
    ),
    *(
        f"score/{role}/{what}"
        for role in ("perception", "reasoning")
        for what in ("mean", "std", "p05", "p50", "p95", "clipped")
    ),
    *(f"tokens/{what}" for what in ("perception/fraction", "reasoning/fraction", "effective_fraction")),
    "structured/fraction",
    "broken/fraction",
    *(f"broken/{reason.name.lower()}" for reason in BrokenReason if reason != BrokenReason.NONE),
    "advantage/cosine",
    "advantage/zero",
    "swap/coverage",
    "corruption/unchanged",
}
OF_CORRECT = {
    f"weight/{role}/{answer}/{what}"
    for role in ("perception", "reasoning")
    for answer in ("right", "wrong")
    for what in ("mean", "p05", "p50", "p95")
} | {"right/fraction"}


def test_the_metrics_are_the_one_vocabulary():
    batch = responses()
    planned = plan_of(batch)
    counts, correct = torch.tensor([[2, 1], [1, 0], [1, 1], [0, 0]]), torch.tensor([1, 0, 1, -1])
    made = credited(batch, planned, image_counts=counts, correct=correct)
    assert made.metrics.keys() == VOCABULARY | OF_CORRECT
    assert all(value.ndim == 0 and not value.requires_grad for value in made.metrics.values())
    diagnosed = credit_diagnostics(
        made.weights,
        batch.segmentation.roles,
        batch.mask,
        scores=made.scores,
        broken=batch.segmentation.broken,
        advantages=ADVANTAGES,
        correct=correct,
        donors=planned.counterfactual.donors,
        score_clip=5.0,
    )
    assert {name: made.metrics[name] for name in diagnosed} == diagnosed
    close(made.metrics["advantage/zero"], 1 / 4)
    close(made.metrics["corruption/unchanged"], 2 / 4)
    close(made.metrics["swap/coverage"], 1.0)
    # Which names there are follows from the arguments, never from the values: ranks must agree.
    assert credited(batch, planned, image_counts=0 * counts).metrics.keys() == VOCABULARY
    assert credited(batch, planned).metrics.keys() == VOCABULARY - {"corruption/unchanged"}


def test_a_dropped_perception_has_no_donor():
    options = SRPOConfig(**TAGS, counterfactual="drop")
    batch = responses()
    made = credited(batch, plan_of(batch, options), options)
    assert made.donors is None
    assert "swap/coverage" not in made.metrics


def test_nothing_of_a_credit_has_a_gradient():
    batch = responses()
    planned = plan_of(batch)
    scored = {name: values.requires_grad_() for name, values in scored_views(batch, planned).items()}
    made = credited(batch, planned, scored=scored, old_log_probs=old_log_probs_of(batch).requires_grad_())
    tensors = [value for value in (*made, *made.metrics.values()) if isinstance(value, torch.Tensor)]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_logged_is_numbers_under_one_prefix():
    batch = responses()
    made = credited(batch, plan_of(batch))
    numbers = logged(made.metrics, which="all")
    assert numbers == {f"srpo/{name}": value.item() for name, value in made.metrics.items()}
    for which in ("main", "all"):
        assert logged({}, which=which) == {}
    assert logged({"a": torch.tensor(math.nan), "b": torch.tensor(1)}, which="all") == {"srpo/b": 1.0}
    assert logged({"a": torch.tensor(2), "b": torch.tensor(0.5)}, which="all") == {"srpo/a": 2.0, "srpo/b": 0.5}


def test_the_gap_to_an_engine_is_measured_where_there_is_one_and_changes_nothing_else():
    batch = responses()
    engine = (old_log_probs_of(batch) - 0.25).masked_fill(~batch.mask, torch.nan)
    made, without = (credited(batch, plan_of(batch), **more) for more in ({"engine_log_probs": engine}, {}))
    assert torch.equal(made.advantages, without.advantages)
    assert {*made.metrics} - {*without.metrics} == set(ENGINE_METRICS)
    numbers = logged(made.metrics)
    assert list(numbers)[-3:] == [f"srpo/{name}" for name in ENGINE_METRICS]
    scored = batch.mask & (batch.segmentation.roles > 0)
    expected = (0.25, 0.25, made.scores[scored].abs().mean().item())
    assert [numbers[f"srpo/{name}"] for name in ENGINE_METRICS] == pytest.approx(expected, abs=1e-6)


def test_logged_is_by_default_the_main_metrics_in_their_order():
    batch = responses()
    counts, correct = torch.tensor([[2, 1], [1, 0], [1, 1], [0, 0]]), torch.tensor([1, 0, 1, -1])
    made = credited(batch, plan_of(batch), image_counts=counts, correct=correct)
    numbers = logged(made.metrics)
    # Each of them exists among the metrics that `credit` makes, so none is missing here.
    assert list(numbers) == [f"srpo/{name}" for name in MAIN_METRICS]
    assert numbers == {f"srpo/{name}": made.metrics[name].item() for name in MAIN_METRICS}
    assert len(set(MAIN_METRICS)) == len(MAIN_METRICS) <= 12
    # Counted by hand: three of four responses have roles, one advantage in four is 0, two of three answers are right.
    assert numbers["srpo/structured/fraction"] == 3 / 4
    assert numbers["srpo/advantage/zero"] == 1 / 4
    assert numbers["srpo/right/fraction"] == pytest.approx(2 / 3)
    without = logged(made.metrics | {"advantage/cosine": torch.tensor(math.nan)})
    assert numbers.keys() - without.keys() == {"srpo/advantage/cosine"}


def test_logged_refuses_an_unknown_choice_of_metrics():
    with pytest.raises(ValueError, match="^which must be one of 'main', 'all', got 'few'"):
        logged({}, which="few")


# record


def test_record_goes_through_a_rollout_file_and_comes_back(tmp_path):
    batch = responses()
    planned = plan_of(batch)
    made = credited(batch, planned)
    path = tmp_path / "rollouts.jsonl"
    with RolloutWriter(path, tokenizer=Characters(), tags=OPTIONS.tags) as writer:
        correct = torch.tensor([1, 0, -1, 0])
        recorded = record(batch, made, advantages=ADVANTAGES, correct=correct)
        writer.write(**recorded, step=3, rewards=[1.0, 0.0, 1.0, 0.0])
        writer.write(**record(batch, made, advantages=ADVANTAGES, rows=[2, 0]), step=4)
    lines = list(read_rollouts(path))
    assert [line.step for line in lines] == [3, 3, 3, 3, 4, 4]
    assert [line.correct for line in lines] == [True, False, None, False, None, None]
    for line, row in zip(lines, [0, 1, 2, 3, 2, 0], strict=True):
        real = batch.mask[row]
        assert line.text == RESPONSES[row]
        assert line.finished
        assert line.tags == OPTIONS.tags
        assert line.broken == BrokenReason(batch.segmentation.broken[row].item())
        assert line.roles.tolist() == batch.segmentation.roles[row][real].tolist()
        assert line.group == batch.group_ids[row].item()
        assert line.advantage == ADVANTAGES[row].item()
        assert line.swapped is (row != 3)
        for name in ("old_log_probs", "corrupted_log_probs", "counterfactual_log_probs", "scores", "weights"):
            expected = getattr(made, name)[row][real]
            torch.testing.assert_close(torch.tensor(getattr(line, name)).double(), expected, rtol=0, atol=1e-5)


def test_record_of_a_run_without_images_or_donors(tmp_path):
    options = SRPOConfig(**TAGS, counterfactual="drop")
    batch = responses()
    made = credited(batch, plan_of(batch, options, has_images=False), options)
    values = record(batch, made, advantages=ADVANTAGES, rows=[1])
    assert values["corrupted_log_probs"] is values["donors"] is None
    with RolloutWriter(tmp_path / "rollouts.jsonl", tokenizer=Characters(), tags=OPTIONS.tags) as writer:
        writer.write(**values)
    (line,) = read_rollouts(tmp_path / "rollouts.jsonl")
    assert line.corrupted_log_probs is line.swapped is None
    assert line.broken == BrokenReason.NONE


def test_credit_options_of_a_step_are_a_config_still():
    """`credit` ramps `mix` on the whole config, so that its other options go on."""
    options = SRPOConfig(**TAGS, mix_warmup_steps=4).at_step(1)
    assert isinstance(options, SRPOConfig)
    assert isinstance(options, CreditOptions)
    assert options.perception_tags == ("<p>", "</p>")
