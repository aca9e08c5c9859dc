"""The import hook on a package that looks like OpenRLHF. Needs no OpenRLHF, and hides an installed one."""

import os
import subprocess
import sys
import textwrap

import pytest

MAKER = """
class RemoteExperienceMaker:
    def make_experience(self, samples_list): ...
    def compute_advantages_and_returns(self, experiences): ...
    def _dispatch_forward(self, group, sync_condition, **kwargs): ...
    def _flatten_results(self, refs, duplicate_factor): ...
"""


@pytest.fixture
def run(tmp_path):
    """Runs Python code beside an ``openrlhf`` with the given experience maker."""

    def _run(code, maker=MAKER):
        file = tmp_path / "openrlhf/trainer/ppo_utils/experience_maker.py"
        file.parent.mkdir(parents=True)
        # Without these, an installed OpenRLHF would come first.
        for folder in file.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / "__init__.py").touch()
        file.write_text(maker)
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


def test_methods_are_patched_on_import_and_once(run):
    done = run("""
        from srpo_openrlhf import hooks
        hooks.install()
        hooks.install()
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker as Maker
        for method in (Maker.make_experience, Maker.compute_advantages_and_returns):
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
        assert hasattr(Maker.make_experience, "__wrapped__")
        assert not hasattr(Maker.make_experience.__wrapped__, "__wrapped__")
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("make_experience(self, samples_list)", "make_experience(self, batch)", "takes (batch)"),
        ("def _flatten_results", "def _gather", "is gone"),
    ],
)
def test_a_changed_openrlhf_is_refused_with_the_supported_versions(run, old, new, problem):
    done = run(
        "from srpo_openrlhf import hooks; hooks.install(); import openrlhf.trainer.ppo_utils.experience_maker",
        maker=MAKER.replace(old, new),
    )
    assert done.returncode != 0
    assert "srpo_openrlhf needs openrlhf>=0.11.2,<0.12" in done.stderr
    assert problem in done.stderr
