"""What the adapter relies on beyond the names of srpo_verl.upstream. A failure here names what moved upstream."""

import inspect
import os
import subprocess
import sys
from importlib.metadata import entry_points, requires, version
from types import SimpleNamespace

import pytest
import torch
import transfer_queue
import verl.trainer.ppo.v1 as v1
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from srpo_verl import upstream
from srpo_verl.options import ESTIMATORS, LOSS_MODES
from tensordict import TensorDict
from verl.single_controller.base.decorator import MAGIC_ATTR, Dispatch
from verl.trainer.ppo.core_algos import AdvantageEstimator, get_policy_loss_fn
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.padding import response_from_nested, response_to_nested


def parameters(function):
    return list(inspect.signature(function).parameters)


def run(code, environment):
    """What a fresh Python prints; the test platform is all that it loads beside the plugin."""
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_installed_verl_is_one_we_know():
    assert version("verl") in SpecifierSet(upstream.KNOWN.removeprefix("verl"))


def test_the_versions_we_know_are_those_we_require():
    required = [Requirement(line) for line in requires("srpo-core")]
    (ours,) = [each for each in required if each.name == "verl"]
    assert ours.specifier == SpecifierSet(upstream.KNOWN.removeprefix("verl"))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_pins_of_run_sh_are_those_of_verls_engines(engine):
    with open(os.path.join(os.path.dirname(__file__), "engine_pins.txt")) as file:
        pins = {line.strip() for line in file if not line.startswith("#")}
    of_engine = [Requirement(line) for line in requires("verl") if f'extra == "{engine}"' in line]
    exact = {f"{each.name}{each.specifier}" for each in of_engine if str(each.specifier).startswith("==")}
    assert pins <= exact


def test_every_name_is_where_it_was():
    upstream.check_functions()


def test_a_name_that_has_gone_is_told_with_the_versions(monkeypatch):
    monkeypatch.delattr(transfer_queue, "kv_batch_put")
    known = r"srpo_verl knows verl>=0\.9\.1,<0\.10; installed are verl 0\.9\.\d+, TransferQueue \d.*, ray \d"
    with pytest.raises(RuntimeError, match=rf"^transfer_queue:kv_batch_put does not exist.*{known}"):
        upstream.check_functions()


def test_arguments_that_have_changed_are_told(monkeypatch):
    monkeypatch.setattr(v1.PPOTrainerSync, "_compute_advantage", lambda self, data: data)
    with pytest.raises(RuntimeError, match=r"PPOTrainerSync._compute_advantage takes other arguments than self batch"):
        upstream.check_functions()


def test_an_attribute_that_has_gone_is_told():
    trainer = SimpleNamespace(actor_rollout_wg=SimpleNamespace(init_model=None))
    with pytest.raises(RuntimeError, match=r"actor_rollout_wg.setup_srpo of the trainer \(SimpleNamespace\) does not"):
        upstream.check_attributes("trainer", trainer)


def test_verl_finds_the_plugin():
    assert [entry.value for entry in entry_points(group="verl.plugins", name="srpo")] == ["srpo_verl.plugin"]


def test_the_trainer_is_registered_under_its_mode():
    from srpo_verl.trainer import SRPOTrainer

    assert v1.get_trainer_cls("srpo") is SRPOTrainer
    assert parameters(v1.register_trainer) == ["name"]
    assert issubclass(SRPOTrainer, v1.PPOTrainerSync)


@pytest.mark.parametrize(
    ("environment", "modules"),
    [({}, "verl.trainer.ppo.v1"), ({"VERL_USE_EXTERNAL_PLUGINS": "none"}, "srpo_verl.plugin, verl.trainer.ppo.v1")],
)
def test_loading_is_lazy_and_complete(environment, modules):
    """By the entry point or by hand: `import verl` alone does not import its trainers, and importing them adds ours."""
    code = (
        "import sys, verl; before = 'verl.trainer.ppo.v1' in sys.modules; "
        f"import {modules}; "
        "print(before, verl.trainer.ppo.v1.get_trainer_cls('srpo').__module__)"
    )
    assert run(code, environment).split()[-2:] == ["False", "srpo_verl.trainer"]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("import sys; sys.modules['srpo_verl.trainer'] = None", "srpo_verl could not be loaded"),
        ("import transfer_queue; del transfer_queue.kv_batch_put", "installed are verl 0.9"),
    ],
)
def test_a_trainer_that_cannot_be_loaded_says_so_to_who_asks_for_it(broken, words):
    code = (
        "{0}\n"
        "import verl.trainer.ppo.v1 as v1\n"
        "v1.get_trainer_cls('sync')\n"
        "try: v1.get_trainer_cls('srpo')(config=None)\n"
        "except RuntimeError as error: print(error)"
    )
    assert words in run(code.format(broken), {})


def test_verls_check_of_the_configuration_also_checks_ours():
    import verl.utils.config

    assert verl.utils.config.validate_config.__wrapped__.__module__ == "verl.utils.config"
    with open(os.path.join(os.path.dirname(verl.__file__), "trainer", "main_ppo.py")) as file:
        main = file.read()
    assert main.index("    validate_config(") < main.index("    if config.trainer.use_v1")


