"""Every view of ten families against hand-written forwards of one response alone: no padding, no cache, no batch."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from srpo_hf import Scorer
from tiny_models import FAMILIES, TYPES, make_model, make_rollouts, one_by_one

from srpo_core import Role, SRPOConfig, corrupt_pixel_values, credit
from srpo_core.batch import prompt_id

TOLERANCE = 1e-5  # nats
model_of = functools.cache(make_model)
families = pytest.mark.parametrize("family", FAMILIES)
ways = pytest.mark.parametrize("share", [True, False], ids=["shared", "plain"])


def one_or_two_or_none(group):
    return (1, 0, 2)[group % 3]


def corrupted_by_hand(processor, options, *, step=0, config=None):
    """What becomes of a processor's inputs."""

    def change(inputs):
        if options.corruption == "none":
            keep = inputs["input_ids"] != getattr(config, "image_token_id", None)
            return {key: inputs[key][keep][None] for key in ("input_ids", *TYPES) if key in inputs}
        pixels, grid = inputs["pixel_values"], inputs.get("image_grid_thw")
        images = len(pixels if grid is None else grid)
        seen = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask", *TYPES)}
        number, of_images = prompt_id(inputs["input_ids"][0], seen), processor.image_processor
        changed = corrupt_pixel_values(
            pixels,
            prompt_ids=torch.full((images,), number),
            image_index=torch.arange(images),
            image_grid_thw=grid,
            pixel_attention_mask=inputs.get("pixel_attention_mask"),
            patch_size=None if grid is not None else 14,
            kind=options.corruption,
            image_mean=of_images.image_mean,
            image_std=of_images.image_std,
            seed=options.seed,
            step=step,
            unchanged="keep",
        )
        return {**inputs, "pixel_values": changed}

    return change


def plainly(model, processor, rollouts, *, step=0):
    """All log-probs of all views, one response at a time: by view, of each row [(column, log-prob)]."""
    batch, planned, options = rollouts.batch, rollouts.planned, rollouts.options
    change = corrupted_by_hand(processor, options, step=step, config=model.config)

    def score(row, response, image):
        images = rollouts.images[row]
        seen = change if image == "corrupted" and images else None
        with torch.no_grad():
            return one_by_one(model, processor, rollouts.prompts[row], images, response, change=seen)

    made = {}
    for name, image, changed in [("original", "original", None), *planned.views]:
        token_ids = batch.token_ids if changed is None else changed.token_ids
        attended = batch.mask if changed is None else changed.attention_mask
        made[name] = torch.zeros(token_ids.shape, dtype=torch.float64)
        for row in range(len(token_ids)):
            columns = [column for column in range(token_ids.shape[1]) if attended[row, column]]
            response = token_ids[row, columns].tolist()
            if response:
                made[name][row, columns] = score(row, response, image)
    return made


def as_promised(full, rollouts):
    """Of the full log-probs of each view what the scorer promises to give, by loops."""
    batch, original = rollouts.batch, full["original"]
    roles = batch.segmentation.roles
    made = {"original": original}
    for name, _, changed in rollouts.planned.views:
        if changed is None:
            made[name] = original.clone()
            for row, column in (batch.mask & (roles == Role.PERCEPTION)).nonzero().tolist():
                if rollouts.images[row]:
                    made[name][row, column] = full[name][row, column]
            continue
        made[name] = torch.where(changed.mask, torch.nan, torch.zeros_like(full[name]))
        for row, places in enumerate(changed.positions.tolist()):
            is_after = False
            for column, place in enumerate(places):
                is_after = is_after or place < 0
                if place >= 0:
                    made[name][row, place] = full[name][row, place] if is_after else original[row, column]
    return made


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name].isnan(), values.isnan()), name
        assert (found[name] - values).nan_to_num().abs().max() <= TOLERANCE, name


@functools.cache
def case(family, **options):
    model, processor = model_of(family)
    rollouts = make_rollouts(processor, groups=3, images=one_or_two_or_none, **options)
    return rollouts, plainly(model, processor, rollouts)


@ways
@families
def test_every_view_is_that_of_one_response_alone(family, share):
    """Groups with one image, none and two; images of other shapes; responses of other lengths, some malformed."""
    (model, processor), (rollouts, full) = model_of(family), case(family, reliance_spans=2)
    scorer = Scorer(model, processor, rollouts.options, share_prefixes=share, batch_size=2)
    scored = scorer.score(rollouts.prompts, rollouts.images, rollouts.batch, rollouts.planned)
    assert_close(scored.log_probs, as_promised(full, rollouts))
    # And they are about something: no view is the original again.
    roles, mask = rollouts.batch.segmentation.roles, rollouts.batch.mask
    moved = (scored.log_probs["corrupted"] - scored.log_probs["original"])[(roles == Role.PERCEPTION) & mask]
    assert moved.abs().max() > 0.01


