"""The command line -> SRPOConfig. Needs no verl."""

import subprocess
import sys

import pytest
from srpo_verl.options import check_config, srpo_config

from srpo_core import RoleTags, SRPOConfig


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
    assert check_config(verl_config()) == SRPOConfig()


def test_without_options_every_default_holds():
    config = verl_config()
    del config["algorithm"]["srpo"]
    assert check_config(config) == SRPOConfig()


def test_options_reach_the_config():
    options = {"strength": 2, "counterfactual": "drop", "tags": {"perception": ["<d>", "</d>"], "answer": None}}
    config = check_config(verl_config(**{"algorithm.srpo": options}))
    assert (config.strength, config.counterfactual) == (2, "drop")
    assert config.tags == RoleTags(perception=("<d>", "</d>"), answer=None)
    config = check_config(verl_config(**{"algorithm.srpo": {"use_spans": 4, "use": "share"}}))
    assert (config.use_spans, config.use) == (4, "share")


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
        ({"strenght": 1.0}, ["algorithm.srpo.strenght", "did you mean 'strength'", "counterfactual_image"]),
        ({"zzz": 1.0}, ["algorithm.srpo.zzz is unknown; Options"]),
        ({"clip_low": 0.1}, ["actor_rollout_ref.actor.clip_ratio_low"]),
        ({"kl_coef": 0.1}, ["actor_rollout_ref.actor.kl_loss_coef"]),
        ({"epsilon": 0.1}, ["verl fixes it"]),
        ({"counterfactual": "mask"}, ["'swap' or 'drop'"]),
        ({"corruption": "none"}, ["gray"]),
        ({"corruption": "other_image"}, ["number of workers"]),
        ({"scale": "ema_rms"}, ["batch_rms"]),
        ({"scale_decay": 0.9}, ["ema_rms", "batch_rms"]),
        ({"visual_score": "full_kl"}, ["visual_score='full_kl'", "log_ratio"]),
        ({"consistency_score": "jsd"}, ["consistency_score='jsd'"]),
        ({"strength": -1.0}, ["strength must be in", "-1.0"]),
        ({"strength": "strong"}, ["strength must be", "float", "strong"]),
        ({"corruption": "blurr"}, ["corruption must be one of", "blurr"]),
        ({"use_spans": -1}, ["use_spans must be a whole number of at least 0, got -1", "pass 0 for no use score"]),
        ({"use_spans": "many"}, ["use_spans must be a whole number", "'many'"]),
        ({"use_spans": 2, "use": "sum"}, ["use must be one of 'product', 'share', got 'sum'"]),
        ({"use": "share"}, ["algorithm.srpo.use='share'", "set use_spans to the number of spans"]),
        ({"use": "share", "use_spans": 0}, ["set use_spans to the number of spans"]),
        ({"tags": ["<p>"]}, ["tags must map"]),
        ({"tags": {"perceptoin": ["<p>", "</p>"]}}, ["tags must map", "perceptoin"]),
        ({"tags": {"perception": "<p>"}}, ["perception must be two non-empty strings"]),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(ValueError, match=".") as caught:
        srpo_config(options)
    assert str(caught.value).startswith("algorithm.srpo")
    assert all(word in str(caught.value) for word in words), caught.value


def test_loading_the_plugin_imports_nothing_of_verl():
    code = (
        "import sys, srpo_verl.plugin; print([name for name in sys.modules if name.split('.')[0] in ('verl', 'ray')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
