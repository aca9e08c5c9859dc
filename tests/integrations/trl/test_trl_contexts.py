"""Scores of both contexts, in seven families, against responses rebuilt by hand and scored alone, without padding."""

import dataclasses

import pytest
import reference
import torch
from srpo_trl.trainer import MASK_IS_REMOVAL
from tiny_vlm import FAMILIES, make_image
from training import Rollouts, make_dataset, make_trainer, rollout_batch

from srpo_core import Role, corrupt_pixel_values, span_use, srpo_advantages

CORRUPTIONS = ["patch_mask", "black", "gray", "noise", "blur", "pixelate", "patch_shuffle", "other_image", "none"]
TYPES = ("token_type_ids", "mm_token_type_ids")
TOLERANCE = 1e-5  # nats


class Recorded:
    """One generation batch of two prompts with four responses each, and every pass of the hook over it."""

    def __init__(self, family, images_per_row=lambda row: 1, **options):
        options = {"per_device_train_batch_size": 8, "srpo_corruption_strength": None} | options
        self.dataset = make_dataset(2, images_per_row=images_per_row)
        self.trainer = make_trainer(family=family, dataset=self.dataset, **options)
        self.again()

    def again(self, **srpo):
        trainer = self.trainer
        trainer._srpo = dataclasses.replace(trainer._srpo, **srpo)
        trainer.rollout_func = Rollouts()
        self.passes, self.credits = [], []
        score = type(trainer)._srpo_log_probs.__get__(trainer)
        trainer._srpo_log_probs = lambda *args: self.passes.append(score(*args)) or self.passes[-1]
        trainer._srpo_log = lambda rollouts, credit, *rest: (
            self.credits.append(credit) or setattr(self, "advantages", rollouts.advantages)
        )
        rows = [row for row in self.dataset for _ in range(4)]
        self.batch = rollout_batch(trainer, rows)
        self.rows, self.responses = rows, trainer.rollout_func.completions
        self.tokenizer = trainer.processing_class.tokenizer
        return self

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
        model, processor = self.trainer.model.eval(), self.trainer.processing_class
        images, question = self.rows[row]["images"], self.rows[row]["prompt"][0]["content"]
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = dict(processor(images=[images], text=[text], return_tensors="pt"))
        if corruption == "none":
            config = model.config
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
        logits = model(**inputs).logits[0, -len(response) - 1 : -1].log_softmax(-1)
        return logits.gather(1, tail[0][:, None])[:, 0]

    def corrupt(self, inputs, row, images, kind):
        processor, pixels = self.trainer.processing_class.image_processor, inputs["pixel_values"]
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


@pytest.fixture(scope="module", params=FAMILIES)
def recorded(request):
    return Recorded(request.param)


def test_own_and_corrupted_scores_match_one_by_one_scoring(recorded):
    recorded.again(counterfactual="swap", corruption="patch_mask")
    own, corrupted, _ = recorded.passes
    assert recorded.largest_error(own, recorded.responses) <= TOLERANCE
    assert recorded.largest_error(corrupted, recorded.responses, "patch_mask") <= TOLERANCE
    assert (own - corrupted).abs().max() > 0.01


def test_swapped_scores_match_one_by_one_scoring(recorded):
    recorded.again(counterfactual="swap")
    swapped = [recorded.with_perception(row, recorded.perception(recorded.donor(row))) for row in range(8)]
    assert recorded.largest_error(recorded.passes[2], swapped) <= TOLERANCE


def test_dropped_scores_match_one_by_one_scoring(recorded):
    recorded.again(counterfactual="drop")
    dropped = [recorded.with_perception(row, []) for row in range(8)]
    assert recorded.largest_error(recorded.passes[2], dropped) <= TOLERANCE


def test_dropped_scores_under_the_corrupted_image_match_one_by_one_scoring(recorded):
    recorded.again(counterfactual="drop", counterfactual_image="corrupted", corruption="gray")
    dropped = [recorded.with_perception(row, []) for row in range(8)]
    assert recorded.largest_error(recorded.passes[2], dropped, "gray") <= TOLERANCE
    recorded.again(counterfactual_image="kept", corruption="patch_mask")


def test_without_images_scores_match_one_by_one_scoring(recorded):
    recorded.again(corruption="none")
    assert recorded.largest_error(recorded.passes[1], recorded.responses, "none") <= TOLERANCE
    recorded.again(corruption="patch_mask")


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_every_corruption_moves_perception_scores_and_leaves_the_batch_alone(recorded, corruption):
    recorded.again(corruption=corruption, counterfactual="swap")
    pixels = recorded.batch["pixel_values"].clone()
    scores = recorded.credits[0].visual_dependency
    assert scores.abs().max() > 0.01
    recorded.again(corruption="patch_mask")
    assert torch.equal(pixels, recorded.batch["pixel_values"])


def test_weights_are_those_of_the_float64_reference(recorded):
    """From one-by-one log-probabilities and roles read off the tags, by an implementation with loops."""
    recorded.again(counterfactual="swap", corruption="patch_mask")
    credit = recorded.credits[0]
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
        expected = torch.tensor(reference.weights(visual, consistency, [roles], real)[0])
        assert (credit.weights[row, : len(response)] - expected).abs().max() < 1e-4
        assert not credit.weights[row, len(response) :].any()


