"""OpenRLHF's real experience maker and actor with the hook, in this process; Ray's part is played by a list."""

import logging
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
import torch
import vllm
from openrlhf.models import Actor, PolicyLoss
from openrlhf.trainer.ppo_utils import NaiveReplayBuffer, experience_maker
from openrlhf.trainer.ppo_utils.experience import (
    balance_experiences,
    make_experience_batch,
    split_experience_batch,
)
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from openrlhf.trainer.ray import ppo_actor
from openrlhf.trainer.ray.launcher import RayActorGroup
from openrlhf.utils import get_tokenizer
from PIL import Image
from srpo_openrlhf import experience, hooks
from srpo_openrlhf.experience import Weighting
from srpo_openrlhf.options import ENVIRONMENT_VARIABLE, OpenRLHFOptions, dump_config
from tiny_models import write_text_model, write_vision_model
from transformers import GenerationConfig
from typer.testing import CliRunner

from srpo_core import Role, SRPOConfig, corrupt_pixel_values, segment_responses, srpo_advantages
from srpo_core.batch import MAIN_METRICS, prompt_id
from srpo_core.cli.app import app
from srpo_core.options import adapter_options
from srpo_core.reliance import perception_spans, span_reliance
from srpo_core.rollouts import ScoringOptions, read_rollouts, score_rollouts

PROMPTS, SAMPLES = 3, 4
STOCK = RemoteExperienceMaker.make_experience_batch


@pytest.fixture(autouse=True)
def _ray_in_process(monkeypatch):
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "get", lambda value: value)


@pytest.fixture
def hooked(monkeypatch):
    """Installs the hook for one test, with the given options."""

    def _hooked(config, **recording):
        options = {name: getattr(config, name) for name in adapter_options()}
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, dump_config(OpenRLHFOptions(**options, **recording)))
        hooks.install()

    monkeypatch.setattr(RemoteExperienceMaker, "make_experience_batch", STOCK)
    monkeypatch.setattr(experience_maker, "_srpo_is_prepared", True, raising=False)
    monkeypatch.delattr(experience_maker, "_srpo_is_prepared")
    return _hooked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_vision_model(folder / "vision")
    write_text_model(folder / "text")
    return folder


class Setting:
    """A model, its tokenizer or processor, and the maker's arguments."""

    def __init__(self, folder, *, packed=False):
        self.path = str(folder)
        self.actor = Actor(self.path, attn_implementation="sdpa", packing_samples=packed).float().eval()
        self.tokenizer = get_tokenizer(self.path, None)
        self.text_tokenizer = self.tokenizer.tokenizer if self.actor.is_vlm else self.tokenizer
        self.passes = 0

    def maker(self, *, micro_batch_size=4, **changes):
        args = SimpleNamespace(
            actor=SimpleNamespace(model_name_or_path=self.path),
            rollout=SimpleNamespace(n_samples_per_prompt=SAMPLES, micro_batch_size=micro_batch_size),
            train=SimpleNamespace(colocate_all=False, colocate_actor_ref=False, dynamic_batch_enable=False),
            ds=SimpleNamespace(ring_attn_size=1, tensor_parallel_size=1),
            algo=SimpleNamespace(
                advantage=SimpleNamespace(estimator="group_norm", gamma=1.0, no_std_norm=False),
                kl=SimpleNamespace(use_loss=False, estimator="k1"),
            ),
            reward=SimpleNamespace(
                clip_range=None, overlong_buffer_len=None, overlong_penalty_factor=1, stop_properly_penalty_coef=None
            ),
            ckpt=SimpleNamespace(load_enable=False),
        )
        for name, value in changes.items():
            setattr(args, name, value)
        strategy = SimpleNamespace(args=args)
        group = Group(self)
        return RemoteExperienceMaker(group, None, None, None, SimpleNamespace(value=0.0), strategy, self.tokenizer)

    def score(self, sequence, images=None):
        """Log-probs of one unpadded sequence without any of OpenRLHF's batching."""
        sequence = sequence[None]
        inputs = {}
        if images:
            inputs = dict(images)
            inputs["mm_token_type_ids"] = (sequence == self.actor._vlm_config.image_token_id).int()
        with torch.no_grad():
            logits = self.actor.model(sequence, attention_mask=torch.ones_like(sequence), **inputs).logits
        log_probs = logits[:, :-1].float().log_softmax(-1)
        return log_probs.gather(2, sequence[:, 1:, None]).squeeze(2)[0]


