"""The command line -> VerlOptions. Needs no verl."""

import subprocess
import sys
from dataclasses import fields

import pytest
from helpers import another_value
from srpo_verl import options as verl_options
from srpo_verl.options import VerlOptions, check_config, srpo_options

from srpo_core import RoleTags, SRPOConfig
from srpo_core.options import adapter_options, trainer_options


def verl_config(**changes):
    """The part of verl's configuration that matters, with dotted changes."""
    config = {
        "trainer": {"use_v1": True, "v1": {"trainer_mode": "srpo"}},
        "algorithm": {"adv_estimator": "grpo", "srpo": {}},
        "actor_rollout_ref": {
            "hybrid_engine": True,
            "actor": {"strategy": "fsdp2", "policy_loss": {"loss_mode": "vanilla"}},
            "rollout": {"temperature": 1.0},
        },
        "distillation": {"enabled": False},
    }
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = config
        for key in parents:
            node = node[key]
        node[last] = value
    return config


def test_defaults_are_the_cores():
    options = check_config(verl_config())
    assert options == VerlOptions()
    assert all(getattr(options, each.name) == getattr(SRPOConfig(), each.name) for each in fields(SRPOConfig))


def test_without_options_every_default_holds():
    config = verl_config()
    del config["algorithm"]["srpo"]
    assert check_config(config) == VerlOptions()


def test_options_reach_the_config():
    options = {"strength": 2, "counterfactual": "drop", "perception_tags": ["<d>", "</d>"], "answer_tags": None}
    config = check_config(verl_config(**{"algorithm.srpo": options}))
    assert (config.strength, config.counterfactual) == (2, "drop")
    assert config.tags == RoleTags(perception=("<d>", "</d>"), answer=None)
    config = check_config(verl_config(**{"algorithm.srpo": {"reliance_spans": 4, "reliance_mode": "share"}}))
    assert (config.reliance_spans, config.reliance_mode) == (4, "share")
    assert check_config(verl_config(**{"algorithm.srpo": {"rollouts": "a.jsonl"}})).rollouts == "a.jsonl"


def test_the_options_are_those_of_an_adapter_and_those_that_only_record():
    assert {each.name for each in fields(VerlOptions)} - set(trainer_options()) == {
        *adapter_options(),
        "rollouts",
        "correct",
        "metrics",
        "summary",
    }
    assert (srpo_options({}).metrics, srpo_options({}).summary) == ("main", True)
    with pytest.raises(ValueError, match=r"^algorithm\.srpo\.metrics must be one of 'main', 'all', got 'few'"):
        srpo_options({"metrics": "few"})
    assert srpo_options({"rollouts": "rollouts.jsonl"}).rollouts == "rollouts.jsonl"


@pytest.mark.parametrize("name", sorted({*adapter_options()} - {"scale_decay"}))  # its reader, ema_rms, is refused
def test_every_option_of_an_adapter_is_read(name):
    values = another_value(name)
    written = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}  # as YAML does
    assert getattr(srpo_options(written), name) == values[name] != getattr(VerlOptions(), name)


@pytest.mark.parametrize("name", trainer_options())
def test_options_of_the_trainer_are_refused(name):
    with pytest.raises(ValueError, match=rf"^algorithm\.srpo\.{name} is verl's own: (set \w+\.|it has no setting)"):
        srpo_options({name: trainer_options()[name].default})


