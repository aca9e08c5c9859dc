"""The command line and what is refused on it. Needs no OpenRLHF."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from srpo_openrlhf.options import (
    ENVIRONMENT_VARIABLE,
    OpenRLHFOptions,
    dump_config,
    load_config,
    option_parser,
    parse_options,
)
from srpo_openrlhf.settings import check_arguments, check_config

from srpo_core import RoleTags
from srpo_core.options import adapter_options


def stock_args(**changes):
    """Completed arguments of train_ppo_ray under which SRPO runs, with changes such as ds__packing_samples=True."""
    values = {
        "actor__policy_loss_type": "ppo",
        "critic__model_name_or_path": None,
        "algo__kl__init_coef": 0.0,
        "algo__kl__use_loss": False,
        "algo__advantage__estimator": "group_norm",
        "algo__advantage__gamma": 1.0,
        "ds__packing_samples": False,
        "ds__ring_attn_size": 1,
        "ds__tensor_parallel_size": 1,
        "data__max_images_per_prompt": 1,
        **changes,
    }
    args = SimpleNamespace()
    for name, value in values.items():
        *path, last = name.split("__")
        node = args
        for part in path:
            if not hasattr(node, part):
                setattr(node, part, SimpleNamespace())
            node = getattr(node, part)
        setattr(node, last, value)
    return args


def test_the_options_are_those_of_the_core_and_those_that_only_record():
    actions = {action.dest.removeprefix("srpo."): action for action in option_parser()._actions}
    assert list(actions) == ["rollouts", "correct", "metrics", "summary", *adapter_options()]
    hints = get_type_hints(OpenRLHFOptions)
    for name, field in adapter_options().items():
        action = actions[name]
        assert action.option_strings == [f"--srpo.{name}"]
        assert action.default == field.default
        assert action.help.replace("%%", "%").startswith(f"{field.metadata['help']} (default: ")
        names = [kind for kind in (hints[name], *get_args(hints[name])) if get_origin(kind) is Literal]
        assert (action.choices or ()) == (get_args(names[0]) if names else ())


@pytest.mark.parametrize("name", ["surrogate", "kl_coef", "normalization"])
def test_what_openrlhf_has_flags_of_its_own_for_is_unknown(name, capsys):
    with pytest.raises(SystemExit):
        parse_options([f"--srpo.{name}", "1"])
    assert f"unknown option --srpo.{name}" in capsys.readouterr().err


def test_without_options_the_config_is_the_default():
    assert parse_options([]) == (OpenRLHFOptions(), [])


def test_options_are_taken_out_and_the_rest_keeps_its_order():
    argv = ["--reward.clip_range", "-10", "10", "--srpo.strength=0.5", "--ds.packing_samples"]
    argv += ["--srpo.corruption", "black", "--srpo.mix_warmup_steps", "7", "--actor.adam.lr", "1e-6"]
    config, rest = parse_options(argv)
    assert config == OpenRLHFOptions(strength=0.5, corruption="black", mix_warmup_steps=7)
    assert rest == ["--reward.clip_range", "-10", "10", "--ds.packing_samples", "--actor.adam.lr", "1e-6"]


def test_the_file_for_rollouts_is_an_option_of_its_own():
    assert parse_options(["--srpo.rollouts", "a.jsonl", "--srpo.correct", "acc>=0.5", "--seed", "1"]) == (
        OpenRLHFOptions(rollouts="a.jsonl", correct="acc>=0.5"),
        ["--seed", "1"],
    )


def test_what_is_logged_is_an_option(capsys):
    assert (OpenRLHFOptions().metrics, OpenRLHFOptions().summary) == ("main", True)
    for word, said in (("false", False), ("True", True)):
        config, _ = parse_options(["--srpo.metrics", "all", "--srpo.summary", word])
        assert config == OpenRLHFOptions(metrics="all", summary=said)
    with pytest.raises(SystemExit):
        parse_options(["--srpo.summary", "no"])
    assert "argument --srpo.summary: must be true or false, got 'no'" in capsys.readouterr().err


def test_reliance_is_an_option():
    config, _ = parse_options(["--srpo.reliance_spans", "4", "--srpo.reliance_mode", "share"])
    assert config == OpenRLHFOptions(reliance_spans=4, reliance_mode="share")


def test_tags_are_options():
    config, _ = parse_options(["--srpo.perception_tags", "<see>", "</see>", "--srpo.answer_tags"])
    assert config.tags == RoleTags(perception=("<see>", "</see>"), answer=None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--srpo.strenght", "1"], "unknown option --srpo.strenght"),
        (["--srpo.strength", "-1"], "--srpo.strength must be at least 0, got -1"),
        (["--srpo.corruption", "blurr"], "invalid choice: 'blurr'"),
        (["--srpo.weight_map", "tanh"], "invalid choice: 'tanh'"),
        (["--srpo.corruption", "black", "--srpo.corruption_amount", "0.5"], "--srpo.corruption_amount has no meaning"),
        (["--srpo.weight_map", "sigmoid", "--srpo.bound", "0.5"], "--srpo.weight_map 'exp_tanh' or"),
        (["--srpo.scale_decay", "0.5"], "leave --srpo.scale_decay out"),
        (["--srpo.perception_tags", "<think>", "</see>"], "'<think>'"),
        (["--srpo.answer_tags", "<answer>"], "--srpo.answer_tags must be two non-empty strings"),
        (["--srpo.reliance_spans", "-1"], "--srpo.reliance_spans must be at least 0, got -1"),
        (["--srpo.reliance_spans", "1.5"], "invalid int value: '1.5'"),
        (["--srpo.reliance_mode", "sum"], "invalid choice: 'sum'"),
        (["--srpo.reliance_mode", "share"], "set --srpo.reliance_spans to the number of spans"),
        (["--srpo.visual_score", "full_kl"], "--srpo.visual_score='full_kl' compares full distributions"),
        (["--srpo.consistency_score", "jsd"], "--srpo.consistency_score='jsd' compares full distributions"),
    ],
)
def test_a_wrong_option_ends_the_program_with_a_sentence(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_options(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_options_reach_the_workers(monkeypatch):
    config = OpenRLHFOptions(answer_tags=None, strength=0.1, corruption_amount=0.5, reliance_spans=3)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, dump_config(config))
    assert load_config() == config
    assert set(json.loads(dump_config(config))) == {"rollouts", "correct", "metrics", "summary", *adapter_options()}


def test_a_worker_without_options_says_how_to_start(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match="start with python -m srpo_openrlhf"):
        load_config()


def test_good_settings_pass():
    check_config(OpenRLHFOptions())
    check_arguments(stock_args())
    check_arguments(stock_args(algo__kl__init_coef=0.01, algo__kl__use_loss=True))
    check_arguments(stock_args(ds__packing_samples=True, data__max_images_per_prompt=0))


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"corruption": "none"}, "pass black or patch_mask"),
        ({"counterfactual": "mask"}, "pass drop"),
        ({"scale": "ema_rms"}, "pass batch_rms"),
    ],
)
def test_an_option_that_cannot_work_is_refused(option, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_config(OpenRLHFOptions(**option))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"actor__policy_loss_type": "gspo"}, "--actor.policy_loss_type gspo: .*; pass ppo"),
        ({"critic__model_name_or_path": "critic"}, "--algo.advantage.estimator gae: .* pass group_norm"),
        ({"algo__kl__init_coef": 0.01}, "add --algo.kl.use_loss"),
        ({"algo__advantage__estimator": "reinforce", "algo__advantage__gamma": 0.9}, "--algo.advantage.gamma"),
        ({"ds__packing_samples": True}, "--ds.packing_samples with images: .* leave it out"),
        ({"ds__ring_attn_size": 2}, "--ds.ring_attn_size"),
        ({"ds__tensor_parallel_size": 2}, "--ds.tensor_parallel_size"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_arguments(stock_args(**change))


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ValueError, match=r"gspo(.|\n)*ring_attn_size"):
        check_arguments(stock_args(actor__policy_loss_type="gspo", ds__ring_attn_size=2))


def test_help_shows_our_options_first():
    command = [sys.executable, "-m", "srpo_openrlhf", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    assert "--srpo.strength" in shown
    assert "The rest is openrlhf.cli.train_ppo_ray's" in shown
