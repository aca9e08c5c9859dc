"""What is refused, what the command line becomes, and the names of ms-swift that the adapter relies on."""

import importlib
import sys
from types import SimpleNamespace

import pytest
from srpo_swift import __main__ as launcher
from srpo_swift import upstream
from srpo_swift.options import dump_config, load_config, parse_options
from srpo_swift.settings import check_arguments, check_config

ALLOWED = {
    "use_liger_kernel": False,
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "kl_in_reward": False,
    "beta": 0.04,
    "advantage_reweight": None,
    "sdar_loss_coef": 0.0,
    "multi_turn_scheduler": None,
}


def check(template=None, **changed):
    settings = {"sequence_parallel_size": 1, "padding_free": False} | (template or {})
    check_arguments(SimpleNamespace(**ALLOWED | changed), SimpleNamespace(**settings))


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"use_liger_kernel": True}, "--use_liger_kernel true"),
        ({"loss_type": "real"}, "--loss_type real"),
        ({"loss_type": "fipo"}, "--loss_type fipo"),
        ({"importance_sampling_level": "sequence"}, "--importance_sampling_level sequence"),
        ({"kl_in_reward": True}, "--kl_in_reward true"),
        ({"advantage_reweight": "rlsd"}, "--advantage_reweight"),
        ({"sdar_loss_coef": 0.1}, "--sdar_loss_coef"),
        ({"teacher_model": "x"}, "--teacher_model"),
        ({"multi_turn_scheduler": "x"}, "--multi_turn_scheduler"),
        ({"template": {"padding_free": True}}, "--padding_free true"),
        ({"template": {"sequence_parallel_size": 2}}, "--sequence_parallel_size above 1"),
    ],
)
def test_check_arguments_refuses_with_a_sentence(changed, flag):
    check()
    check(importance_sampling_level="sequence_token", kl_in_reward=True, beta=0.0)
    with pytest.raises(ValueError, match="SRPO refuses these settings") as caught:
        check(**changed)
    assert flag in str(caught.value)


@pytest.mark.parametrize("option", ["corruption none", "counterfactual mask", "scale ema_rms"])
def test_check_config_refuses_with_a_sentence(option):
    config, _ = parse_options([f"--srpo_{option.split()[0]}", option.split()[1]])
    with pytest.raises(ValueError, match=f"--srpo_{option}: "):
        check_config(config)


def test_parse_options_dump_config_and_load_config_carry_every_option(monkeypatch):
    config, rest = parse_options(["--beta", "0", "--srpo_strength=0.5", "--srpo_answer_tags", "<a>", "</a>"])
    assert rest == ["--beta", "0"]
    assert (config.strength, config.answer_tags) == (0.5, ("<a>", "</a>"))
    monkeypatch.setenv("SRPO_SWIFT", dump_config(config))
    assert load_config() == config
    monkeypatch.delenv("SRPO_SWIFT")
    with pytest.raises(RuntimeError, match="start with python -m srpo_swift"):
        load_config()


def test_parse_options_names_an_unknown_option(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--srpo_strenght", "1"])
    assert "unknown option --srpo_strenght" in capsys.readouterr().err


def test_main_hands_the_rest_and_the_plugin_to_ms_swift(monkeypatch, tmp_path):
    stock = importlib.import_module("swift.cli.main")  # ms-swift's lazy package has no attribute of that name
    seen = []
    monkeypatch.setattr(stock, "cli_main", lambda: seen.append(sys.argv))
    monkeypatch.setenv("SRPO_SWIFT", "")
    config = tmp_path / "run.yaml"
    config.write_text("rlhf_type: grpo\nbeta: 0\nsrpo_strength: 0.25\n")
    launcher.main(["rlhf", str(config), "--external_plugins", "mine.py"])
    start = ["swift", "rlhf", "--rlhf_type", "grpo", "--beta", "0", "--external_plugins"]
    assert seen[0][:7] == start
    assert seen[0][7].endswith("register.py")
    assert seen[0][8:] == ["mine.py"]
    assert load_config().strength == 0.25
    for argv, sentence in ((["sft"], "must be rlhf"), (["rlhf", "--rlhf_type", "dpo"], "--rlhf_type must be grpo")):
        with pytest.raises(ValueError, match=sentence):
            launcher.main(argv)


def test_check_upstream_knows_the_installed_version(monkeypatch):
    upstream.check_upstream()
    names = {"swift.rl_core.data": {"GRPOBatch": ("gone",)}}
    monkeypatch.setattr(upstream, "RELIED_ON", names)
    with pytest.raises(ImportError, match=r"swift\.rl_core\.data\.GRPOBatch takes no gone"):
        upstream.check_upstream()
    monkeypatch.setattr(upstream, "version", lambda name: "9.0")
    with pytest.raises(ImportError, match=r"needs ms-swift>=4\.6,<4\.7 and found 9\.0"):
        upstream.check_upstream()


def test_register_makes_grpo_train_with_srpo(monkeypatch):
    from swift.trainers.trainer_factory import TrainerFactory

    monkeypatch.setattr(TrainerFactory, "TRAINER_MAPPING", dict(TrainerFactory.TRAINER_MAPPING))
    upstream.register()
    assert TrainerFactory.get_trainer_cls(SimpleNamespace(rlhf_type="grpo")).__name__ == "SRPOTrainer"
