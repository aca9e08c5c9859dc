"""Scores of both contexts, in seven families, against responses rebuilt by hand and scored alone, without padding."""

import functools

import pytest
import reference
import torch
from srpo_trl.trainer import MASK_IS_REMOVAL
from tiny_vlm import FAMILIES, make_image
from training import Rollouts, make_dataset, make_trainer, rollout_batch, watching

from srpo_core import CreditOptions, Role, corrupt_pixel_values, srpo_advantages
from srpo_core.reliance import span_reliance

CORRUPTIONS = ["patch_mask", "black", "gray", "noise", "blur", "pixelate", "patch_shuffle", "other_image", "none"]
TYPES = ("token_type_ids", "mm_token_type_ids")
TOLERANCE = 1e-5  # nats


class Recorded:
    """One generation batch of two prompts with four responses each, and every pass that the core was given of it."""

    def __init__(self, family, *, images_per_row=1, **options):
        images = (lambda row: 1 + row % 2) if images_per_row == "1 or 2" else (lambda row: images_per_row)
        dataset = make_dataset(2, images_per_row=images)
        rollouts = Rollouts()
        trainer = make_trainer(
            family=family, dataset=dataset, rollouts=rollouts, per_device_train_batch_size=8, **options
        )
        self.rows = [row for row in dataset for _ in range(4)]
        with watching() as made:
            self.batch = rollout_batch(trainer, self.rows)
        _, self.passes, self.advantages, self.credit = made[0]
        self.responses = rollouts.completions
        self.model, self.processor = trainer.model.eval(), trainer.processing_class
        self.tokenizer = self.processor.tokenizer

    def perception(self, row):
        opening, closing = self.tokenizer.convert_tokens_to_ids(["<perception>", "</perception>"])
        response = self.responses[row]
        return response[response.index(opening) + 1 : response.index(closing)]

    def with_perception(self, row, perception):
        start = 1  # after <perception>
        return [*self.responses[row][:start], *perception, *self.responses[row][start + len(self.perception(row)) :]]

    def roles(self, row):
        """Roles of a response's tokens, read off the tags."""
        to_ids, roles, role = self.tokenizer.convert_tokens_to_ids, [], Role.OTHER
        for token in self.responses[row]:
            if token in to_ids(["<perception>", "<think>", "<answer>"]):
                role = Role.PERCEPTION if token == to_ids("<perception>") else Role.REASONING
                roles.append(Role.OTHER)
            elif token in to_ids(["</perception>", "</think>", "</answer>", "<|im_end|>"]):
                role = Role.OTHER
                roles.append(role)
            else:
                roles.append(role)
        return roles

    def donor(self, row):
        """The next row of the same prompt, in cyclic order, that sees something else; then the next of all."""
        others = [(row + step) % 8 for step in range(1, 8)]
        mates = sorted(others, key=lambda other: other // 4 != row // 4)
        return next(other for other in mates if self.perception(other) != self.perception(row))

    @torch.no_grad()
    def one_by_one(self, row, response, corruption=None):
        """Log-probabilities of a response after its own prompt, alone: no padding, no batch, no TRL."""
        images, question = self.rows[row]["images"], self.rows[row]["prompt"][0]["content"]
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = dict(self.processor(images=[images], text=[text], return_tensors="pt"))
        if corruption == "none":
            config = self.model.config
            keep = inputs["input_ids"] != getattr(config, "image_token_id", getattr(config, "image_token_index", None))
            types = {key: inputs[key][keep][None] for key in TYPES if key in inputs}
            inputs = {"input_ids": inputs["input_ids"][keep][None], **types}
        elif corruption is not None:
            inputs["pixel_values"] = self.corrupt(inputs, row, len(images), corruption)
        tail = torch.tensor([response])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for key in TYPES:
            if key in inputs:
                inputs[key] = torch.cat([inputs[key], torch.zeros_like(tail)], 1)
        logits = self.model(**inputs).logits[0, -len(response) - 1 : -1].log_softmax(-1)
        return logits.gather(1, tail[0][:, None])[:, 0]

    def corrupt(self, inputs, row, images, kind):
        processor, pixels = self.processor.image_processor, inputs["pixel_values"]
        count = 1 if pixels.ndim == 5 else images
        is_flat = pixels.ndim == 2
        return corrupt_pixel_values(
            pixels,
            prompt_ids=torch.full((count,), row // 4),
            image_index=torch.arange(count),
            image_grid_thw=inputs.get("image_grid_thw"),
            patch_size=None if is_flat else 14,
            kind=kind,
            image_mean=processor.image_mean,
            image_std=processor.image_std,
        )

    def largest_error(self, log_probs, responses, corruption=None):
        errors = []
        for row, response in enumerate(responses):
            expected = self.one_by_one(row, response, corruption)
            errors.append((log_probs[row, : len(response)] - expected).abs().max())
        return torch.stack(errors).max().item()


@functools.cache
def record(family, **options):
    return Recorded(family, **options)


families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_own_and_corrupted_scores_match_one_by_one_scoring(family):
    recorded = record(family)
    own, corrupted, _ = recorded.passes
    assert recorded.largest_error(own, recorded.responses) <= TOLERANCE
    assert recorded.largest_error(corrupted, recorded.responses, "patch_mask") <= TOLERANCE
    assert (own - corrupted).abs().max() > 0.01


@families
def test_swapped_scores_match_one_by_one_scoring(family):
    recorded = record(family)
    swapped = [recorded.with_perception(row, recorded.perception(recorded.donor(row))) for row in range(8)]
    assert recorded.largest_error(recorded.passes[2], swapped) <= TOLERANCE


@families
def test_dropped_scores_match_one_by_one_scoring(family):
    recorded = record(family, srpo_counterfactual="drop")
    dropped = [recorded.with_perception(row, []) for row in range(8)]
    assert recorded.largest_error(recorded.passes[2], dropped) <= TOLERANCE


@families
def test_dropped_scores_under_the_corrupted_image_match_one_by_one_scoring(family):
    options = {"srpo_counterfactual_image": "corrupted", "srpo_corruption": "gray"}
    recorded = record(family, srpo_counterfactual="drop", **options)
    dropped = [recorded.with_perception(row, []) for row in range(8)]
    assert recorded.largest_error(recorded.passes[2], dropped, "gray") <= TOLERANCE


@families
def test_without_images_scores_match_one_by_one_scoring(family):
    recorded = record(family, srpo_corruption="none")
    assert recorded.largest_error(recorded.passes[1], recorded.responses, "none") <= TOLERANCE


@families
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_every_corruption_moves_perception_scores_and_leaves_the_batch_alone(family, corruption):
    recorded = record(family, srpo_corruption=corruption)
    perception = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor([role == Role.PERCEPTION for role in recorded.roles(row)]) for row in range(8)], batch_first=True
    )
    assert recorded.credit.scores[perception].abs().max() > 0.01
    # The pixels that TRL trains on are those of the processor, row by row.
    assert torch.equal(recorded.batch["pixel_values"], record(family).batch["pixel_values"])
    assert recorded.largest_error(recorded.passes[0], recorded.responses) <= TOLERANCE