class Group(RayActorGroup):
    """One actor, in this process."""

    def __init__(self, setting):
        self.setting = setting
        self.buffer = NaiveReplayBuffer(sample_batch_size=4)
        self.fits = 0

    def async_run_method(self, method_name, **inputs):
        if method_name == "get_checkpoint_states":
            return [{"global_step": 7}]
        assert method_name == "fit"
        self.fits += 1
        self.buffer.clear()
        return [{}]

    def async_run_method_batch(self, method_name, **inputs):
        if method_name == "append":
            for batch in inputs["experience"]:
                self.buffer.append(batch)
            return []
        assert method_name == "forward"
        self.setting.passes += 1
        forward = ppo_actor.PolicyModelActor.__ray_metadata__.modified_class.forward
        worker = SimpleNamespace(actor=self.setting.actor, strategy=SimpleNamespace(ring_attn_group=None))
        count = len(inputs["sequences"])
        return [[forward(worker, **{name: values[i] for name, values in inputs.items()}) for i in range(count)]]


@pytest.fixture(scope="module")
def vision(folder):
    return Setting(folder / "vision")


def rollout(setting, *, seed=0, images="all", tool_output=""):
    """What OpenRLHF's generator hands to the maker: single responses, those to one prompt together."""
    draw = random.Random(seed)
    tokenizer = setting.text_tokenizer
    samples = []
    for prompt in range(PROMPTS):
        has_image = setting.actor.is_vlm and (images == "all" or prompt % 2 == 0)
        size = (28 * draw.randint(2, 3), 28 * draw.randint(1, 3))
        image = Image.frombytes("RGB", size, draw.randbytes(size[0] * size[1] * 3)) if has_image else None
        text = "<|vision_start|><|image_pad|><|vision_end|>" * has_image + "What is this?"[prompt:]
        if setting.actor.is_vlm:
            inputs = setting.tokenizer(
                text=[text], images=[image] if has_image else None, add_special_tokens=False, return_tensors="pt"
            )
        else:
            inputs = tokenizer([text], add_special_tokens=False, return_tensors="pt")
        prompt_ids = inputs["input_ids"][0].tolist()
        pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")} if has_image else None
        for _ in range(SAMPLES):
            response = tokenizer.encode(vllm.response_text(draw), add_special_tokens=False)
            tool = tokenizer.encode(tool_output, add_special_tokens=False)
            half = len(response) // 2
            tokens = [*prompt_ids, *response[:half], *tool, *response[half:], tokenizer.eos_token_id, *tool]
            start, middle, end = len(prompt_ids), len(prompt_ids) + half, len(tokens) - len(tool)
            samples.append(
                SamplesGenerator._process_response_into_experience(
                    None,
                    {
                        "prompt": text,
                        "label": "",
                        "observation_tokens": tokens,
                        "action_ranges": [(start, middle), (middle + len(tool), end)],
                        "reward": float(draw.random() < 0.5),
                        "mm_train_inputs": pixels,
                        "rollout_log_probs": None,
                    },
                )
            )
    return samples


def made(setting, samples, **settings):
    """The maker's experiences, one response each, in the order of the rollout."""
    experiences = setting.maker(**settings).make_experience_batch(samples)
    index = [row for experience in experiences for row in experience.index]
    singles = [single for experience in experiences for single in split_experience_batch(experience)]
    return [single for _, single in sorted(zip(index, singles, strict=True), key=lambda pair: pair[0])]


def train(maker, experiences):
    """What ``BasePPOTrainer.train_step`` does with a batch that was made."""
    group = maker.actor_model_group
    group.async_run_method_batch(method_name="append", experience=experiences)
    group.async_run_method(method_name="fit", kl_ctl=0.0)


def length(single):
    return int(single.attention_mask.sum()) - 1