def test_the_trainers_attributes_we_read():
    setup = inspect.getsource(v1.PPOTrainer._setup)
    assert "self.actor_rollout_wg = " in setup
    assert "self.role_worker_mapping[actor_role]" in setup
    assert setup.index("self._init_resource_pool_mgr()") < setup.index("RayClassWithInitArgs(")
    assert "ray.remote(ActorRolloutRefWorker)" in inspect.getsource(v1.PPOTrainer._init_resource_pool_mgr)
    assert "self.tokenizer = " in inspect.getsource(v1.PPOTrainer._init_tokenizer)
    assert "self.global_steps" in inspect.getsource(v1.PPOTrainer._load_checkpoint)


def test_the_mode_is_compared_with_sync_so_we_must_give_it_back():
    source = inspect.getsource(sys.modules["verl.trainer.ppo.v1.trainer_base"])
    assert source.count('self.trainer_mode != "sync"') + source.count('self.trainer_mode == "sync"') == 6


def test_advantages_are_made_of_old_log_probs_and_written_last():
    source = inspect.getsource(v1.PPOTrainer._compute_advantage)
    assert source.index("compute_rollout_correction_and_add_to_batch") < source.index('"advantages", "returns"')
    assert source.rstrip().endswith("return batch")
    step = inspect.getsource(v1.PPOTrainer._step_once)
    assert step.index("_compute_old_log_prob") < step.index("_compute_advantage") < step.index("_update_actor")
    assert "self.config.trainer.critic_warmup <= self.global_steps" in step
    assert "self.on_step_end()" in inspect.getsource(v1.PPOTrainer.fit)
    assert "self.global_steps = 0" in inspect.getsource(v1.PPOTrainer._load_checkpoint)
    assert "# we start from step 1" in inspect.getsource(v1.PPOTrainer.fit)


def test_bypass_mode_gives_the_rollout_engines_log_probs():
    source = inspect.getsource(v1.PPOTrainer._compute_old_log_prob)
    assert 'data["old_log_probs"] = data.pop("rollout_log_probs")' in source


def test_the_workers_names():
    assert "infer_batch" in inspect.getsource(ActorRolloutRefWorker.compute_log_prob)
    init = inspect.getsource(ActorRolloutRefWorker.init_model)
    assert "self.actor = self.actor_worker_cls(" in init
    assert "self.model_config = self.config.model_config" in inspect.getsource(TrainingWorker.__init__)


def test_our_methods_are_dispatched_as_compute_log_prob_is():
    from srpo_verl.worker import SRPOWorker

    ours = getattr(SRPOWorker.compute_srpo_log_probs, MAGIC_ATTR)
    verls = getattr(SRPOWorker.compute_log_prob, MAGIC_ATTR)
    assert ours["execute_mode"] == verls["execute_mode"]
    for name in ("dispatch_fn", "collect_fn"):
        assert ours["dispatch_mode"][name].args == verls["dispatch_mode"][name].args == ("actor",)
    assert getattr(SRPOWorker.setup_srpo, MAGIC_ATTR)["dispatch_mode"] == Dispatch.ONE_TO_ALL


def test_log_probs_of_a_response_stand_one_place_earlier():
    sequences = torch.nested.as_nested_tensor([torch.arange(5.0), torch.arange(10.0, 14.0)], layout=torch.jagged)
    masks = torch.nested.as_nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged)
    rows = [row.tolist() for row in response_from_nested(sequences, masks).unbind()]
    assert rows == [[2.0, 3.0], [12.0]]
    back = response_to_nested(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), masks)
    assert [row.tolist() for row in back.unbind()] == [[1.0, 2.0], [3.0]]


def test_tensordict_helpers():
    data = TensorDict({}, batch_size=2)
    tu.assign_non_tensor(data, srpo_step=3, uid=["a", "b"])
    assert tu.pop(data, "srpo_step") == 3
    assert list(tu.get(data, "uid")) == ["a", "b"]


def test_padding_rows_are_what_we_take_them_for():
    row = {
        "position_ids": torch.arange(6).repeat(4, 1),
        "multi_modal_inputs": {"pixel_values": torch.ones(4, 4)},
        "responses": torch.arange(3),
    }
    padding, tag = construct_minimal_padding_template(row, {}, eos_token_id=7)
    assert padding["multi_modal_inputs"] == {}
    assert padding["response_mask"].sum() == 0
    assert padding["position_ids"].shape == (4, len(padding["input_ids"]))
    assert tag["is_padding"]


def test_the_names_we_allow_exist():
    assert set(ESTIMATORS) <= {estimator.value for estimator in AdvantageEstimator}
    assert all(callable(get_policy_loss_fn(name)) for name in LOSS_MODES)


def test_verls_own_settings_that_we_point_to_exist():
    import re

    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from srpo_verl.options import _VERLS_OWN

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(config_name="ppo_trainer")
    for places in _VERLS_OWN.values():
        for place in re.findall(r"[a-z_]+(?:\.[a-z_]+)+", places):
            owner, _, name = place.rpartition(".")
            assert name in OmegaConf.select(config, owner), place
