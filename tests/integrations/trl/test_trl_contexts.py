"""Scores of both contexts, in seven families, against responses rebuilt by hand and scored alone, without padding."""

import functools
import importlib
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from srpo_trl.contexts import contexts_of, prompt_ids_of
from srpo_trl.trainer import MASK_IS_REMOVAL
from tiny_vlm import FAMILIES, make_image
from training import Rollouts, make_dataset, make_trainer, rollout_batch, watching

from srpo_core import CreditOptions, Role, SRPOConfig, corrupt_pixel_values, srpo_advantages
from srpo_core.reliance import span_reliance

CORRUPTIONS = ["patch_mask", "black", "gray", "noise", "blur", "pixelate", "patch_shuffle", "other_image", "none"]
TYPES = ("token_type_ids", "mm_token_type_ids")
TOLERANCE = 1e-5  # nats


class Recorded:
    """One generation batch of two prompts with four responses each, and every pass that the core was given of it."""

    def __init__(self, family, *, images_per_row=1, shares=True, **options):
        images = (lambda row: 1 + row % 2) if images_per_row == "1 or 2" else (lambda row: images_per_row)
        dataset = make_dataset(2, images_per_row=images)
        rollouts = Rollouts()
        options |= {"per_device_train_batch_size": 8, "srpo_rollouts": f"{tempfile.mkdtemp()}/rollouts.jsonl"}
        trainer = make_trainer(family=family, dataset=dataset, rollouts=rollouts, **options)
        if not shares:
            trainer._srpo_scorer = None
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
        blank = [not self.tokenizer.decode([token]).strip() for token in self.responses[row]]
        for places in (range(len(roles)), range(len(roles) - 1, -1, -1)):
            is_edge = True  # white space between a tag and the content beside it is no content
            for place in places:
                is_edge = roles[place] == Role.OTHER or (is_edge and blank[place])
                roles[place] = Role.OTHER if is_edge else roles[place]
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

    def prompt(self, row):
        """What TRL's batch says; that it is the same for a group, and another for every other, is tested below."""
        return prompt_ids_of(self.batch)[row].item()

    def corrupt(self, inputs, row, images, kind):
        processor, pixels = self.processor.image_processor, inputs["pixel_values"]
        count = 1 if pixels.ndim == 5 else images
        is_flat = pixels.ndim == 2
        return corrupt_pixel_values(
            pixels,
            prompt_ids=torch.full((count,), self.prompt(row)),
            image_index=torch.arange(count),
            image_grid_thw=inputs.get("image_grid_thw"),
            patch_size=None if is_flat else 14,
            kind=kind,
            image_mean=processor.image_mean,
            image_std=processor.image_std,
        )

    def largest_error(self, log_probs, responses, corruption=None, *, unread=None):
        """Over all tokens but those that nothing reads, of each row: what a donor perceived has no log-prob."""
        errors = []
        for row, response in enumerate(responses):
            difference = (log_probs[row, : len(response)] - self.one_by_one(row, response, corruption)).abs()
            if unread is not None:
                difference = torch.cat([difference[: unread[row].start], difference[unread[row].stop :]])
            errors.append(difference.max())
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
    lent = [recorded.perception(recorded.donor(row)) for row in range(8)]
    swapped = [recorded.with_perception(row, perception) for row, perception in enumerate(lent)]
    unread = [slice(1, 1 + len(perception)) for perception in lent]
    assert recorded.largest_error(recorded.passes[2], swapped, unread=unread) <= TOLERANCE
    assert recorded.largest_error(record(family, shares=False).passes[2], swapped) <= TOLERANCE


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
    in_front = [slice(0, 1)] * 8  # of the perception: what comes before the change is not scored again
    assert recorded.largest_error(recorded.passes[2], dropped, "gray", unread=in_front) <= TOLERANCE
    plain = record(family, srpo_counterfactual="drop", shares=False, **options)
    assert recorded.largest_error(plain.passes[2], dropped, "gray") <= TOLERANCE


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
    assert dropped_error(record(family, srpo_counterfactual="mask", shares=False)) > 100 * TOLERANCE
    # With shared prefixes hidden tokens are left out, which is removal in every family.
    assert dropped_error(record(family, srpo_counterfactual="mask", shares=True)) <= TOLERANCE


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
    trainer._srpo_scorer = None
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


@families
def test_a_prompt_has_one_identity_whatever_its_batch_was_padded_to(family):
    recorded = record(family, images_per_row="1 or 2")  # rows of one image are padded beside those of two
    numbers = prompt_ids_of(recorded.batch).tolist()
    assert [len(set(numbers[row : row + 4])) for row in (0, 4)] == [1, 1]
    assert len(set(numbers)) == 2
    for row in (0, 4):
        images, question = recorded.rows[row]["images"], recorded.rows[row]["prompt"][0]["content"]
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
        text = recorded.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        alone = dict(recorded.processor(images=[images], text=[text], return_tensors="pt"))
        mask = torch.ones_like(alone["input_ids"])
        batch = alone | {"prompt_ids": alone["input_ids"], "prompt_mask": mask, "num_images": [len(images)]}
        assert prompt_ids_of(batch).tolist() == [numbers[row]]


