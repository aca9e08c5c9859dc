"""What TRL logs of its completions, as `srpo import` reads it: a real run, counted by hand."""

import pytest
from training import make_trainer, reward_vowels
from trl import GRPOTrainer

from srpo_core.rollouts import CorrectRule, import_logs, read_rollouts


def has_many_vowels(completions, **_):
    """Does not apply to every response."""
    return [None if vowels == 4 else float(vowels > 4) for vowels in reward_vowels(completions)]


@pytest.mark.parametrize("options", [{}, {"steps_per_generation": 2}])
def test_completions_of_trl_are_imported_with_rewards_and_groups(tmp_path, options):
    trainer = make_trainer(
        GRPOTrainer,
        reward=[has_many_vowels, reward_vowels],
        log_completions=True,
        output_dir=str(tmp_path),
        max_steps=4,
        **options,
    )
    trainer.train()
    rule = CorrectRule.read("has_many_vowels")
    found = import_logs([tmp_path / "completions"], tmp_path / "r.jsonl", right=rule, drop_repeated=True)
    assert set(found.tools.values()) == {"trl"}
    # With two steps for each generation half of the tables are written twice.
    assert (found.responses, found.repeated) == ((16, 0) if not options else (16, 16))
    assert found.functions == {"has_many_vowels": 1.0, "reward_vowels": 1.0}
    assert found.contradicted == 0
    assert set(found.groups.values()) == {4}
    for rollout in read_rollouts(tmp_path / "r.jsonl"):
        vowels = sum(letter in "aeiou" for letter in rollout.text)
        assert rollout.reward == vowels + (vowels > 4)
        assert rollout.correct is (None if vowels == 4 else vowels > 4)
        assert rollout.advantage is not None
        assert "count" in rollout.prompt or "what" in rollout.prompt
