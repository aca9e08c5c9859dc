"""Prompts: encoded once, whatever they are given as; and what is refused in one sentence."""

import copy

import pytest
import torch
from srpo_hf import Scorer
from srpo_hf.prompts import encode_prompts
from test_hf_views import TOLERANCE, as_promised, assert_close, case, model_of
from tiny_models import make_image, make_model, make_rollouts

from srpo_core import Role, SRPOConfig


def arguments(rollouts):
    return rollouts.prompts, rollouts.images, rollouts.batch, rollouts.planned


def test_equal_prompts_are_encoded_once_whatever_objects_hold_them():
    model, processor = model_of("qwen2_5_vl")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    image, copied, other = make_image(0), make_image(0), make_image(1)
    assert image is not copied
    calls = []

    class Counting:
        tokenizer, image_processor = processor.tokenizer, processor.image_processor
        apply_chat_template = staticmethod(processor.apply_chat_template)

        def __call__(self, **inputs):
            calls.append(inputs)
            return processor(**inputs)

    takes = frozenset({"mm_token_type_ids"})
    made = encode_prompts(
        [chat, text, copy.deepcopy(chat), chat],
        [[image], [copied], (copied,), [other]],
        processor=Counting(),
        config=model.config,
        takes=takes,
    )
    assert made.of_row == [0, 0, 0, 1]
    assert len(calls) == 2
    again = encode_prompts(
        [made.distinct[1], made.distinct[0], made.distinct[1]._replace()],
        None,
        processor=None,
        config=model.config,
        takes=takes,
    )
    assert again.of_row == [0, 1, 0]


def test_encoded_prompts_are_scored_as_the_chats_and_images_they_were_made_of():
    (model, processor), (rollouts, full) = model_of("qwen2_5_vl"), case("qwen2_5_vl")
    scorer = Scorer(model, processor, rollouts.options)
    encoded = scorer.encode(rollouts.prompts, rollouts.images)
    assert len(encoded) == 9
    assert len({id(prompt) for prompt in encoded}) == 3
    assert [prompt.images for prompt in encoded] == [len(own) for own in rollouts.images]
    scored = scorer.score(encoded, None, rollouts.batch, rollouts.planned)
    assert_close(scored.log_probs, as_promised(full, rollouts))
    part = slice(2, 5)  # a micro-batch
    found = scorer.log_probs(encoded[part], None, rollouts.batch.token_ids[part], rollouts.batch.mask[part])
    assert (found - full["original"][part]).abs().max() <= TOLERANCE


def test_token_types_are_made_where_the_processor_returns_none():
    """Without them M-RoPE counts the image as text, and log-probs move by a nat or two."""
    model, processor = model_of("qwen2_5_vl")
    rollouts = make_rollouts(processor, groups=1)

    class Forgetful:
        tokenizer, image_processor = processor.tokenizer, processor.image_processor
        apply_chat_template = staticmethod(processor.apply_chat_template)

        def __call__(self, **inputs):
            return {key: value for key, value in processor(**inputs).items() if key != "mm_token_type_ids"}

    expected = Scorer(model, processor, rollouts.options).score(*arguments(rollouts))
    found = Scorer(model, Forgetful(), rollouts.options).score(*arguments(rollouts))
    assert_close(found.log_probs, expected.log_probs)


def test_a_template_that_begins_the_text_itself_gets_no_second_beginning():
    model, processor = make_model("llava")
    tokenizer = processor.tokenizer
    tokenizer.bos_token = "<|im_start|>"  # with which this template begins
    seen = []

    class Watched:
        image_processor = processor.image_processor
        apply_chat_template = staticmethod(processor.apply_chat_template)

        def __call__(self, **inputs):
            seen.append(inputs.get("add_special_tokens"))
            return processor(**inputs)

    Watched.tokenizer = tokenizer
    chat = [{"role": "user", "content": "Hello"}]
    for prompt in (chat, "Hello"):
        encode_prompts([prompt], None, processor=Watched(), config=model.config, takes=frozenset())
    assert seen == [False, None]


def test_corrupted_prompts_may_be_given():
    (model, processor), (rollouts, _) = model_of("qwen2_5_vl"), case("qwen2_5_vl")
    scorer = Scorer(model, processor, rollouts.options)
    takes = scorer._policy().takes
    own = encode_prompts(rollouts.prompts, rollouts.images, processor=processor, config=model.config, takes=takes)
    zeros = [
        prompt._replace(vision=prompt.vision | {"pixel_values": 0 * prompt.vision["pixel_values"]})
        if prompt.images
        else prompt
        for prompt in own.distinct
    ]
    counts = torch.ones(len(rollouts.prompts), 2, dtype=torch.long)
    scored = scorer.score(*arguments(rollouts), corrupted=[zeros[place] for place in own.of_row], image_counts=counts)
    assert scored.image_counts is counts
    rows = [own.distinct[place] for place in own.of_row]
    expected = scorer.score(
        [prompt if not prompt.images else zeros[place] for prompt, place in zip(rows, own.of_row, strict=True)],
        None,
        rollouts.batch,
        rollouts.planned._replace(views=()),
    ).log_probs["original"]
    where = (rollouts.batch.segmentation.roles == Role.PERCEPTION) & rollouts.batch.mask
    where &= torch.tensor([bool(own) for own in rollouts.images])[:, None]
    assert (scored.log_probs["corrupted"] - expected)[where].abs().max() <= TOLERANCE


# Refusals