def test_a_new_option_of_the_trainer_cannot_be_ignored(monkeypatch):
    monkeypatch.setattr(verl_options, "trainer_options", lambda: trainer_options() | {"overlong_penalty": None})
    with pytest.raises(ValueError, match=r"^algorithm\.srpo\.overlong_penalty is verl's own"):
        srpo_options({"overlong_penalty": 0.1})


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_another_algorithm_is_left_alone(mode):
    config = verl_config(**{"trainer.v1.trainer_mode": mode})
    del config["algorithm"]["srpo"]
    assert check_config(config) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer.v1.trainer_mode": "sync"}, ["plain GRPO", "trainer.v1.trainer_mode=srpo"]),
        ({"trainer.v1.trainer_mode": "separate_async"}, ["separate_async", "older policies"]),
        ({"trainer.v1.trainer_mode": "colocate_async"}, ["colocate_async", "resumes rollouts"]),
        ({"actor_rollout_ref.hybrid_engine": False}, ["hybrid_engine", "separate_async"]),
        ({"trainer.use_v1": False}, ["deprecated", "trainer.use_v1=true"]),
        ({"actor_rollout_ref.actor.policy_loss.loss_mode": "gspo"}, ["gspo", "one importance ratio", "vanilla"]),
        ({"actor_rollout_ref.actor.policy_loss.loss_mode": "geo_mean"}, ["one importance ratio"]),
        ({"actor_rollout_ref.actor.policy_loss.loss_mode": "clip_cov"}, ["size of their advantages"]),
        ({"actor_rollout_ref.actor.policy_loss.loss_mode": "mine"}, ["mine", "was not tested"]),
        ({"algorithm.adv_estimator": "gae"}, ["gae", "one advantage", "grpo"]),
        ({"actor_rollout_ref.actor.strategy": "megatron"}, ["megatron", "fsdp2"]),
        ({"distillation.enabled": True}, ["distillation.enabled=false"]),
        ({"actor_rollout_ref.rollout.temperature": 0.0}, ["temperature", "above 0"]),
    ],
)
def test_settings_that_exclude_srpo_are_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=".") as caught:
        check_config(verl_config(**changes))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strenght": 1.0}, ["strenght is unknown", "did you mean algorithm.srpo.strength?", "counterfactual_image"]),
        ({"zzz": 1.0}, ["algorithm.srpo.zzz is unknown; The options are"]),
        ({"surrogate": {"name": "clip", "high": 0.3}}, ["actor_rollout_ref.actor.clip_ratio_low"]),
        ({"kl_coef": 0.1}, ["actor_rollout_ref.actor.kl_loss_coef"]),
        ({"epsilon": 0.1}, ["it has no setting for this"]),
        ({"counterfactual": "mask"}, ["'swap' or 'drop'"]),
        ({"corruption": "none"}, ["gray"]),
        ({"corruption": "other_image"}, ["number of workers"]),
        ({"scale": "ema_rms"}, ["batch_rms"]),
        ({"scale_decay": 0.9}, ["algorithm.srpo.scale 'ema_rms' reads it"]),
        ({"visual_score": "full_kl"}, ["visual_score='full_kl'", "log_ratio"]),
        ({"consistency_score": "jsd"}, ["consistency_score='jsd'"]),
        ({"strength": -1.0}, ["strength must be at least 0", "-1.0"]),
        ({"strength": "strong"}, ["strength must be a number", "strong"]),
        ({"corruption": "blurr"}, ["corruption must be one of", "blurr"]),
        ({"corruption_amount": 2.0}, ["corruption_amount of kind 'patch_mask' must be in (0, 1]", "2.0"]),
        ({"bound": 0.5, "weight_map": "sigmoid"}, ["algorithm.srpo.bound", "algorithm.srpo.weight_map"]),
        ({"reliance_spans": -1}, ["reliance_spans must be at least 0, got -1"]),
        ({"reliance_spans": "many"}, ["reliance_spans must be a whole number", "'many'"]),
        ({"reliance_spans": 2, "reliance_mode": "sum"}, ["reliance_mode must be one of 'product', 'share'", "'sum'"]),
        ({"reliance_mode": "share"}, ["algorithm.srpo.reliance_mode='share'", "set algorithm.srpo.reliance_spans to"]),
        ({"reliance_mode": "share", "reliance_spans": 0}, ["set algorithm.srpo.reliance_spans to"]),
        ({"perception_tags": ["<p>"]}, ["perception_tags must be"]),
        ({"perception_tags": "<p>"}, ["perception_tags must be"]),
        ({"reasoning_tags": ["<perception>", "</perception>"]}, ["algorithm.srpo.reasoning_tags"]),
        ({"rollouts": 3}, ["rollouts must be", "got 3"]),
        (["strength"], ["must map names of options to values"]),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(ValueError, match=".") as caught:
        srpo_options(options)
    assert str(caught.value).startswith("algorithm.srpo")
    assert all(word in str(caught.value) for word in words), caught.value


def test_loading_the_plugin_imports_nothing_of_verl():
    code = (
        "import sys, srpo_verl.plugin; print([name for name in sys.modules if name.split('.')[0] in ('verl', 'ray')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
