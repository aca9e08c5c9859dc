"""OpenRLHF's real experience maker and actor with the hook, in this process; Ray's part is played by a list."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import vllm
from openrlhf.models import Actor
from openrlhf.trainer.ppo_utils import experience_maker
from openrlhf.trainer.ppo_utils.experience import make_experience_batch, split_experience_batch
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
from openrlhf.utils import get_tokenizer
from PIL import Image
from srpo_openrlhf import hooks
from srpo_openrlhf.experience import _eos_token_ids, corrupt_inputs
from srpo_openrlhf.options import ENVIRONMENT_VARIABLE, ROLLOUTS_VARIABLE, dump_config
from tiny_models import write_text_model, write_vision_model
from transformers import GenerationConfig
from typer.testing import CliRunner

from srpo_core import (
    Role,
    RoleTags,
    SRPOConfig,
    corrupt_pixel_values,
    perception_spans,
    segment_responses,
    span_use,
    srpo_advantages,
)
from srpo_core.commands import app
from srpo_core.rollouts import read_rollouts
from srpo_core.summaries import CreditOptions, score_rollouts

PROMPTS, SAMPLES = 3, 4
STOCK = {name: vars(RemoteExperienceMaker)[name] for name in hooks.SIGNATURES}


@pytest.fixture(autouse=True)
def _ray_in_process(monkeypatch):
    monkeypatch.setattr(experience_maker, "ray", SimpleNamespace(put=lambda value: value, get=lambda value: value))


@pytest.fixture
def hooked(monkeypatch):
    """Installs the hook for one test, with the given options."""

    def _hooked(config):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, dump_config(config))
        hooks.install()

    for name, method in STOCK.items():
        monkeypatch.setattr(RemoteExperienceMaker, name, method)
    monkeypatch.setattr(experience_maker, "_srpo_is_patched", True, raising=False)
    monkeypatch.delattr(experience_maker, "_srpo_is_patched")
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
        return RemoteExperienceMaker(self, None, None, None, SimpleNamespace(value=0.0), strategy, self.tokenizer)

    # RayActorGroup's part
    def async_run_method_batch(self, method_name, **inputs):
        assert method_name == "forward"
        self.passes += 1
        forward = PolicyModelActor.__ray_metadata__.modified_class.forward
        worker = SimpleNamespace(actor=self.actor, strategy=SimpleNamespace(ring_attn_group=None))
        count = len(inputs["sequences"])
        return [[forward(worker, **{name: values[i] for name, values in inputs.items()}) for i in range(count)]]

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
                prompt_ids=torch.tensor([row // SAMPLES]),
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
    without = [[] for _ in range(config.use_spans)]
    spans = [torch.full((len(ids) - 1,), -1) for ids in sequences]
    for row, (ids, image) in enumerate(zip(sequences, images, strict=True)):
        content = torch.zeros(1, len(ids)).bool()
        content[0, contents[row]] = True
        for k in range(config.use_spans):
            number = perception_spans(content.int() * int(Role.PERCEPTION), content, spans=config.use_spans)[0]
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


def scores_of(setting, samples, monkeypatch, **settings):
    """The maker's experiences and the scores it kept for them."""
    kept = []
    from srpo_openrlhf import experience

    fold = experience.fold_weights
    monkeypatch.setattr(
        experience, "fold_weights", lambda *args, **kwargs: (kept.append(args[2]), fold(*args, **kwargs))[1]
    )
    return made(setting, samples, **settings), kept[0]


def test_the_installed_openrlhf_has_what_the_adapter_hooks():
    hooks.check_signatures(experience_maker)
    assert hasattr(PolicyModelActor.__ray_metadata__.modified_class, "get_checkpoint_states")