def refused(sentence, *, prompts=None, images=None, batch=None):
    (model, processor), (rollouts, _) = model_of("qwen2_5_vl"), case("qwen2_5_vl")
    scorer = Scorer(model, processor, SRPOConfig())
    with pytest.raises(ValueError, match=sentence):
        scorer.score(
            rollouts.prompts if prompts is None else prompts(rollouts),
            rollouts.images if images is None else images(rollouts),
            rollouts.batch if batch is None else batch(rollouts.batch),
            rollouts.planned,
        )


def test_bad_input_gets_one_sentence():
    text_part = [{"role": "user", "content": "What is it?"}]
    refused(r"prompts must have one prompt per response, 9, got 2", prompts=lambda r: r.prompts[:2])
    refused(r"images must have one list per response, 9, got 1", images=lambda r: r.images[:1])
    refused(r"images\[0\] must be a list of images", images=lambda r: [r.images[0][0], *r.images[1:]])
    refused(r"prompts\[0\] and its 0 images do not go together: Found 1 .* but no images", images=lambda r: [[]] * 9)
    refused(
        r"prompts\[0\] and its 1 images do not go together: |prompts\[0\] has no image placeholder, but images\[0\]",
        prompts=lambda r: [text_part] * 9,
    )
    refused(r"prompts\[0\] must be a text or a list of messages", prompts=lambda r: [["hello"]] * 9)
    refused(r"batch.attended is set", batch=lambda batch: batch._replace(attended=batch.mask))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"share_prefixes": "always"}, "share_prefixes must be True, False or 'auto', got 'always'"),
    ],
)
def test_arguments_out_of_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Scorer(*model_of("qwen2_5_vl"), SRPOConfig(), **options)


@pytest.mark.parametrize(
    ("images", "text", "sentence"),
    [
        ([], "look <|video_pad|>", r"prompts\[0\] has a video, and Scorer scores images and text"),
        ([], "look <|image_pad|>", r"prompts\[0\] has an image placeholder, but images\[0\] is empty"),
        ([make_image(0)], "look", r"prompts\[0\] has no image placeholder, but images\[0\] holds 1: write the content"),
    ],
)
def test_images_and_placeholders_that_do_not_fit_are_refused_where_the_processor_is_silent(images, text, sentence):
    model, processor = model_of("qwen2_5_vl")

    class Silent:
        tokenizer = processor.tokenizer

        def __call__(self, text, return_tensors, images=None):
            return self.tokenizer(text, return_tensors=return_tensors)

    with pytest.raises(ValueError, match=sentence):
        encode_prompts([text], [images], processor=Silent(), config=model.config, takes=frozenset())


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (
            {"pixel_values": [torch.ones(3, 8, 8)]},
            r"made no tensor of pixels of images\[0\]: qwen2_5_vl is not supported",
        ),
        (
            {"pixel_values": torch.ones(1, 3, 8, 8), "cross_attention_mask": torch.ones(1, 7, 1, 4).long()},
            "cross_attention_mask has one entry per token, .* qwen2_5_vl is not supported",
        ),
    ],
)
def test_what_a_processor_returns_and_nobody_could_score_is_refused(returned, sentence):
    model, processor = model_of("qwen2_5_vl")

    class Other:
        tokenizer = processor.tokenizer

        def __call__(self, text, return_tensors, images=None):
            return self.tokenizer(text, return_tensors=return_tensors) | returned

    image = [make_image(0)]
    with pytest.raises(ValueError, match=sentence):
        encode_prompts(["<|image_pad|>"], [image], processor=Other(), config=model.config, takes=frozenset())


def test_a_placeholder_inside_a_response_is_named():
    (model, processor), (rollouts, _) = model_of("qwen2_5_vl"), case("qwen2_5_vl")
    ids = rollouts.batch.token_ids.clone()
    ids[0, 3] = model.config.image_token_id
    scorer = Scorer(model, processor, rollouts.options, share_prefixes=False)
    with pytest.raises(ValueError, match=r"token_ids holds the image placeholder \d+ inside a response"):
        scorer.log_probs(rollouts.prompts, rollouts.images, ids, rollouts.batch.mask)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [([9], r"rows must be places of responses, from 0 to 8, got \[9\]"), (torch.ones(3).bool(), "one per response, 9")],
)
def test_rows_that_are_not_there_are_refused(rows, sentence):
    (model, processor), (rollouts, _) = model_of("qwen2_5_vl"), case("qwen2_5_vl")
    with pytest.raises(ValueError, match=sentence):
        Scorer(model, processor, rollouts.options).score(*arguments(rollouts), rows=rows)


def test_without_a_token_to_score_log_probs_are_refused_and_scores_empty():
    (model, processor), (rollouts, _) = model_of("qwen2_5_vl"), case("qwen2_5_vl")
    scorer, nothing = Scorer(model, processor, rollouts.options), torch.zeros_like(rollouts.batch.mask)
    with pytest.raises(ValueError, match="mask is False everywhere"):
        scorer.log_probs(rollouts.prompts, rollouts.images, rollouts.batch.token_ids, nothing)
    scored = scorer.score(
        rollouts.prompts, rollouts.images, rollouts.batch._replace(mask=nothing), rollouts.planned._replace(views=())
    )
    assert not scored.log_probs["original"].any()


def test_a_model_without_an_output_layer_is_refused():
    model, processor = model_of("qwen2_5_vl")
    with pytest.raises(ValueError, match="has no output layer: load it with AutoModelForImageTextToText"):
        Scorer(model.model, processor, SRPOConfig())
