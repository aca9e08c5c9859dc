"""Options as flat fields, from code, YAML and the command line; and what is refused, when and with which words."""

import dataclasses
import logging
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from srpo_trl import SRPOConfig, SRPOMixin, SRPOTrainer
from training import Rollouts, make_dataset, make_trainer, rollout_batch, watching
from trl import GRPOConfig, TrlParser

import srpo_core
from srpo_core import options
from srpo_core.options import adapter_options
from srpo_core.rollouts import RecordingOptions, read_rollouts

CORE = {f"srpo_{name}": field for name, field in adapter_options().items()}
OURS = {f"srpo_{field.name}" for field in dataclasses.fields(RecordingOptions)}  # they only record
AS_LISTS = {"srpo_perception_tags", "srpo_reasoning_tags", "srpo_answer_tags"}
OR_A_FUNCTION = {"srpo_baseline": options.Baseline, "srpo_weight_map": options.WeightMap}


def flat_fields():
    return {field.name: field for field in dataclasses.fields(SRPOConfig) if field.name.startswith("srpo_")}


def test_fields_are_exactly_the_options_that_the_core_offers_to_adapters():
    assert set(flat_fields()) - OURS == set(CORE)
    trl = {field.name for field in dataclasses.fields(GRPOConfig)}
    assert {field.name for field in dataclasses.fields(SRPOConfig)} == trl | set(CORE) | OURS


def test_helps_and_defaults_are_those_of_the_core(tmp_path):
    for name, field in flat_fields().items():
        assert set(field.metadata) == {"help"}, name  # the parser gives all metadata to argparse
        if name not in OURS:
            assert field.metadata["help"] == CORE[name].metadata["help"]
            default = list(CORE[name].default) if name in AS_LISTS else CORE[name].default
            assert (field.default_factory() if name in AS_LISTS else field.default) == default, name
    assert SRPOConfig(str(tmp_path), use_cpu=True).srpo_options() == srpo_core.SRPOConfig()


def test_types_are_those_of_the_core_as_far_as_a_command_line_can_write_them():
    ours, core = get_type_hints(SRPOConfig), get_type_hints(srpo_core.SRPOConfig)
    for name in CORE:
        expected = list[str] if name in AS_LISTS else OR_A_FUNCTION.get(name, core[name.removeprefix("srpo_")])
        assert ours[name] == expected, name


def test_two_configs_share_no_list(tmp_path):
    one, other = (SRPOConfig(str(tmp_path), use_cpu=True) for _ in range(2))
    one.srpo_perception_tags[0] = "<see>"
    assert other.srpo_perception_tags[0] == "<perception>"


def not_the_default(name, hint):
    """A value that is not the default of an option, in the words of a command line."""
    if name in AS_LISTS:
        return [f"<{name}>", f"</{name}>"]
    if get_origin(hint) is Literal:
        return [next(choice for choice in get_args(hint) if choice != CORE[name].default)]
    if hint is str:
        return ["vision-sr1"]
    return ["3"] if hint is int else ["0.25"]


# Some options are read only under one value of another one, or only beside it.
BESIDE = {"srpo_reliance_mode": {"srpo_reliance_spans": 2}, "srpo_scale_decay": {"srpo_scale": "ema_rms"}}


@pytest.mark.parametrize("source", ["command line", "yaml"])
@pytest.mark.parametrize("name", CORE)
def test_every_field_is_read(tmp_path, name, source):
    written = not_the_default(name, get_type_hints(SRPOConfig)[name])
    values = {"output_dir": str(tmp_path), "use_cpu": True, **BESIDE.get(name, {})}
    if source == "yaml":
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(values | {name: written if name in AS_LISTS else yaml.safe_load(written[0])}))
        arguments = ["--config", str(file)]
    else:
        arguments = [word for key, value in values.items() for word in (f"--{key}", str(value))] + [
            f"--{name}",
            *written,
        ]
    (config,) = TrlParser(SRPOConfig).parse_args_and_config(arguments)
    found = getattr(config.srpo_options(), name.removeprefix("srpo_"))
    assert found != CORE[name].default
    assert [str(part) for part in (found if name in AS_LISTS else [found])] == written