@pytest.mark.parametrize("use_spans", [0, 2])
def test_strength_0_leaves_every_tensor_as_it_is(vision, hooked, use_spans):
    stock = made(vision, rollout(vision))
    hooked(SRPOConfig(strength=0.0, use_spans=use_spans))
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
        SRPOConfig(use_spans=2, score_clip=0.1),
        SRPOConfig(use_spans=20, use="share", counterfactual_image="corrupted"),  # more than tokens
    ],
)
def test_log_probs_and_weights_are_those_of_one_response_at_a_time(vision, hooked, monkeypatch, config):
    stock = made(vision, rollout(vision))
    hooked(config)
    ours, scores = scores_of(vision, rollout(vision), monkeypatch)
    alone = one_by_one(vision, rollout(vision), config)

    def error(mine, theirs):
        return torch.where(alone.mask, mine - theirs, 0.0).abs().max().item()

    log_probs = _padded([single.action_log_probs for single in stock])
    corrupted, counterfactual = scores.corrupted_log_probs, scores.counterfactual_log_probs
    log_prob_errors = error(corrupted, alone.corrupted), error(counterfactual, alone.counterfactual)

    advantages = _padded([single.advantages for single in stock])
    per_response = advantages.gather(1, alone.mask.int().argmax(1, keepdim=True)).squeeze(1)
    use = None
    if config.use_spans:
        views = (alone.original, torch.stack(alone.without), alone.spans, alone.roles, alone.mask)
        use = span_use(*views, clip=config.score_clip)
        assert error(scores.perception_use, use) < 1e-4
        assert error(use, torch.ones(())) > 0.1
    weight_errors = []
    for contexts in (log_probs, corrupted, counterfactual), (alone.original, alone.corrupted, alone.counterfactual):
        options = config.advantage_options(step=0)
        used = scores.perception_use if contexts[0] is log_probs else use
        credit = srpo_advantages(
            *contexts,
            alone.roles,
            per_response,
            alone.mask,
            perception_use=used if config.use_spans else None,
            **options,
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
    assert passes(SRPOConfig(use_spans=4)) == 7
    assert passes(SRPOConfig(use_spans=4, strength=0.0)) == 3  # every weight is 1 anyway


def test_packed_text_is_scored_as_one_response_at_a_time(folder, hooked, monkeypatch):
    packed = Setting(folder / "text", packed=True)
    config = SRPOConfig(use_spans=2)
    hooked(config)
    ours, scores = scores_of(packed, rollout(packed), monkeypatch)
    alone = one_by_one(Setting(folder / "text"), rollout(packed), config)
    difference = scores.counterfactual_log_probs - alone.counterfactual
    assert torch.where(alone.mask, difference, 0.0).abs().max() < 1e-5
    # No image, so one more pass and not two, and no score for perceptions that their use could change.
    assert packed.passes == 2
    assert scores.corrupted_log_probs is None
    assert all(single.info["srpo/score/perception/mean"] == 0 for single in ours)
    assert any(single.info["srpo/score/reasoning/mean"] != 0 for single in ours)


def test_tool_outputs_stay_where_they_are(vision, hooked, monkeypatch):
    config = SRPOConfig()
    hooked(config)
    tool_output = "<perception>not sampled</perception>"
    _, scores = scores_of(vision, rollout(vision, tool_output=tool_output), monkeypatch)
    alone = one_by_one(vision, rollout(vision, tool_output=tool_output), config)
    difference = scores.counterfactual_log_probs - alone.counterfactual
    assert torch.where(alone.mask, difference, 0.0).abs().max() < 1e-5
    assert (scores.segmentation.roles == alone.roles)[alone.mask].all()


def test_a_prompt_without_image_has_no_perception_score(vision, hooked):
    hooked(SRPOConfig())
    for row, single in enumerate(made(vision, rollout(vision, images="some"))):
        has_image = row // SAMPLES % 2 == 0
        assert bool(single.info["srpo/corruption/changed"]) == has_image
        if not has_image:
            assert single.info["srpo/score/perception/mean"] == 0


def test_a_response_without_tokens_is_left_alone(vision, hooked):
    samples = rollout(vision)
    samples[5].action_mask.zero_()
    stock = made(vision, [replace(sample, info=dict(sample.info)) for sample in samples])[5]
    hooked(SRPOConfig())
    ours = made(vision, samples)[5]
    assert torch.equal(ours.advantages, stock.advantages)


@pytest.mark.parametrize("micro_batch_size", [1, 5, PROMPTS * SAMPLES])
def test_weights_do_not_depend_on_micro_batches(vision, hooked, micro_batch_size):
    hooked(SRPOConfig(scale="batch_rms", use_spans=2))
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


def test_weighted_advantages_and_metrics_survive_the_way_to_the_actors(vision, hooked):
    hooked(SRPOConfig())
    singles = made(vision, rollout(vision))
    names = [name for name in singles[0].info if name.startswith("srpo/")]
    assert {"srpo/weight/perception/mean", "srpo/score/reasoning/mean", "srpo/broken/nested"} <= set(names)
    batch = make_experience_batch(singles)
    assert batch.advantages.shape == batch.action_mask.shape
    for name in names:
        values = torch.tensor(batch.info[name])
        assert values.shape == (len(singles),), name
        assert values.isfinite().all(), name


def test_advantages_before_experience_are_an_error(vision, hooked):
    hooked(SRPOConfig())
    maker = vision.maker()
    experiences = maker.make_experience_batch(rollout(vision))
    with pytest.raises(RuntimeError, match="before make_experience"):
        maker.compute_advantages_and_returns(experiences)


def test_the_corruption_is_drawn_anew_at_each_step_and_a_resumed_run_goes_on(vision, hooked, monkeypatch):
    hooked(SRPOConfig())
    steps = []
    from srpo_openrlhf import experience

    corrupt = experience.corrupt_inputs
    monkeypatch.setattr(
        experience, "corrupt_inputs", lambda *args, step: (steps.append(step), corrupt(*args, step=step))[1]
    )
    monkeypatch.setattr(Setting, "async_run_method", lambda *_, method_name: [{"global_step": 7}], raising=False)
    maker = vision.maker(ckpt=SimpleNamespace(load_enable=True))
    maker.make_experience_batch(rollout(vision))
    maker.make_experience_batch(rollout(vision))
    vision.maker().make_experience_batch(rollout(vision))
    assert steps == [7, 8, 0]


def test_every_token_that_ends_a_response_is_known(vision, tmp_path):
    tokenizer = vision.text_tokenizer
    GenerationConfig(eos_token_id=[0, 7]).save_pretrained(tmp_path)
    assert set(_eos_token_ids(tokenizer, str(tmp_path))) == {0, 7, tokenizer.eos_token_id}
    assert _eos_token_ids(tokenizer, str(tmp_path / "without")) == (tokenizer.eos_token_id,)


def test_responses_without_tags_are_reported(vision, hooked, monkeypatch):
    warnings = []
    monkeypatch.setattr(experience_maker.logger, "warning", warnings.append)
    hooked(SRPOConfig(tags=RoleTags(perception=("<look>", "</look>"))))
    stock_advantages = [single.advantages for single in made(vision, rollout(vision))]
    assert any("name yours with --srpo.perception_tags" in warning for warning in warnings)
    assert stock_advantages[0].isfinite().all()


def test_only_pixels_are_corrupted_and_a_group_shares_the_draw(vision):
    images = [sample.mm_train_inputs[0] for sample in rollout(vision)]
    before = [inputs["pixel_values"].clone() for inputs in images]
    prompt_ids = torch.arange(len(images)) // SAMPLES
    corrupted = corrupt_inputs(images, prompt_ids, vision.tokenizer.image_processor, SRPOConfig(), step=0)
    for row, (old, new) in enumerate(zip(images, corrupted, strict=True)):
        assert torch.equal(old["pixel_values"], before[row])
        assert not torch.equal(new["pixel_values"], before[row])
        assert new["image_grid_thw"] is old["image_grid_thw"]
        assert new["pixel_values"] is corrupted[row // SAMPLES * SAMPLES]["pixel_values"]


def test_a_corruption_that_changes_nothing_is_an_error(vision):
    images = [sample.mm_train_inputs[0] for sample in rollout(vision)]
    prompt_ids = torch.arange(len(images)) // SAMPLES
    rest = (prompt_ids, vision.tokenizer.image_processor, SRPOConfig(corruption="black"))
    black = corrupt_inputs(images, *rest, step=0)
    with pytest.raises(ValueError, match="--srpo.corruption black changed no image"):
        corrupt_inputs(black, *rest, step=0)


def test_videos_are_refused(vision):
    images = [{"pixel_values_videos": torch.zeros(4, 1176), "video_grid_thw": torch.tensor([[1, 2, 2]])}]
    with pytest.raises(ValueError, match="needs pixel_values and no videos"):
        corrupt_inputs(images, torch.tensor([0]), vision.tokenizer.image_processor, SRPOConfig(), step=0)


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_the_rollouts_are_written_for_the_srpo_command(vision, hooked, monkeypatch, tmp_path, strength):
    path = tmp_path / "rollouts.jsonl"
    monkeypatch.setenv(ROLLOUTS_VARIABLE, str(path))
    stock = made(vision, rollout(vision))
    hooked(SRPOConfig(strength=strength))
    samples = rollout(vision)
    ours, scores = scores_of(vision, samples, monkeypatch)
    written = list(read_rollouts(path))
    assert len(written) == len(ours) == PROMPTS * SAMPLES
    for row, (line, sample, plain, single) in enumerate(zip(written, samples, stock, ours, strict=True)):
        where = single.action_mask.reshape(-1).bool()
        count = int(where.sum())
        assert line.text == vision.text_tokenizer.decode(single.sequences.reshape(-1)[1:][where])
        assert (line.step, line.reward) == (0, sample.rewards.item())
        assert line.prompt == sample.prompts[0]
        assert line.advantage == pytest.approx(plain.advantages.reshape(-1)[where][0].item(), abs=1e-4)
        credit = torch.tensor(line.weights) * line.advantage
        torch.testing.assert_close(credit, single.advantages.reshape(-1)[where].float(), atol=1e-3, rtol=0)
        recorded = torch.tensor(line.counterfactual_log_probs)
        mask = torch.nn.functional.pad(where, (0, scores.counterfactual_log_probs.shape[1] - len(where)))
        torch.testing.assert_close(recorded, scores.counterfactual_log_probs[row][mask], atol=1e-4, rtol=0)
        assert len(recorded) == count
    assert len({line.group for line in written}) == PROMPTS
    # With the options of the run, the recorded log-probs give its weights.
    for scored in score_rollouts(written, CreditOptions(SRPOConfig(strength=strength), recompute=True)):
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


def test_the_next_batch_is_appended(vision, hooked, monkeypatch, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    monkeypatch.setenv(ROLLOUTS_VARIABLE, str(path))
    hooked(SRPOConfig())
    maker = vision.maker()
    for seed in (0, 1):
        maker.make_experience_batch(rollout(vision, seed=seed))
    assert [line.step for line in read_rollouts(path)] == [0] * PROMPTS * SAMPLES + [1] * PROMPTS * SAMPLES