@ways
@pytest.mark.parametrize(
    "options",
    [
        {"counterfactual": "drop"},
        {"counterfactual_image": "corrupted", "corruption": "gray"},
        {"corruption": "none"},
        {"counterfactual": "drop", "counterfactual_image": "corrupted", "reliance_spans": 3, "corruption": "noise"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_other_views_are_those_of_one_response_alone(options, share):
    (model, processor), (rollouts, full) = model_of("qwen2_5_vl"), case("qwen2_5_vl", **options)
    scorer = Scorer(model, processor, rollouts.options, share_prefixes=share)
    scored = scorer.score(rollouts.prompts, rollouts.images, rollouts.batch, rollouts.planned)
    assert_close(scored.log_probs, as_promised(full, rollouts))


@families
def test_without_its_image_a_prompt_is_that_of_one_response_alone(family):
    (model, processor), (rollouts, full) = model_of(family), case(family, corruption="none")
    scored = Scorer(model, processor, rollouts.options).score(
        rollouts.prompts, rollouts.images, rollouts.batch, rollouts.planned
    )
    assert_close(scored.log_probs, as_promised(full, rollouts))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    family=st.sampled_from(["qwen2_5_vl", "gemma3_sliding", "idefics3", "qwen3_vl"]),
    seed=st.integers(0, 1000),
    groups=st.integers(1, 3),
    size=st.integers(1, 5),
    images=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    counterfactual=st.sampled_from(["swap", "drop"]),
    batch_size=st.integers(1, 5),
    spans=st.integers(0, 2),
)
def test_any_ragged_batch_is_scored_as_one_response_alone(
    family, seed, groups, size, images, counterfactual, batch_size, spans
):
    model, processor = model_of(family)
    rollouts = make_rollouts(
        processor,
        seed=seed,
        groups=groups,
        size=size,
        images=lambda group: images[group],
        counterfactual=counterfactual,
        reliance_spans=spans,
    )
    expected = as_promised(plainly(model, processor, rollouts, step=seed), rollouts)
    for share in (True, False):
        scorer = Scorer(model, processor, rollouts.options, batch_size=batch_size, share_prefixes=share)
        scored = scorer.score(rollouts.prompts, rollouts.images, rollouts.batch, rollouts.planned, step=seed)
        assert_close(scored.log_probs, expected)


@ways
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"counterfactual": "drop"},
        {"counterfactual_image": "corrupted"},
        {"reliance_spans": 2},
        {"reliance_spans": 3, "reliance_mode": "share", "scale": "batch_rms", "sign": "advantage"},
        {"baseline": "role_balanced", "weight_map": "softmax", "renormalization": "per_role", "answer_role": "other"},
        {"visual_score": "k3", "consistency_score": "abs"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "defaults",
)
def test_the_credit_is_that_of_full_plain_scoring(options, share):
    (model, processor), (rollouts, full) = model_of("qwen2_5_vl"), case("qwen2_5_vl", **options)
    advantages = torch.linspace(-1.5, 1.0, len(rollouts.prompts))
    scored = Scorer(model, processor, rollouts.options, share_prefixes=share).score(
        rollouts.prompts, rollouts.images, rollouts.batch, rollouts.planned
    )

    def weights(log_probs, counts):
        return credit(
            rollouts.batch,
            rollouts.planned,
            log_probs,
            rollouts.options,
            old_log_probs=log_probs["original"],
            advantages=advantages,
            step=0,
            image_counts=counts,
        ).weights

    images = torch.tensor([[len(own), 0] for own in rollouts.images])
    expected = weights({name: values.float() for name, values in full.items()}, images)
    assert (weights(scored.log_probs, scored.image_counts) - expected).abs().max() < 1e-4
    assert expected[rollouts.batch.mask].std() > 0.05


def test_a_masked_perception_is_one_that_no_token_attends_to():
    """Against a forward that hides it from attention, where positions are counted along the attention mask."""
    model, processor = model_of("qwen2_5_vl")
    rollouts = make_rollouts(processor, groups=2, counterfactual="mask", malformed=False)
    scored = Scorer(model, processor, rollouts.options, share_prefixes=True).score(
        rollouts.prompts, rollouts.images, rollouts.batch, rollouts.planned
    )
    changed, roles = rollouts.planned.counterfactual, rollouts.batch.segmentation.roles
    compared = 0
    for row, (chat, images) in enumerate(zip(rollouts.prompts, rollouts.images, strict=True)):
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = dict(processor(text=[text], images=[images], return_tensors="pt"))
        tail = changed.token_ids[row][rollouts.batch.mask[row]][None]
        visible = changed.attention_mask[row][rollouts.batch.mask[row]][None]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], visible.long()], 1)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tail)], 1)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -tail.shape[1] - 1 : -1].log_softmax(-1)
        for column in range(tail.shape[1]):
            if roles[row, column] == Role.REASONING:
                expected = logits[column, tail[0, column]]
                assert abs(scored.log_probs["counterfactual"][row, column] - expected) <= TOLERANCE
                compared += 1
    assert compared > 20