def one_by_one(setting, samples, config):
    """Log-probs of every response in its three contexts, built token by token and scored one at a time, unpadded."""
    tokenizer = setting.text_tokenizer
    sequences = [sample.sequences[0] for sample in samples]
    masks = [sample.action_mask[0].bool() for sample in samples]
    images = [sample.mm_train_inputs[0] for sample in samples]
    segmentations = [
        segment_responses(ids[None, 1:], mask[None], tokenizer) for ids, mask in zip(sequences, masks, strict=True)
    ]
    contents = [  # positions in the sequence of the perception, tags left out
        ((s.roles[0] == Role.PERCEPTION) & ~s.boundary[0]).nonzero().flatten() + 1 for s in segmentations
    ]
    perceptions = [ids[content].tolist() for ids, content in zip(sequences, contents, strict=True)]

    original = [setting.score(ids, image) for ids, image in zip(sequences, images, strict=True)]
    corrupted, counterfactual = [], []
    for row, (ids, image) in enumerate(zip(sequences, images, strict=True)):
        other_image = image
        if image:
            processor = setting.tokenizer.image_processor
            pixels = corrupt_pixel_values(
                image["pixel_values"],
                prompt_ids=torch.tensor([prompt_id(torch.tensor(list(samples[row].prompts[0].encode())), image)]),
                image_grid_thw=image["image_grid_thw"],
                kind=config.corruption,
                image_mean=processor.image_mean,
                image_std=processor.image_std,
                seed=config.seed,
                unchanged="keep",
            )
            other_image = {**image, "pixel_values": pixels}
        corrupted.append(setting.score(ids, other_image))

        content = contents[row].tolist()
        donor = []
        if config.counterfactual == "swap":
            cycle = [(row + step) % len(samples) for step in range(1, len(samples))]
            cycle.sort(key=lambda other: other // SAMPLES != row // SAMPLES)  # mates first
            donor = next((perceptions[o] for o in cycle if perceptions[o] and perceptions[o] != perceptions[row]), None)
        if not content or donor is None:
            counterfactual.append(original[row])
            continue
        before, after = ids[: content[0]], ids[content[-1] + 1 :]
        changed = torch.cat([before, torch.tensor(donor, dtype=ids.dtype), after])
        scored = setting.score(changed, other_image if config.counterfactual_image == "corrupted" else image)
        carried = original[row].clone()
        carried[len(carried) - len(after) :] = scored[len(scored) - len(after) :]
        counterfactual.append(carried)

    # Each span of the perception taken out, under the true image.
    without = [[] for _ in range(config.reliance_spans)]
    spans = [torch.full((len(ids) - 1,), -1) for ids in sequences]
    for row, (ids, image) in enumerate(zip(sequences, images, strict=True)):
        content = torch.zeros(1, len(ids)).bool()
        content[0, contents[row]] = True
        for k in range(config.reliance_spans):
            number = perception_spans(content.int() * int(Role.PERCEPTION), content, spans=config.reliance_spans)[0]
            spans[row] = number[1:]
            carried = original[row].clone()
            if (number == k).any():
                scored = setting.score(ids[number != k], image)
                after = len(ids) - 1 - int((number == k).nonzero().max())
                carried[len(carried) - after :] = scored[len(scored) - after :]
            without[k].append(carried)

    return SimpleNamespace(
        spans=torch.nn.utils.rnn.pad_sequence(spans, batch_first=True, padding_value=-1),
        without=[_padded(rows) for rows in without],
        original=_padded(original),
        corrupted=_padded(corrupted),
        counterfactual=_padded(counterfactual),
        roles=_padded([segmentation.roles[0] for segmentation in segmentations]),
        mask=_padded(masks),
    )


def _padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def credit_of(setting, samples, monkeypatch, **settings):
    """The maker's experiences, the credit that weighted them, the scored batch and the reliance that was measured."""
    kept = {}
    stock = experience.credit

    def credit(batch, planned, scored, options, *, old_log_probs, **rest):
        credited = stock(batch, planned, scored, options, old_log_probs=old_log_probs, **rest)
        kept.update(credit=credited, batch=batch, counts=rest["image_counts"], reliance=None)
        if planned.spans is not None:
            passes = [scored[f"span_{k}"] for k in range(options.reliance_spans)]
            kept["reliance"] = planned.spans.reliance(
                passes, batch.segmentation.roles, batch.mask, original_log_probs=old_log_probs, clip=options.score_clip
            )
        return credited

    monkeypatch.setattr(experience, "credit", credit)
    experiences = made(setting, samples, **settings)
    return experiences, SimpleNamespace(**kept)


def test_the_installed_openrlhf_has_what_the_adapter_relies_on():
    hooks.check_names(experience_maker)
    hooks.check_names(ppo_actor)
    assert set(hooks.NAMES) == {experience_maker.__name__, ppo_actor.__name__, "openrlhf.utils"}


@pytest.mark.parametrize("spans", [0, 2])
def test_strength_0_leaves_every_tensor_as_it_is(vision, hooked, spans):
    stock = made(vision, rollout(vision))
    hooked(SRPOConfig(strength=0.0, reliance_spans=spans))
    ours = made(vision, rollout(vision))
    for one, other in zip(stock, ours, strict=True):
        for name in ("advantages", "returns", "action_log_probs", "sequences", "action_mask"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize(
    "config",
    [
        SRPOConfig(),
        SRPOConfig(counterfactual="drop", baseline="role_balanced"),
        SRPOConfig(counterfactual_image="corrupted", corruption="noise", seed=3, sign="advantage", scale="batch_rms"),
        SRPOConfig(reliance_spans=2, score_clip=0.1),
        SRPOConfig(reliance_spans=20, reliance_mode="share", counterfactual_image="corrupted"),  # more than tokens
    ],
)
def test_log_probs_and_weights_are_those_of_one_response_at_a_time(vision, hooked, monkeypatch, config):
    stock = made(vision, rollout(vision))
    hooked(config)
    ours, kept = credit_of(vision, rollout(vision), monkeypatch)
    alone = one_by_one(vision, rollout(vision), config)

    def error(mine, theirs):
        return torch.where(alone.mask, mine - theirs, 0.0).abs().max().item()

    log_probs = _padded([single.action_log_probs for single in stock])
    corrupted, counterfactual = kept.credit.corrupted_log_probs, kept.credit.counterfactual_log_probs
    log_prob_errors = error(corrupted, alone.corrupted), error(counterfactual, alone.counterfactual)

    advantages = _padded([single.advantages for single in stock])
    per_response = advantages.gather(1, alone.mask.int().argmax(1, keepdim=True)).squeeze(1)
    reliance = None
    if config.reliance_spans:
        reliance = span_reliance(
            alone.original,
            alone.roles,
            alone.mask,
            without_log_probs=torch.stack(alone.without),
            spans=alone.spans,
            clip=config.score_clip,
        )
        assert error(kept.reliance, reliance) < 1e-4
        assert error(reliance, torch.ones(())) > 0.1
    weight_errors = []
    for own, image, text, relied in (
        (log_probs, corrupted, counterfactual, kept.reliance),
        (alone.original, alone.corrupted, alone.counterfactual, reliance),
    ):
        credit = srpo_advantages(
            own,
            per_response,
            alone.roles,
            alone.mask,
            config,
            corrupted_log_probs=image,
            counterfactual_log_probs=text,
            reliance=relied,
        )
        weight_errors.append(error(_padded([single.advantages for single in ours]), advantages * credit.weights))
    print(f"log-probs within {max(log_prob_errors):.1e} nats; weights within {weight_errors}")
    assert max(log_prob_errors) < 1e-5
    assert weight_errors[0] < 1e-6
    assert weight_errors[1] < 1e-5
    assert error(credit.weights, torch.ones(())) > 0.05, "the contrasts are too small to show an error"


def test_no_pass_more_than_is_asked_for(vision, hooked):
    def passes(config, **options):
        before = vision.passes
        hooked(config)
        made(vision, rollout(vision, **options))
        return vision.passes - before

    assert passes(SRPOConfig()) == 3  # OpenRLHF's own, and two
    assert passes(SRPOConfig(reliance_spans=4)) == 7
    assert passes(SRPOConfig(reliance_spans=4, strength=0.0)) == 3  # every weight is 1 anyway


def test_packed_text_is_scored_as_one_response_at_a_time(folder, hooked, monkeypatch):
    packed = Setting(folder / "text", packed=True)
    config = SRPOConfig(reliance_spans=2)
    hooked(config)
    ours, kept = credit_of(packed, rollout(packed), monkeypatch)
    alone = one_by_one(Setting(folder / "text"), rollout(packed), config)
    difference = kept.credit.counterfactual_log_probs - alone.counterfactual
    assert torch.where(alone.mask, difference, 0.0).abs().max() < 1e-5
    # No image, so one more pass and not two, and no scores of perceptions that reliance could change.
    assert packed.passes == 2
    assert kept.credit.corrupted_log_probs is None
    assert all(single.info["srpo/score/perception/mean"] == 0 for single in ours)
    assert any(single.info["srpo/score/reasoning/mean"] != 0 for single in ours)


def test_tool_outputs_stay_where_they_are(vision, hooked, monkeypatch):
    config = SRPOConfig()
    hooked(config)
    tool_output = "<perception>not sampled</perception>"
    _, kept = credit_of(vision, rollout(vision, tool_output=tool_output), monkeypatch)
    alone = one_by_one(vision, rollout(vision, tool_output=tool_output), config)
    difference = kept.credit.counterfactual_log_probs - alone.counterfactual
    assert torch.where(alone.mask, difference, 0.0).abs().max() < 1e-5
    assert (kept.batch.segmentation.roles == alone.roles)[alone.mask].all()


def test_a_prompt_without_image_has_no_perception_score(vision, hooked, monkeypatch):
    hooked(SRPOConfig())
    _, kept = credit_of(vision, rollout(vision, images="some"), monkeypatch)
    perception = torch.where(
        kept.batch.mask & (kept.batch.segmentation.roles == Role.PERCEPTION), kept.credit.scores, 0
    )
    has_image = torch.arange(PROMPTS * SAMPLES) // SAMPLES % 2 == 0
    assert (perception[~has_image] == 0).all()
    assert (perception[has_image] != 0).any()
    assert kept.counts.tolist() == [[int(row), 0] for row in has_image]


def test_a_response_without_tokens_is_left_alone(vision, hooked):
    samples = rollout(vision)
    samples[5].action_mask.zero_()
    stock = made(vision, [replace(sample, info=dict(sample.info)) for sample in samples])[5]
    hooked(SRPOConfig())
    ours = made(vision, samples)[5]
    assert torch.equal(ours.advantages, stock.advantages)


@pytest.mark.parametrize("micro_batch_size", [1, 5, PROMPTS * SAMPLES])
def test_weights_do_not_depend_on_micro_batches(vision, hooked, micro_batch_size):
    hooked(SRPOConfig(scale="batch_rms", reliance_spans=2))
    one = made(vision, rollout(vision))
    other = made(vision, rollout(vision), micro_batch_size=micro_batch_size)
    for left, right in zip(one, other, strict=True):
        time = length(left)
        torch.testing.assert_close(left.advantages[:time], right.advantages[:time], atol=1e-5, rtol=1e-5)


def test_weights_average_to_one_over_the_perception_and_reasoning_of_a_response(vision, hooked):
    stock = made(vision, rollout(vision))
    hooked(SRPOConfig())
    for one, other in zip(stock, made(vision, rollout(vision)), strict=True):
        mask = one.action_mask.bool()
        if one.advantages[mask][0] != 0:
            torch.testing.assert_close(other.advantages[mask].sum(), one.advantages[mask].sum(), rtol=1e-5, atol=1e-5)


def test_weighted_advantages_and_metrics_survive_the_way_into_the_loss(vision, hooked):
    hooked(SRPOConfig())
    samples = rollout(vision)
    group = Group(vision)
    maker = vision.maker()
    experiences = maker.make_experience_batch(samples)
    advantages = {tuple(row.tolist()) for each in experiences for row in each.advantages * each.action_mask}
    group.async_run_method_batch(method_name="append", experience=experiences)
    batch = make_experience_batch(group.buffer.items)
    assert batch.advantages.shape == batch.action_mask.shape
    for row in batch.advantages * batch.action_mask:
        assert any(tuple(row.tolist())[: len(known)] == known[: len(row)] for known in advantages)
    weighted = batch.advantages.clone().requires_grad_()
    PolicyLoss()(batch.action_log_probs, batch.action_log_probs, weighted, batch.action_mask)[0].backward()
    assert (weighted.grad[batch.action_mask.bool()] != 0).all()


def test_the_main_metrics_are_logged_and_said_in_words(vision, hooked, capsys):
    def step(**recording):
        hooked(SRPOConfig(), correct=">=-1e9", **recording)
        (first, *_) = vision.maker().make_experience_batch(rollout(vision))
        return first, [line for line in capsys.readouterr().out.splitlines() if "well-formed" in line]

    first, (line,) = step()
    assert {name for name in first.info if name.startswith("srpo/")} == {f"srpo/{name}" for name in MAIN_METRICS}
    assert line.startswith("step 0: ")
    share = 100 * first.info["srpo/tokens/perception/fraction"][0].item()
    assert f"perception has {share:.0f} % of the tokens" in line
    assert line.split("; ")[-1 if "teach" not in line else -2] == "100 % of the answers are right"
    assert step(summary=False)[1] == []


def test_the_gap_to_the_engine_is_logged_where_the_engine_tells(vision, hooked, monkeypatch):
    hooked(SRPOConfig())
    assert "srpo/engine/gap/mean" not in credit_of(vision, rollout(vision), monkeypatch)[0][0].info
    samples = rollout(vision)
    for sample in samples:
        sample.rollout_log_probs = torch.full(sample.action_mask.shape, -2.0)
    singles, kept = credit_of(vision, samples, monkeypatch)
    own = torch.cat([single.action_log_probs[single.action_mask.bool()] for single in singles])
    assert singles[0].info["srpo/engine/gap/mean"].item() == pytest.approx((own + 2.0).abs().mean().item(), abs=1e-4)
    assert kept.credit.metrics["engine/gap/mean"] > 0.5


def test_the_metrics_are_those_of_the_core_and_average_to_the_value_of_the_batch(vision, hooked, monkeypatch):
    hooked(SRPOConfig(), metrics="all")
    singles, kept = credit_of(vision, rollout(vision), monkeypatch)
    names = {name for name in singles[0].info if name.startswith("srpo/")}
    assert names == {f"srpo/{name}" for name in kept.credit.metrics}
    assert {"srpo/swap/coverage", "srpo/corruption/unchanged", "srpo/advantage/zero", "srpo/broken/nested"} <= names
    batch = make_experience_batch(singles)
    for name in names:
        values = torch.tensor(batch.info[name])
        assert values.shape == (len(singles),), name
        torch.testing.assert_close(values.mean(), kept.credit.metrics[name.removeprefix("srpo/")].float())


@pytest.mark.parametrize("is_balanced", [False, True])
def test_the_weighted_advantages_are_seen_to_reach_the_actors(vision, hooked, is_balanced):
    hooked(SRPOConfig())
    maker = vision.maker(actor=SimpleNamespace(model_name_or_path=vision.path, num_nodes=1, num_gpus_per_node=2))
    group = maker.actor_model_group
    for seed in (0, 1):
        experiences = maker.make_experience_batch(rollout(vision, seed=seed))
        train(maker, balance_experiences(experiences, maker.args) if is_balanced else experiences)
        assert group.fits == seed + 1
        # Watched only until it has arrived.
        assert not {"async_run_method", "async_run_method_batch"} & set(vars(group))


def test_other_advantages_on_their_way_to_the_actors_are_an_error(vision, hooked):
    hooked(SRPOConfig())
    maker = vision.maker()
    experiences = maker.make_experience_batch(rollout(vision))
    for each in experiences:
        each.advantages = each.returns  # what OpenRLHF has without SRPO
    with pytest.raises(RuntimeError, match=r"needs openrlhf>=0.11.2,<0.12, and found .*not those that SRPO weighted"):
        train(maker, experiences)
    assert maker.actor_model_group.fits == 0


def test_training_on_something_else_is_an_error(vision, hooked):
    hooked(SRPOConfig())
    maker = vision.maker()
    maker.make_experience_batch(rollout(vision))
    with pytest.raises(RuntimeError, match=r"needs openrlhf>=0.11.2,<0.12, and found .*went on without"):
        maker.actor_model_group.async_run_method(method_name="fit", kl_ctl=0.0)
    with pytest.raises(RuntimeError, match="went on without"):
        maker.make_experience_batch(rollout(vision, seed=1))


def test_the_corruption_is_drawn_anew_at_each_step_and_a_resumed_run_goes_on(vision, hooked, monkeypatch):
    hooked(SRPOConfig())
    steps = []
    corrupt = experience.corrupt_rows
    monkeypatch.setattr(
        experience,
        "corrupt_rows",
        lambda *args, step, **facts: (steps.append(step), corrupt(*args, step=step, **facts))[1],
    )
    maker = vision.maker(ckpt=SimpleNamespace(load_enable=True))
    train(maker, maker.make_experience_batch(rollout(vision)))
    maker.make_experience_batch(rollout(vision))
    vision.maker().make_experience_batch(rollout(vision))
    assert steps == [7, 8, 0]


def test_every_token_that_ends_a_response_is_known(vision, hooked, monkeypatch, tmp_path):
    hooked(SRPOConfig())
    eos = vision.text_tokenizer.eos_token_id
    GenerationConfig(eos_token_id=[0, 7]).save_pretrained(tmp_path)
    maker = vision.maker(actor=SimpleNamespace(model_name_or_path=str(tmp_path)))
    assert set(Weighting(maker).ending) == {0, 7, eos}
    maker = vision.maker(actor=SimpleNamespace(model_name_or_path=str(tmp_path / "without")))
    # Qwen's tokenizer has a second one, which its generation config would name.
    assert set(Weighting(maker).ending) == {eos, vision.text_tokenizer.convert_tokens_to_ids("<|endoftext|>")}


def test_a_first_batch_without_tags_is_an_error_and_a_later_one_is_not(vision, hooked):
    hooked(SRPOConfig(perception_tags=("<look>", "</look>")))
    maker = vision.maker()
    with pytest.raises(ValueError, match="no response of the first batch has the structure <look>"):
        maker.make_experience_batch(rollout(vision))

    hooked(SRPOConfig())
    maker = vision.maker()
    train(maker, maker.make_experience_batch(rollout(vision)))
    samples = rollout(vision, seed=1)
    for sample in samples:
        sample.sequences[sample.sequences == vision.text_tokenizer.encode("<")[0]] = 0
    (first, *_) = maker.make_experience_batch(samples)
    assert first.info["srpo/structured/fraction"].tolist() == [0.0] * SAMPLES


def test_responses_without_tags_that_the_prompt_asks_for_are_reported(vision, hooked, caplog):
    hooked(SRPOConfig(perception_tags=("<look>", "</look>")))
    samples = rollout(vision)
    for sample in samples:
        sample.prompts = [f"Begin with <look>. {sample.prompts[0]}"]
    with caplog.at_level(logging.WARNING, logger="srpo_core"):
        (single, *_) = made(vision, samples)
    assert "0 of 12 responses have the structure <look>" in caplog.text
    assert single.advantages.isfinite().all()


def test_a_corruption_that_changes_no_image_of_the_first_batch_is_an_error(vision, hooked):
    config = SRPOConfig(corruption="black")
    hooked(config)
    samples = rollout(vision)
    images = [sample.mm_train_inputs[0] for sample in samples]
    black, _ = experience.corrupt_rows(
        images, [0] * len(images), config, experience.image_facts(vision.tokenizer), step=0
    )
    for sample, inputs in zip(samples, black, strict=True):
        sample.mm_train_inputs = [inputs]
    with pytest.raises(ValueError, match=r"corruption='black' left all 12 images of the first batch"):
        made(vision, samples)


@pytest.mark.parametrize("corruption", ["patch_mask", "other_image"])
def test_only_pixels_are_corrupted_and_a_group_shares_the_draw(vision, hooked, monkeypatch, corruption):
    hooked(SRPOConfig(corruption=corruption))
    samples = rollout(vision)
    images = [sample.mm_train_inputs[0] for sample in samples]
    before = [inputs["pixel_values"].clone() for inputs in images]
    seen = []
    corrupt = experience.corrupt_rows
    monkeypatch.setattr(
        experience,
        "corrupt_rows",
        lambda *args, step, **facts: (seen.extend(corrupt(*args, step=step, **facts)), seen)[1],
    )
    made(vision, samples)
    corrupted, counts = seen
    assert counts.tolist() == [[1, 0]] * len(samples)
    for row, (old, new) in enumerate(zip(images, corrupted, strict=True)):
        assert torch.equal(old["pixel_values"], before[row])
        assert not torch.equal(new["pixel_values"], before[row])
        assert new["image_grid_thw"] is old["image_grid_thw"]
        assert torch.equal(new["pixel_values"], corrupted[row // SAMPLES * SAMPLES]["pixel_values"])


@pytest.mark.parametrize("name", ["high_res_pixel_values", "image_patches"])
def test_unknown_pixels_are_refused(vision, hooked, monkeypatch, name):
    hooked(SRPOConfig())
    samples = rollout(vision)
    monkeypatch.setattr(experience, "_by_row", lambda *_: [None, {name: torch.zeros(4, 1176)}])
    with pytest.raises(ValueError, match=f"^{name} seems to hold images, but SRPO corrupts only pixel_values"):
        made(vision, samples)


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_the_rollouts_are_written_for_the_srpo_command(vision, hooked, monkeypatch, tmp_path, strength):
    path = tmp_path / "rollouts.jsonl"
    stock = made(vision, rollout(vision))
    hooked(SRPOConfig(strength=strength), rollouts=str(path), correct=">0.5")
    samples = rollout(vision)
    ours, kept = credit_of(vision, samples, monkeypatch)
    written = list(read_rollouts(path))
    assert len(written) == len(ours) == PROMPTS * SAMPLES
    for row, (line, sample, plain, single) in enumerate(zip(written, samples, stock, ours, strict=True)):
        where = single.action_mask.reshape(-1).bool()
        count = int(where.sum())
        assert line.text == vision.text_tokenizer.decode(single.sequences.reshape(-1)[1:][where])
        assert (line.step, line.reward) == (0, sample.rewards.item())
        assert (line.correct, line.correct_by) == (sample.rewards.item() > 0.5, "reward > 0.5")
        assert line.prompt == sample.prompts[0]
        assert line.advantage == pytest.approx(plain.advantages.reshape(-1)[where][0].item(), abs=1e-4)
        credit = torch.tensor(line.weights) * line.advantage
        torch.testing.assert_close(credit, single.advantages.reshape(-1)[where].float(), atol=1e-3, rtol=0)
        recorded = torch.tensor(line.counterfactual_log_probs)
        carried = kept.credit.counterfactual_log_probs[row]
        mask = torch.nn.functional.pad(where, (0, len(carried) - len(where)))
        torch.testing.assert_close(recorded, carried[mask], atol=1e-4, rtol=0)
        assert len(recorded) == count
        assert line.swapped == bool(kept.credit.donors[row] >= 0)
    assert len({line.group for line in written}) == PROMPTS
    # With the options of the run, the recorded log-probs give its weights.
    for scored in score_rollouts(written, ScoringOptions(SRPOConfig(strength=strength), recompute=True)):
        torch.testing.assert_close(
            torch.as_tensor(scored.weights).float(), torch.tensor(scored.rollout.weights), atol=1e-3, rtol=0
        )
    for arguments in (
        ["report", str(path), "-o", str(tmp_path / "report.html")],
        ["show", str(path), "--index", "1"],
        ["segment", str(path)],
        ["weights", str(path), "--strength", "0.5"],
    ):
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0, (arguments, shown.output)


def test_the_next_batch_is_appended_and_a_resumed_run_writes_nothing_twice(vision, hooked, monkeypatch, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    hooked(SRPOConfig(), rollouts=str(path))

    def steps(maker):
        for seed in (0, 1):
            train(maker, maker.make_experience_batch(rollout(vision, seed=seed)))
        return [line.step for line in read_rollouts(path)][:: PROMPTS * SAMPLES]

    resumed = {"ckpt": SimpleNamespace(load_enable=True)}
    assert steps(vision.maker()) == [0, 1]
    assert steps(vision.maker(**resumed)) == [0, 1, 7, 8]
    assert steps(vision.maker(**resumed)) == [0, 1, 7, 8]
    assert steps(vision.maker()) == [0, 1]


def test_what_a_reward_function_says_beside_the_reward_may_count_as_right(vision, hooked, tmp_path):
    hooked(SRPOConfig(), correct="acc>=0.5", rollouts=str(tmp_path / "rollouts.jsonl"))
    samples = rollout(vision)
    for number, sample in enumerate(samples):
        sample.info["acc"] = torch.tensor([float(number % 3 == 0)])
    (first, *_) = vision.maker().make_experience_batch(samples)
    assert first.info["srpo/right/fraction"][0] == pytest.approx(4 / 12)
    written = list(read_rollouts(tmp_path / "rollouts.jsonl"))
    assert [line.correct for line in written] == [number % 3 == 0 for number in range(12)]
    hooked(SRPOConfig(), correct="acd")
    with pytest.raises(ValueError, match="'acd', which should decide what counts as right.*did you mean 'acc'"):
        vision.maker().make_experience_batch(samples)


def test_responses_begin_inside_the_block_that_a_prompt_opens(vision, hooked, monkeypatch):
    """The prompts' texts say so; the same responses without their opening tag have the roles that they had."""
    seen = []
    monkeypatch.setattr(experience, "plan", lambda batch, *_, **__: seen.append(batch) or 1 / 0)
    hooked(SRPOConfig())
    samples = rollout(vision)
    for sample in samples:
        sample.prompts = [f"{sample.prompts[0]} Answer in <perception>.\nassistant: <think>\n"]
    with pytest.raises(ZeroDivisionError):
        made(vision, samples)
    assert seen[0].open_at_start.tolist() == [2] * 12


def test_a_prompts_group_is_its_own(vision, hooked, tmp_path):
    """Not its place in a batch: the same prompts in another order have the same groups."""
    groups = []
    for number, order in enumerate((1, -1)):
        path = tmp_path / f"{number}.jsonl"
        hooked(SRPOConfig(), rollouts=str(path))
        samples = rollout(vision)
        made(vision, [sample for start in range(0, 12, 4)[::order] for sample in samples[start : start + 4]])
        groups.append({line.prompt: line.group for line in read_rollouts(path)})
    assert groups[0] == groups[1]
    assert len(set(groups[0].values())) == PROMPTS