@families
def test_weights_are_those_of_the_float64_reference(family):
    """From one-by-one log-probabilities and roles read off the tags, by an implementation with loops."""
    recorded = record(family)
    for row, response in enumerate(recorded.responses):
        roles = recorded.roles(row)
        own = recorded.one_by_one(row, response).double()
        corrupted = recorded.one_by_one(row, response, "patch_mask").double()
        seen = recorded.perception(recorded.donor(row))
        swapped = recorded.one_by_one(row, recorded.with_perception(row, seen)).double()
        tail = len(response) - len(recorded.perception(row)) - 1
        counterfactual = own.clone()
        counterfactual[-tail:] = swapped[-tail:]
        real = [[True] * len(response)]
        visual = reference.scores([own.tolist()], [corrupted.tolist()], [roles], real, Role.PERCEPTION)
        consistency = reference.scores([own.tolist()], [counterfactual.tolist()], [roles], real, Role.REASONING)
        scores = [[sum(pair) for pair in zip(visual[0], consistency[0], strict=True)]]
        expected = torch.tensor(reference.weights(scores, [roles], real)[0])
        weights = recorded.credit.weights[row]
        assert (weights[: len(response)] - expected).abs().max() < 1e-4
        assert not weights[len(response) :].any()


@families
@pytest.mark.parametrize(("spans", "mode", "clip"), [(3, "product", 0.1), (7, "share", 5.0)])  # some have fewer than 7
def test_with_reliance_weights_are_the_cores_on_one_by_one_log_probs(family, spans, mode, clip):
    """Each span of the perception taken out by hand; the image is the true one, whatever the counterfactual's is."""
    recorded = record(
        family,
        srpo_reliance_spans=spans,
        srpo_reliance_mode=mode,
        srpo_score_clip=clip,
        srpo_counterfactual_image="corrupted",
    )
    passes = recorded.passes
    assert len(passes) == 3 + spans
    roles = [recorded.roles(row) for row in range(8)]
    numbers = reference.spans(roles, [[True] * len(row) for row in roles], spans)
    own = [recorded.one_by_one(row, response) for row, response in enumerate(recorded.responses)]
    corrupted, counterfactual, without = [], [], [[] for _ in range(spans)]
    for row, response in enumerate(recorded.responses):
        corrupted.append(recorded.one_by_one(row, response, "patch_mask"))
        swapped = recorded.with_perception(row, recorded.perception(recorded.donor(row)))
        tail = len(response) - len(recorded.perception(row)) - 1
        scored = recorded.one_by_one(row, swapped, "patch_mask")
        counterfactual.append(torch.cat([own[row][:-tail], scored[-tail:]]))
        for k in range(spans):
            kept = [t for t in range(len(response)) if numbers[row][t] != k]
            alone = recorded.one_by_one(row, [response[t] for t in kept])
            assert (passes[3 + k][row, : len(kept)] - alone).abs().max() <= TOLERANCE
            carried = own[row].clone()
            first = numbers[row].index(k) if k in numbers[row] else len(response)
            for place, t in enumerate(kept):
                if t > first:
                    carried[t] = alone[place]
            without[k].append(carried)

    def padded(rows):
        return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)

    mask, roles = padded([torch.ones(len(row)) for row in roles]).bool(), padded(roles)
    passes = torch.stack([padded(rows) for rows in without])

    def weights(reliance):
        return srpo_advantages(
            padded(own),
            recorded.advantages,
            roles,
            mask,
            CreditOptions(reliance_mode=mode, score_clip=clip),
            corrupted_log_probs=padded(corrupted),
            counterfactual_log_probs=padded(counterfactual),
            reliance=reliance,
        ).weights

    def reliance(clip):
        return span_reliance(padded(own), roles, mask, without_log_probs=passes, spans=padded(numbers), clip=clip)

    expected = weights(reliance(clip))
    assert (recorded.credit.weights - expected).abs().max() < 1e-4
    for wrong in (None, reliance(0.02)):
        assert (expected - weights(wrong)).abs().max() > 0.01


