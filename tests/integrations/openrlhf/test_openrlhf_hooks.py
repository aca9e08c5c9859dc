"""The import hook on a package that looks like OpenRLHF. Needs no OpenRLHF, and hides an installed one."""

import os
import subprocess
import sys
import textwrap

import pytest

MAKER = """
class RayActorGroup:
    def async_run_method(self, method_name, *args, **kwargs): ...
    def async_run_method_batch(self, method_name, **kwargs): ...

class RemoteExperienceMaker:
    def __init__(self, actor_model_group, critic_model_group, reward_model_group, initial_model_group, kl_controller,
                 strategy, tokenizer, **kwargs): ...
    def make_experience_batch(self, rollout_samples): ...
    def _dispatch_forward(self, group, sync_condition, **kwargs): ...
    def _flatten_results(self, refs, duplicate_factor): ...

class Experience:
    def __init__(self, sequences=None, attention_mask=None, action_mask=None, action_log_probs=None,
                 rollout_log_probs=None, advantages=None, rewards=None, index=None, prompts=None,
                 mm_train_inputs=None, info=None): ...
"""
ACTOR = """
class PolicyLoss:
    def forward(self, log_probs, old_log_probs, advantages, action_mask=None): ...

class PolicyModelActor:
    def forward(self, sequences, action_mask=None, attention_mask=None, mm_train_inputs_list=None): ...
    def append(self, experience): ...
    def fit(self, kl_ctl=0): ...
    def get_checkpoint_states(self): ...
"""
RAY = "def get(refs): ..."


@pytest.fixture
def run(tmp_path):
    """Runs Python code beside an ``openrlhf`` with the given experience maker."""

    def _run(code, maker=MAKER, actor=ACTOR):
        for name, content in (
            ("openrlhf/trainer/ppo_utils/experience_maker.py", maker),
            ("openrlhf/trainer/ray/ppo_actor.py", actor),
            ("openrlhf/utils/__init__.py", "def get_strategy(args): ..."),
            ("ray.py", RAY),
        ):
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            # Without these, an installed OpenRLHF would come first.
            for folder in file.relative_to(tmp_path).parents[:-1]:
                (tmp_path / folder / "__init__.py").touch()
            file.write_text(content)
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return _run


def test_the_worker_hook_imports_nothing(run):
    done = run("""
        import sys
        from srpo_openrlhf import hooks
        hooks.install()
        import openrlhf
        heavy = {"torch", "deepspeed", "ray", "transformers", "srpo_core", "openrlhf.trainer"} & set(sys.modules)
        assert not heavy, heavy
    """)
    assert done.returncode == 0, done.stderr


def test_the_maker_is_patched_on_import_and_once(run):
    done = run("""
        from srpo_openrlhf import hooks
        hooks.install()
        hooks.install()
        import openrlhf.trainer.ray.ppo_actor, openrlhf.utils
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker as Maker
        method = Maker.make_experience_batch
        assert hasattr(method, "__wrapped__") and not hasattr(method.__wrapped__, "__wrapped__"), method
        assert not hasattr(Maker._dispatch_forward, "__wrapped__")
    """)
    assert done.returncode == 0, done.stderr


def test_what_is_imported_already_is_patched_at_once_and_once(run):
    done = run("""
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker as Maker
        from srpo_openrlhf import hooks
        hooks.install()
        hooks.install()
        assert hasattr(Maker.make_experience_batch, "__wrapped__")
        assert not hasattr(Maker.make_experience_batch.__wrapped__, "__wrapped__")
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("make_experience_batch(self, rollout_samples)", "make_experience_batch(self, batch)", "but takes (batch)"),
        ("make_experience_batch(self, rollout_samples)", "make_experience_batch(self, rollout_samples, step)", "step)"),
        ("def _flatten_results", "def _gather", "but is gone"),
        ("advantages=None", "token_advantages=None", "experience_maker.Experience must take"),
        ("class RayActorGroup", "class ActorGroup", "RayActorGroup.async_run_method must take"),
        ("old_log_probs, advantages,", "old_log_probs,", "ppo_actor.PolicyLoss.forward must take"),
        ("def append", "def extend", "ppo_actor.PolicyModelActor.append must take (experience), but is gone"),
    ],
)
def test_a_changed_openrlhf_is_refused_with_the_supported_versions(run, old, new, problem):
    assert old in MAKER + ACTOR
    done = run(
        """
        from srpo_openrlhf import hooks
        hooks.install()
        import openrlhf.trainer.ray.ppo_actor, openrlhf.trainer.ppo_utils.experience_maker
        """,
        maker=MAKER.replace(old, new),
        actor=ACTOR.replace(old, new),
    )
    assert done.returncode != 0
    assert "srpo_openrlhf needs openrlhf>=0.11.2,<0.12" in done.stderr
    assert problem in done.stderr


def test_a_parameter_with_a_default_may_be_added(run):
    done = run(
        "from srpo_openrlhf import hooks; hooks.install(); import openrlhf.trainer.ray.ppo_actor",
        actor=ACTOR.replace("experience)", "experience, priority=None)"),
    )
    assert done.returncode == 0, done.stderr