@pytest.mark.parametrize(("spans", "use", "clip"), [(3, "product", 0.1), (7, "share", 5.0)])  # some have fewer than 7
def test_with_a_use_score_weights_are_the_cores_on_one_by_one_log_probs(recorded, spans, use, clip):
    """Each span of the perception taken out by hand; the image is the true one, whatever the counterfactual's is."""
    contexts = {"counterfactual": "swap", "corruption": "patch_mask"}
    recorded.again(use_spans=spans, use=use, score_clip=clip, counterfactual_image="corrupted", **contexts)
    credit, passes = recorded.credits[0], recorded.passes
    recorded.again(use_spans=0, use="product", score_clip=5.0, counterfactual_image="kept")
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
    owed = span_use(padded(own), passes, padded(numbers), roles, mask, clip=clip)
    views = (padded(own), padded(corrupted), padded(counterfactual), roles, recorded.advantages, mask)
    expected = srpo_advantages(*views, perception_use=owed, use=use, score_clip=clip).weights
    assert (credit.weights - expected).abs().max() < 1e-4
    for wrong in (None, span_use(padded(own), passes, padded(numbers), roles, mask, clip=0.02)):
        other = srpo_advantages(*views, perception_use=wrong, use=use, score_clip=clip).weights
        assert (expected - other).abs().max() > 0.01


def test_masked_scores_are_dropped_scores_where_masking_is_allowed():
    for family in sorted(MASK_IS_REMOVAL & set(FAMILIES)):
        recorded = Recorded(family, srpo_counterfactual="mask")
        masked = recorded.passes[2]
        for row in range(8):
            dropped = recorded.one_by_one(row, recorded.with_perception(row, []))
            # The closing tag is predicted from a hidden token, so it differs; it is never weighted.
            tail = len(recorded.responses[row]) - len(recorded.perception(row)) - 2
            end = len(recorded.responses[row])
            assert (masked[row, end - tail : end] - dropped[-tail:]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - MASK_IS_REMOVAL))
def test_masking_is_refused_where_it_is_not_removal(family):
    with pytest.raises(ValueError, match=f"srpo_counterfactual='mask' is exact only for .*{family} would"):
        make_trainer(family=family, srpo_counterfactual="mask")
    recorded = Recorded(family)
    recorded.again(counterfactual="mask")  # past the check: it would have been wrong
    errors = []
    for row in range(8):
        dropped = recorded.one_by_one(row, recorded.with_perception(row, []))
        tail, end = len(recorded.responses[row]) - len(recorded.perception(row)) - 2, len(recorded.responses[row])
        errors.append((recorded.passes[2][row, end - tail : end] - dropped[-tail:]).abs().max())
    assert max(errors) > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_several_images_match_one_by_one_scoring(family):
    recorded = Recorded(family, images_per_row=lambda row: 1 + row % 2)
    dropped = [recorded.with_perception(row, []) for row in range(8)]
    own, corrupted, _ = recorded.passes
    assert recorded.largest_error(own, recorded.responses) <= TOLERANCE
    assert recorded.largest_error(corrupted, recorded.responses, "patch_mask") <= TOLERANCE
    recorded.again(counterfactual="drop")
    assert recorded.largest_error(recorded.passes[2], dropped) <= TOLERANCE


def test_text_only_batches_have_perception_scores_of_zero_and_one_pass_less():
    trainer = make_trainer(dataset=make_dataset(images_per_row=lambda row: 0))
    credits, passes = [], []
    score = trainer._srpo_log_probs
    trainer._srpo_log_probs = lambda *args: passes.append(score(*args)) or passes[-1]
    trainer._srpo_log = lambda rollouts, credit, *rest: credits.append(credit)
    rollout_batch(trainer)
    assert len(passes) == 2
    assert not credits[0].visual_dependency.any()
    assert credits[0].perception_consistency.any()


def test_images_of_one_prompt_are_corrupted_differently_and_those_of_its_rollouts_alike():
    image = make_image(0)
    dataset = make_dataset(2, images_per_row=lambda row: 2).map(lambda row: {"images": [image, image]})
    trainer = make_trainer(dataset=dataset, per_device_train_batch_size=8, srpo_corruption="noise")
    contexts = []
    score = trainer._srpo_log_probs
    trainer._srpo_log_probs = lambda context, *rest: contexts.append(context) or score(context, *rest)
    rollout_batch(trainer)
    original, corrupted, counterfactual = (context.vision["pixel_values"].view(16, 16, -1) for context in contexts)
    assert torch.equal(original, counterfactual)
    assert not torch.equal(original, corrupted)
    assert torch.equal(corrupted[0], corrupted[2])  # the first image of two rollouts of a prompt
    assert not torch.equal(corrupted[0], corrupted[1])  # the same image as the second of that prompt
    assert not torch.equal(corrupted[0], corrupted[8])  # and of another prompt
