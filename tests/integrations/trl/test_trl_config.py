"""Options as flat fields, from code, YAML and the command line; and what is refused, when and with which words."""

import dataclasses
from typing import get_type_hints

import pytest
import torch
from srpo_trl import SRPOConfig, SRPOMixin, SRPOTrainer
from training import Rollouts, make_dataset, make_trainer, rollout_batch
from trl import GRPOConfig, TrlParser

import srpo_core

OURS = {"rollouts"}  # where to write what: not an option of the method
TAGS = {"perception_tags", "reasoning_tags", "answer_tags"}
# What TRL has options of its own for.
TRLS = {"normalization", "epsilon", "surrogate", "clip_low", "clip_high", "dual_clip", "max_ratio"}
TRLS |= {"temperature_positive", "temperature_negative", "kl_coef", "kl_estimator", "reduction"}


def flat_fields():
    return {f.name.removeprefix("srpo_"): f for f in dataclasses.fields(SRPOConfig) if f.name.startswith("srpo_")}


def test_fields_are_those_of_the_core_and_no_others():
    core = {field.name for field in dataclasses.fields(srpo_core.SRPOConfig)}
    assert set(flat_fields()) - TAGS - OURS == core - TRLS - {"tags"}


def test_defaults_and_types_are_those_of_the_core(tmp_path):
    config = SRPOConfig(str(tmp_path), use_cpu=True)
    assert config.srpo_options() == srpo_core.SRPOConfig()
    ours, core = get_type_hints(SRPOConfig), get_type_hints(srpo_core.SRPOConfig)
    for name in set(flat_fields()) - TAGS - OURS - {"visual_score", "consistency_score"}:
        assert ours[f"srpo_{name}"] == core[name], name


def test_every_field_says_what_it_is():
    for name, field in flat_fields().items():
        assert len(field.metadata["help"]) > 10, name


def test_fields_are_read_from_the_command_line(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--srpo_strength", "0.5", "--srpo_corruption", "blur"]
    arguments += ["--srpo_corruption_strength", "4", "--srpo_perception_tags", "<see>", "</see>"]
    arguments += ["--srpo_use_spans", "4", "--srpo_use", "share"]
    (config,) = TrlParser(SRPOConfig).parse_args_and_config(arguments)
    options = config.srpo_options()
    assert (options.strength, options.corruption, options.corruption_strength) == (0.5, "blur", 4.0)
    assert options.tags.perception == ("<see>", "</see>")
    assert (options.use_spans, options.use) == (4, "share")


def test_fields_are_read_from_yaml(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nsrpo_strength: 0\nsrpo_counterfactual: drop\nsrpo_answer_tags: []\n"
        "srpo_mix_warmup_steps: 10\n"
    )
    (config,) = TrlParser(SRPOConfig).parse_args_and_config(["--config", str(file)])
    options = config.srpo_options()
    assert (options.strength, options.counterfactual, options.mix_warmup_steps) == (0, "drop", 10)
    assert options.tags.answer is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"srpo_corruption": "blurr"}, "corruption must be one of 'patch_mask', 'black'"),
        ({"srpo_corruption_strength": 1.5}, r"strength of kind='patch_mask' must be in \(0, 1\]"),
        ({"srpo_strength": -1.0}, "strength must be in"),
        ({"srpo_counterfactual": "replace"}, "counterfactual must be one of 'swap', 'drop', 'mask'"),
        ({"srpo_visual_score": "full_kl"}, "srpo_visual_score must be one of .* got 'full_kl': TRL returns"),
        ({"srpo_perception_tags": ["<see>"]}, "perception must be two non-empty strings"),
        ({"srpo_perception_tags": ["<think>", "</see>"]}, "each tag must mean one thing"),
        ({"importance_sampling_level": "sequence"}, "set importance_sampling_level='token'"),
        ({"srpo_mix": 2.0}, "mix must be in"),
        ({"srpo_use_spans": -1}, "use_spans must be a whole number of at least 0, got -1; pass 0 for no use score"),
        ({"srpo_use_spans": 1.5}, "use_spans must be a whole number of at least 0, got 1.5"),
        ({"srpo_use_spans": 2, "srpo_use": "sum"}, "use must be one of 'product', 'share', got 'sum'"),
        ({"srpo_use": "share"}, "srpo_use_spans=0 makes none: set srpo_use_spans to the number of spans"),
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
    monkeypatch.setattr("srpo_trl.trainer.version", lambda name: "1.13.0")
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


def test_responses_without_tags_train_as_grpo_where_the_prompt_asks_for_them():
    question = "Describe what you see between <perception> and </perception>."
    dataset = make_dataset().map(lambda row: {"prompt": [{"role": "user", "content": question}]})
    batch = rollout_batch(make_trainer(rollouts=Untagged(), dataset=dataset))
    assert batch["advantages"].ndim == 2
    rollout_batch(make_trainer(rollouts=Untagged(), srpo_strength=0.0))  # a baseline run is never refused


def test_a_template_that_opens_a_block_itself_is_refused_at_the_first_batch():
    class Opened(Rollouts):
        def __call__(self, prompts, trainer):
            output = super().__call__(prompts, trainer)
            opening = trainer.processing_class.tokenizer("<think>\n")["input_ids"]
            return output | {"prompt_ids": [[*ids, *opening] for ids in output["prompt_ids"]]}

    dataset = make_dataset(images_per_row=lambda row: 0)
    with pytest.raises(ValueError, match="the chat template ends the prompt with '<think>'"):
        rollout_batch(make_trainer(rollouts=Opened(), dataset=dataset))


def test_other_image_with_one_prompt_is_refused_at_the_first_batch_and_tolerated_later():
    trainer = make_trainer(srpo_corruption="other_image")
    with pytest.raises(ValueError, match="kind='other_image' left images .* as they were"):
        rollout_batch(trainer)
    trainer._srpo_is_first = False
    assert torch.isfinite(rollout_batch(trainer)["advantages"]).all()


def test_without_arguments_the_config_is_srpos_default(monkeypatch, tmp_path):
    @dataclasses.dataclass
    class OnCPU(SRPOConfig):
        use_cpu: bool = True

    class Parent:
        _generate_and_score_completions = _get_per_token_logps_and_entropies = print

        def __init__(self, model, reward_funcs, args):
            raise StopIteration(args)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("srpo_trl.trainer.SRPOConfig", OnCPU)
    with pytest.raises(StopIteration) as made:
        type("Trainer", (SRPOMixin, Parent), {})("somebody/model", print)
    assert isinstance(made.value.value, OnCPU)
    assert made.value.value.output_dir == "model-SRPO"
