"""Shared prefixes: what they save, where they are not taken, and the pure functions below them."""

import logging

import pytest
import torch
from srpo_hf import EncodedPrompt, Scorer
from srpo_hf.policy import Policy
from srpo_hf.prefixes import Store, longest_common_prefix, merged, problem_of_model, problem_of_prompt
from srpo_hf.prompts import encode_prompts
from test_hf_views import TOLERANCE, assert_close, case, model_of
from tiny_models import make_model, make_other_model, make_rollouts


def arguments(rollouts):
    return rollouts.prompts, rollouts.images, rollouts.batch, rollouts.planned


def policy_of(model, processor):
    return Policy(model, temperature=1.0, pad_token_id=processor.tokenizer.pad_token_id)


def warnings_of(caplog):
    return [record.message for record in caplog.records if record.name == "srpo_hf"]


# What is read


def test_each_prompt_is_read_once_for_each_image_and_of_responses_what_a_view_needs():
    """Counted by hand from the tokens: three responses to a prompt, all of one context up to their perceptions."""
    model, processor = model_of("qwen2_5_vl")
    rollouts = make_rollouts(processor, groups=1, size=3, malformed=False)
    work = Scorer(model, processor, rollouts.options, share_prefixes=True).score(*arguments(rollouts)).work
    chat, images = rollouts.prompts[0], rollouts.images[0]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = processor(text=[text], images=[images], return_tensors="pt")["input_ids"].shape[1]
    ids = [row[real].tolist() for row, real in zip(rollouts.batch.token_ids, rollouts.batch.mask, strict=True)]
    closing = processor.tokenizer.convert_tokens_to_ids("</perception>")
    ends = [row.index(closing) for row in ids]
    # The last token of the prompt is read by each response; the last of the response by none.
    assert work["original"].model_tokens == prompt - 1 + sum(map(len, ids))
    assert work["original"].output_tokens == sum(map(len, ids))
    # The last token of the prompt, the tag and the perception but for its last token, which is predicted and not read.
    assert work["corrupted"].model_tokens == prompt - 1 + sum(ends)
    assert work["corrupted"].output_tokens == sum(end - 1 for end in ends)
    # The donor's perception was read in the same context: from its last token on.
    assert (rollouts.planned.counterfactual.donors >= 0).all()
    tails = [len(row) - end for row, end in zip(ids, ends, strict=True)]
    assert work["counterfactual"].model_tokens == sum(tails)
    assert work["counterfactual"].output_tokens == sum(tails)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_the_batch_size_changes_nothing(batch_size):
    (model, processor), (rollouts, _) = model_of("qwen2_5_vl"), case("qwen2_5_vl", reliance_spans=2)
    expected = Scorer(model, processor, rollouts.options, share_prefixes=False).score(*arguments(rollouts))
    for share in (True, False):
        scorer = Scorer(model, processor, rollouts.options, batch_size=batch_size, share_prefixes=share)
        assert_close(scorer.score(*arguments(rollouts)).log_probs, expected.log_probs)


# Where prefixes are not shared


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3_sliding", "internvl", "smolvlm"])
def test_supported_families_share_without_a_warning(family, caplog):
    (model, processor), (rollouts, _) = model_of(family), case(family)
    scorer = Scorer(model, processor, rollouts.options)
    assert problem_of_model(policy_of(model, processor)) is None
    work = scorer.score(*arguments(rollouts)).work
    plain = Scorer(model, processor, rollouts.options, share_prefixes=False).score(*arguments(rollouts)).work
    assert sum(each.model_tokens for each in work.values()) < 0.6 * sum(each.model_tokens for each in plain.values())
    assert not warnings_of(caplog)


OTHERS = {  # what is said, None where prefixes are shared
    "Mistral3": None,
    "Cohere2Vision": None,
    "Glm4v": None,
    "PaliGemma": "does not count positions from 0",
    "Lfm2Vl": "layers of conv",
    "Qwen3_5": "layers of linear_attention",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_share_where_it_is_exact_and_are_scored_plainly_elsewhere(name, caplog):
    _, processor = model_of("qwen2_5_vl")
    tokenizer = processor.tokenizer
    model = make_other_model(name, len(tokenizer))
    rollouts = make_rollouts(processor, images=lambda group: 0)
    texts = [chat[0]["content"][0]["text"] for chat in rollouts.prompts]
    prompts = [EncodedPrompt(tokenizer(text, return_tensors="pt")["input_ids"][0], {}, {}, 0) for text in texts]
    shared, plain = (
        Scorer(model, processor, rollouts.options, share_prefixes=share).score(
            prompts, None, rollouts.batch, rollouts.planned
        )
        for share in ("auto", False)
    )
    assert_close(shared.log_probs, plain.log_probs)
    for row, prompt in enumerate(prompts):
        response = rollouts.batch.token_ids[row][rollouts.batch.mask[row]]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt.token_ids, response])[None], use_cache=False).logits[0]
        expected = logits[len(prompt.token_ids) - 1 : -1].log_softmax(-1).gather(1, response[:, None])[:, 0]
        assert (shared.log_probs["original"][row, : len(response)] - expected).abs().max() <= TOLERANCE
    assert (shared.work["original"].model_tokens < plain.work["original"].model_tokens) == (OTHERS[name] is None)
    messages = warnings_of(caplog)
    assert len(messages) == (OTHERS[name] is not None)
    assert not messages or OTHERS[name] in messages[0]