@ways
def test_a_text_only_batch_has_one_view_less_and_no_counts(share):
    model, processor = model_of("qwen2_5_vl")
    rollouts = make_rollouts(processor, images=lambda group: 0)
    scorer = Scorer(model, processor, rollouts.options, share_prefixes=share)
    scored = scorer.score(rollouts.prompts, None, rollouts.batch, rollouts.planned)
    assert list(scored.log_probs) == ["original", "counterfactual"]
    assert scored.image_counts is None
    assert_close(scored.log_probs, as_promised(plainly(model, processor, rollouts), rollouts))


def test_image_counts_say_how_many_images_the_corruption_left_as_they_were():
    model, processor = model_of("qwen2_5_vl")
    rollouts = make_rollouts(processor, groups=2, size=2, images=lambda group: group + 1, corruption="gray")
    from PIL import Image

    gray = Image.new("RGB", (56, 56), (128, 128, 128))
    images = [[own[0], gray] if len(own) == 2 else own for own in rollouts.images]
    scored = Scorer(model, processor, SRPOConfig(corruption="patch_shuffle")).score(
        rollouts.prompts, images, rollouts.batch, rollouts.planned
    )
    assert scored.image_counts.tolist() == [[1, 0], [1, 0], [2, 1], [2, 1]]


@ways
def test_left_out_rows_have_their_original_log_probs_and_the_others_are_untouched(share):
    (model, processor), (rollouts, _) = model_of("qwen2_5_vl"), case("qwen2_5_vl")
    scorer = Scorer(model, processor, rollouts.options, share_prefixes=share)
    given = (rollouts.prompts, rollouts.images, rollouts.batch, rollouts.planned)
    everything = scorer.score(*given)
    rows = [0, 1, 2]  # the first group
    some = scorer.score(*given, rows=rows)
    as_booleans = scorer.score(*given, rows=torch.arange(len(rollouts.prompts)) < 3)
    assert torch.equal(some.log_probs["original"], everything.log_probs["original"])
    for name in ("corrupted", "counterfactual"):
        assert_close({name: some.log_probs[name][rows]}, {name: everything.log_probs[name][rows]})
        assert torch.equal(some.log_probs[name].nan_to_num(7), as_booleans.log_probs[name].nan_to_num(7))
        assert some.work[name].output_tokens < everything.work[name].output_tokens
    carried = rollouts.planned.counterfactual.carry_back(
        some.log_probs["counterfactual"], original_log_probs=some.log_probs["original"]
    )
    assert torch.equal(carried[3:], some.log_probs["original"][3:])
    assert torch.equal(some.log_probs["corrupted"][3:], some.log_probs["original"][3:])


@ways
def test_tool_outputs_are_attended_and_not_scored(share):
    """A token inside a response that the policy did not sample."""
    model, processor = model_of("qwen2_5_vl")
    rollouts = make_rollouts(processor, groups=1, malformed=False)
    mask = rollouts.batch.mask.clone()
    mask[:, -12:-10] &= False
    batch = rollouts.batch._replace(mask=mask)
    scored = Scorer(model, processor, rollouts.options, share_prefixes=share).score(
        rollouts.prompts, rollouts.images, batch, rollouts.planned._replace(views=())
    )
    whole = plainly(model, processor, rollouts._replace(planned=rollouts.planned._replace(views=())))["original"]
    last = [int(row.nonzero().max()) for row in mask]
    for row, end in enumerate(last):
        expected = torch.where(mask[row, : end + 1], whole[row, : end + 1], 0.0)
        assert (scored.log_probs["original"][row, : end + 1] - expected).abs().max() <= TOLERANCE
        assert not scored.log_probs["original"][row, end + 1 :].any()


@pytest.mark.parametrize(
    ("family", "autocast"), [("qwen2_5_vl", None), ("gemma3", None), ("idefics3", None), ("qwen2_5_vl", "autocast")]
)
def test_in_bfloat16_shared_prefixes_are_as_near_to_float32_as_plain_passes(family, autocast):
    """Both round the same sums in another order, so their root mean squares over many tokens differ by noise."""
    model, processor = make_model(family)
    rollouts = make_rollouts(processor, groups=3, size=4, images=one_or_two_or_none)
    truth = as_promised(plainly(model, processor, rollouts), rollouts)
    if autocast is None:
        model.to(torch.bfloat16)
    given = (rollouts.prompts, rollouts.images, rollouts.batch, rollouts.planned)
    errors = {}
    for share in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            found = Scorer(model, processor, rollouts.options, share_prefixes=share).score(*given).log_probs
        errors[share] = torch.cat([(found[name] - truth[name]).nan_to_num().flatten() for name in truth])
    rms = {share: error.square().mean().sqrt() for share, error in errors.items()}
    assert rms[False] > 1e-3
    assert rms[True] <= 1.5 * rms[False]