def dropped_error(recorded):
    """How far masked scores are from dropped ones, after the perception."""
    errors = []
    for row, response in enumerate(recorded.responses):
        dropped = recorded.one_by_one(row, recorded.with_perception(row, []))
        # The closing tag is predicted from a hidden token, so it differs; it is never weighted.
        tail, end = len(response) - len(recorded.perception(row)) - 2, len(response)
        errors.append((recorded.passes[2][row, end - tail : end] - dropped[-tail:]).abs().max())
    return max(errors)


@pytest.mark.parametrize("family", sorted(MASK_IS_REMOVAL & set(FAMILIES)))
def test_masked_scores_are_dropped_scores_where_masking_is_allowed(family):
    assert dropped_error(record(family, srpo_counterfactual="mask")) <= TOLERANCE


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - MASK_IS_REMOVAL))
def test_masking_is_refused_where_it_is_not_removal(family, monkeypatch):
    with pytest.raises(ValueError, match=f"srpo_counterfactual='mask' is exact only for .*{family} would"):
        make_trainer(family=family, srpo_counterfactual="mask")
    monkeypatch.setattr("srpo_trl.trainer.MASK_IS_REMOVAL", {family})  # past the check: it would have been wrong
    assert dropped_error(record(family, srpo_counterfactual="mask")) > 100 * TOLERANCE


@families
def test_rows_with_several_images_match_one_by_one_scoring(family):
    recorded = record(family, images_per_row="1 or 2")
    own, corrupted, _ = recorded.passes
    assert recorded.largest_error(own, recorded.responses) <= TOLERANCE
    assert recorded.largest_error(corrupted, recorded.responses, "patch_mask") <= TOLERANCE
    recorded = record(family, images_per_row="1 or 2", srpo_counterfactual="drop")
    dropped = [recorded.with_perception(row, []) for row in range(8)]
    assert recorded.largest_error(recorded.passes[2], dropped) <= TOLERANCE


def test_text_only_batches_have_perception_scores_of_zero_and_one_pass_less():
    trainer = make_trainer(dataset=make_dataset(images_per_row=lambda row: 0))
    with watching() as made:
        rollout_batch(trainer)
    batch, passes, _, credit = made[0]
    assert len(passes) == 2
    roles = batch.segmentation.roles
    assert (roles == Role.PERCEPTION).any()
    assert not credit.scores[roles == Role.PERCEPTION].any()
    assert credit.scores[roles == Role.REASONING].any()


def test_images_of_one_prompt_are_corrupted_differently_and_those_of_its_rollouts_alike():
    image = make_image(0)
    dataset = make_dataset(2, images_per_row=lambda row: 2).map(lambda row: {"images": [image, image]})
    trainer = make_trainer(dataset=dataset, per_device_train_batch_size=8, srpo_corruption="noise")
    score, seen = trainer._get_per_token_logps_and_entropies, []
    trainer._get_per_token_logps_and_entropies = lambda *args, **vision: (
        seen.append(vision["pixel_values"].view(16, 16, -1)) or score(*args, **vision)
    )
    rollout_batch(trainer)
    original, corrupted, counterfactual = seen
    assert torch.equal(original, counterfactual)
    assert not torch.equal(original, corrupted)
    assert torch.equal(corrupted[0], corrupted[2])  # the first image of two rollouts of a prompt
    assert not torch.equal(corrupted[0], corrupted[1])  # the same image as the second of that prompt
    assert not torch.equal(corrupted[0], corrupted[8])  # and of another prompt