# Whatever tells where an image is reaches the corruption, as transformers' own processors say it


def processor(family, name, **options):
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return getattr(module, f"{name}ImageProcessorPil")(**options)


def picture(height, width):
    pixels = np.random.default_rng(height + width).integers(60, 200, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def changed_pixels(processed, images, facts, *, patch_size=(16, 16), corruption="patch_mask", **more):
    """A batch of TRL with one row for each image, and where its corruption differs."""
    rows = len(images)
    batch = {"prompt_ids": torch.ones(rows, 2).long(), "prompt_mask": torch.ones(rows, 2).long(), **processed, **more}
    config = SimpleNamespace(vision_config={"patch_size": patch_size}, model_type="a test's")
    contexts, counts = contexts_of(
        batch,
        SRPOConfig(corruption=corruption),
        processor=facts,
        model_config=config,
        group_ids=torch.arange(rows),
        step=0,
    )
    return contexts["corrupted"].vision["pixel_values"] != batch["pixel_values"], counts


def test_pixtral_images_are_corrupted_inside_their_sizes():
    images, pixtral = [picture(32, 32), picture(320, 320)], processor("pixtral", "Pixtral")
    processed = pixtral(images=images, return_tensors="pt")
    assert processed["pixel_values"].shape == (2, 3, 320, 320)
    changed, counts = changed_pixels(processed, images, pixtral, num_images=[1, 1])
    patches = changed.any(1).unfold(1, 16, 16).unfold(2, 16, 16).any(-1).any(-1)
    assert patches.sum((1, 2)).tolist() == [2, 240]  # round(0.6 * 4), round(0.6 * 400)
    assert not patches[0, 2:].any()
    assert not patches[0, :, 2:].any()
    assert counts.tolist() == [[1, 0], [1, 0]]


def test_a_prompts_identity_does_not_depend_on_the_canvas_of_its_batch():
    images, pixtral = [picture(32, 32), picture(320, 320)], processor("pixtral", "Pixtral")
    prompts = {"prompt_ids": torch.ones(2, 2).long(), "prompt_mask": torch.ones(2, 2).long()}
    together = prompt_ids_of({**prompts, **pixtral(images=images, return_tensors="pt"), "num_images": [1, 1]})
    alone = pixtral(images=images[:1], return_tensors="pt")
    assert alone["pixel_values"].shape == (1, 3, 32, 32)
    one = {name: value[:1] for name, value in prompts.items()}
    assert prompt_ids_of({**one, **alone, "num_images": [1]}).tolist() == together[:1].tolist()
    assert together[0] != together[1]


def test_idefics_images_are_corrupted_inside_their_masks_and_rows_without_images_have_none():
    images = [[picture(32, 32)], [], [picture(32, 64)]]
    idefics = processor(
        "idefics2", "Idefics2", size={"shortest_edge": 32, "longest_edge": 64}, do_image_splitting=False
    )
    processed = idefics(images=images, return_tensors="pt")
    assert processed["pixel_values"].shape == (3, 1, 3, 32, 64)
    changed, counts = changed_pixels(processed, images, idefics, num_images=[1, 0, 1], corruption="black")
    assert torch.equal(changed.any(2), processed["pixel_attention_mask"].bool())
    assert counts.tolist() == [[1, 0], [0, 0], [1, 0]]


def test_padded_patches_are_left_out_of_the_corruption():
    images, siglip = [picture(60, 100), picture(32, 32)], processor("siglip2", "Siglip2")
    processed = siglip(images=images, return_tensors="pt")
    changed, counts = changed_pixels(processed, images, siglip, corruption="black", num_images=[1, 1], num_tiles=[1, 1])
    assert torch.equal(changed.any(2), processed["pixel_attention_mask"].bool())
    assert counts.tolist() == [[1, 0], [1, 0]]


def test_a_patch_size_may_be_a_pair_and_the_config_without_one():
    images, clip = [picture(224, 224)], processor("clip", "CLIP")
    processed = clip(images=images, return_tensors="pt")
    expected, _ = changed_pixels(processed, images, clip, patch_size=14)
    for form in ((14, 14), [14, 14], {"height": 14, "width": 14}, None):
        assert torch.equal(changed_pixels(processed, images, clip, patch_size=form)[0], expected)


def test_videos_and_unknown_pixels_are_refused():
    images, clip = [picture(28, 28)], processor("clip", "CLIP")
    processed = clip(images=images, return_tensors="pt")
    for name in ("pixel_values_videos", "high_res_pixel_values"):
        with pytest.raises(ValueError, match=f"^{name}"):
            changed_pixels(processed, images, clip, **{name: processed["pixel_values"]})