def spoiled(kind):
    """A LLaVA whose cache is not what sharing takes it for."""
    model, processor = make_model("llava")
    language = model.model.language_model
    if kind == "state":
        model.config.text_config.layer_types = ["linear_attention", "full_attention"]
    elif kind == "positions":  # as PaliGemma counts them

        def count_from_one(module, args, kwargs):
            if kwargs.get("position_ids") is None:
                past = kwargs["cache"].get_seq_length() if kwargs.get("cache") is not None else 0
                time = kwargs["inputs_embeds"].shape[1]
                kwargs["position_ids"] = torch.arange(time)[None] + past + 1
            return args, kwargs

        language.register_forward_pre_hook(count_from_one, with_kwargs=True)
    elif kind == "no cache":
        language.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"cache": None, "use_cache": False}), with_kwargs=True
        )
    elif kind == "looks ahead":  # the prompt is not independent of what follows it

        def add_mean(module, args, kwargs):
            embeds = kwargs["inputs_embeds"]
            return args, kwargs | {"inputs_embeds": embeds + embeds.mean(1, keepdim=True)}

        language.register_forward_pre_hook(add_mean, with_kwargs=True)
    return model, processor


REASONS = {
    "state": "layers of linear_attention, which keep a state",
    "positions": "does not count positions from 0",
    "no cache": "its cache keeps something else",
    "looks ahead": r"log-probs of a response differ by [\d.]+ nats on average",
}


@pytest.mark.parametrize("kind", REASONS)
def test_where_a_cache_is_not_exact_plain_passes_are_made_and_said_once(kind, caplog):
    model, processor = spoiled(kind)
    rollouts = make_rollouts(processor, groups=1)
    plain = Scorer(model, processor, rollouts.options, share_prefixes=False).score(*arguments(rollouts))
    scorer = Scorer(model, processor, rollouts.options)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            scored = scorer.score(*arguments(rollouts))
            assert_close(scored.log_probs, plain.log_probs)
            assert scored.work == plain.work
    (message,) = warnings_of(caplog)
    assert message.startswith("prefixes are not shared: ")
    assert message.endswith("; every view takes plain passes")
    with pytest.raises(ValueError, match=f"share_prefixes=True, but prefixes are not shared: .*{REASONS[kind]}"):
        Scorer(model, processor, rollouts.options, share_prefixes=True).score(*arguments(rollouts))


def test_sharded_weights_take_plain_passes():
    """Ranks would make different numbers of passes, and wait for one another forever."""
    model, processor = make_model("llava")
    model.lm_head.weight.ds_id = 0
    assert "its weights are sharded" in problem_of_model(policy_of(model, processor))


def test_a_prompt_that_ends_in_its_image_takes_a_plain_pass():
    model, processor = model_of("gemma3")
    policy = policy_of(model, processor)
    image = model.config.image_token_id
    (prompt,), _ = encode_prompts(["ab"], None, processor=processor, config=model.config, takes=policy.takes)
    assert problem_of_prompt(policy, prompt) is None
    assert "ends in an image" in problem_of_prompt(policy, prompt._replace(token_ids=torch.tensor([5, image])))
    assert "one token" in problem_of_prompt(policy, prompt._replace(token_ids=torch.tensor([5])))


@pytest.mark.parametrize("share", ["auto", True])
def test_one_prompt_that_cannot_be_shared_leaves_the_others_shared(share, caplog):
    model, processor = model_of("llava")
    rollouts = make_rollouts(processor, groups=2, size=2, images=lambda group: 0, malformed=False)
    short = EncodedPrompt(torch.tensor([40]), {}, {}, 0)
    long = EncodedPrompt(torch.tensor([41, 42, 43]), {}, {}, 0)
    given = ([short, short, long, long], None, rollouts.batch, rollouts.planned)
    plain = Scorer(model, processor, rollouts.options, share_prefixes=False).score(*given)
    scorer = Scorer(model, processor, rollouts.options, share_prefixes=share)
    if share is True:
        with pytest.raises(ValueError, match="share_prefixes=True, but .* a prompt of one token has no prefix"):
            scorer.score(*given)
        return
    scored = scorer.score(*given)
    assert_close(scored.log_probs, plain.log_probs)
    assert plain.work["original"].model_tokens - scored.work["original"].model_tokens == 2  # of one of the long ones
    (message,) = warnings_of(caplog)
    assert message == "prefixes are not shared: a prompt of one token has no prefix; its views take plain passes"


# Pure functions


def test_longest_common_prefix_is_that_of_a_loop():
    g = torch.Generator().manual_seed(0)
    rows, lengths = torch.randint(2, (40, 6), generator=g), torch.randint(0, 7, (40,), generator=g)
    for size in (0, 1, 4, 9):
        tokens = torch.randint(2, (size,), generator=g)
        expected = []
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            count = 0
            while count < min(size, length) and row[count] == tokens[count]:
                count += 1
            expected.append(count)
        assert longest_common_prefix(tokens, rows, lengths).tolist() == expected


def test_merged_stores_hold_the_rows_of_all_padded_to_the_longest():
    def store(rows, time, value):
        layer = (torch.full((rows, 2, time, 3), value), torch.full((rows, 2, time, 3), -value))
        return Store([layer], torch.full((rows, time), int(value)), torch.full((rows,), time))

    assert merged([]) is None
    assert merged([one := store(1, 2, 1.0)]) is one
    both = merged([store(1, 2, 1.0), store(2, 4, 2.0)])
    assert both is not None
    assert both.token_ids.tolist() == [[1, 1, 0, 0], [2, 2, 2, 2], [2, 2, 2, 2]]
    assert both.lengths.tolist() == [2, 4, 4]
    keys, values = both.layers[0]
    assert keys.shape == (3, 2, 4, 3)
    assert keys[0, 0, :, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert values[1, 1, :, 2].tolist() == [-2.0] * 4