def test_what_is_recorded_is_read_from_the_command_line(tmp_path):
    assert {"srpo_rollouts", "srpo_correct", "srpo_metrics", "srpo_summary"} == OURS
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    (config,) = TrlParser(SRPOConfig).parse_args_and_config(arguments)
    assert config.srpo_recording() == RecordingOptions()
    arguments += ["--srpo_metrics", "all", "--srpo_summary", "false", "--srpo_rollouts", "a.jsonl"]
    (config,) = TrlParser(SRPOConfig).parse_args_and_config([*arguments, "--srpo_correct", ">=1"])
    assert config.srpo_recording() == RecordingOptions(metrics="all", summary=False, rollouts="a.jsonl", correct=">=1")


def test_answers_may_have_no_tags(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nsrpo_answer_tags: []\n")
    (config,) = TrlParser(SRPOConfig).parse_args_and_config(["--config", str(file)])
    assert config.srpo_options().tags.answer is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"srpo_corruption": "blurr"}, "^srpo_corruption must be one of 'patch_mask', 'black'"),
        ({"srpo_corruption_amount": 1.5}, r"^srpo_corruption_amount of kind 'patch_mask' must be in \(0, 1\]"),
        ({"srpo_strength": -1.0}, "^srpo_strength must be at least 0"),
        ({"srpo_counterfactual": "replace"}, "^srpo_counterfactual must be one of 'swap', 'drop', 'mask'"),
        ({"srpo_perception_tags": ["<see>"]}, "^srpo_perception_tags must be"),
        ({"srpo_perception_tags": ["<think>", "</see>"]}, "each tag must mean one thing"),
        ({"srpo_mix": 2.0}, "^srpo_mix must be in"),
        ({"srpo_metrics": "few"}, "^srpo_metrics must be one of 'main', 'all', got 'few'"),
        ({"srpo_bound": 0.5, "srpo_weight_map": "sigmoid"}, "only srpo_weight_map 'exp_tanh' or .* reads it"),
        ({"srpo_reliance_spans": -1}, "^srpo_reliance_spans must be at least 0, got -1"),
        ({"srpo_reliance_spans": 1.5}, "^srpo_reliance_spans must be a whole number at least 0, got 1.5"),
        ({"srpo_reliance_spans": 2, "srpo_reliance_mode": "sum"}, "^srpo_reliance_mode must be one of 'product'"),
        # What the core can do, and TRL cannot.
        ({"srpo_reliance_mode": "share"}, "srpo_reliance_spans=0 measures none: set srpo_reliance_spans"),
        ({"srpo_visual_score": "full_kl"}, "^srpo_visual_score='full_kl' compares full distributions"),
        ({"srpo_consistency_score": "jsd"}, "^srpo_consistency_score='jsd' compares full distributions"),
        ({"importance_sampling_level": "sequence"}, "set importance_sampling_level='token'"),
    ],
)
def test_a_wrong_option_is_refused_when_the_config_is_made(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SRPOConfig(str(tmp_path), use_cpu=True, **options)


def test_trls_own_config_is_refused():
    class Wrong(SRPOTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs | {"args": GRPOConfig("x", use_cpu=True, per_device_train_batch_size=8)})

    with pytest.raises(TypeError, match=r"args must be a srpo_trl\.SRPOConfig, got GRPOConfig"):
        make_trainer(Wrong)


def test_liger_is_refused_below_trl_1_14(monkeypatch):
    monkeypatch.setattr("srpo_trl.upstream.version", lambda name: "1.13.0")
    with pytest.raises(ValueError, match="use_liger_kernel=True takes one advantage per response"):
        make_trainer(use_liger_kernel=True)


def test_rows_with_and_without_images_are_refused_by_name():
    with_images, without = make_dataset(2), make_dataset(2, images_per_row=lambda row: 0)
    rows = [with_images[0]] * 4 + [without[0]] * 4
    trainer = make_trainer(per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=r"rows \[4, 5, 6, 7\] of a generation batch have no image"):
        rollout_batch(trainer, rows)


class Untagged(Rollouts):
    def draw(self, rows, tokenizer):
        self.calls += 1
        return [[*tokenizer(f"no tags {row}")["input_ids"], tokenizer.eos_token_id] for row in range(rows)]


def test_responses_without_tags_that_nobody_asked_for_are_refused_at_the_first_batch():
    with pytest.raises(ValueError, match="no response of the first batch has the structure <perception>"):
        rollout_batch(make_trainer(rollouts=Untagged()))


def test_responses_without_tags_train_as_grpo_where_the_prompt_asks_for_them(caplog):
    question = "Describe what you see between <perception> and </perception>."
    dataset = make_dataset().map(lambda row: {"prompt": [{"role": "user", "content": question}]})
    with caplog.at_level(logging.WARNING, logger="srpo_core"):
        batch = rollout_batch(make_trainer(rollouts=Untagged(), dataset=dataset))
    assert batch["advantages"].ndim == 2
    assert "0 of 4 responses have the structure <perception>...</perception>" in caplog.text
    rollout_batch(make_trainer(rollouts=Untagged(), srpo_strength=0.0))  # a baseline run is never refused


def test_responses_begin_inside_the_block_that_a_template_opens(tmp_path):
    class Opened(Rollouts):
        def __call__(self, prompts, trainer):
            output = super().__call__(prompts, trainer)
            opening = [ids[0] for ids in output["completion_ids"]]
            assert len(set(opening)) == 1  # <perception>, an added token
            return output | {
                "prompt_ids": [[*ids, opening[0]] for ids in output["prompt_ids"]],
                "completion_ids": [ids[1:] for ids in output["completion_ids"]],
                "logprobs": [row[1:] for row in output["logprobs"]],
            }

    dataset, path = make_dataset(images_per_row=lambda row: 0), tmp_path / "rollouts.jsonl"
    with watching() as found:
        rollout_batch(make_trainer(rollouts=Opened(), dataset=dataset, srpo_rollouts=str(path)))
        rollout_batch(make_trainer(rollouts=Rollouts(), dataset=dataset))
    opened, whole = (made.batch for made in found)
    assert opened.open_at_start.tolist() == [1] * 4
    assert whole.open_at_start.tolist() == [0] * 4
    assert opened.segmentation.broken.tolist() == [0] * 4
    # The same responses without their first token have the same roles without the first one.
    assert torch.equal(opened.segmentation.roles, whole.segmentation.roles[:, 1:])
    assert {line.open_at_start for line in read_rollouts(path)} == {"perception"}


def test_other_image_with_one_prompt_is_refused_at_the_first_batch_and_counted_later():
    with pytest.raises(ValueError, match="corruption='other_image' left all 4 images of the first batch as they were"):
        rollout_batch(make_trainer(srpo_corruption="other_image"))
    trainer, rows = make_trainer(srpo_corruption="other_image", per_device_train_batch_size=8), make_dataset(2)
    for prompts in ([0, 1], [0, 0]):
        assert torch.isfinite(
            rollout_batch(trainer, [rows[row] for row in prompts for _ in range(4)])["advantages"]
        ).all()
    assert trainer._metrics["train"]["srpo/corruption/unchanged"] == [0.0, 1.0]


def test_without_arguments_the_config_is_srpos_default(monkeypatch, tmp_path):
    @dataclasses.dataclass
    class OnCPU(SRPOConfig):
        use_cpu: bool = True

    class Parent:
        _generate_and_score_completions = _get_per_token_logps_and_entropies = _compute_loss = print

        def __init__(self, model, reward_funcs, args):
            raise StopIteration(args)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("srpo_trl.trainer.SRPOConfig", OnCPU)
    with pytest.raises(StopIteration) as made:
        type("Trainer", (SRPOMixin, Parent), {})("somebody/model", print)
    assert isinstance(made.value.value, OnCPU)
    assert made.value.value.output_dir == "model-SRPO"
