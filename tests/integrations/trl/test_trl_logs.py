"""The line in words at each logging step; and what TRL logs of its completions, as `srpo import` reads it."""

import re

import pytest
from training import make_dataset, make_trainer, reward_vowels, watching
from trl import GRPOTrainer

from srpo_core.rollouts import CorrectRule, import_logs, read_rollouts


def lines_of(text):
    """The lines in words among what a run printed."""
    return [line for line in text.splitlines() if "responses are well-formed" in line]


def test_each_logging_step_says_in_words_what_its_batch_was(capsys):
    trainer = make_trainer(max_steps=4, logging_steps=2, disable_tqdm=False)
    with watching() as made:
        trainer.train()
    printed = capsys.readouterr()
    lines = lines_of(printed.out)
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"]
    assert "well-formed" not in printed.err  # where the progress bar is
    for line, (batch, _, _, credit) in zip(lines, made[1::2], strict=True):
        perception = (batch.segmentation.roles == 1) & batch.mask
        tokens, weight = perception.sum() / batch.mask.sum(), credit.weights[perception].sum() / credit.weights.sum()
        assert line == (
            f"{line[:6]}: 4 of 4 responses are well-formed; a perception token depends on the image by "
            f"{credit.scores[perception].mean():.2f} nats and a reasoning token on the perception by "
            f"{credit.scores[(batch.segmentation.roles == 2) & batch.mask].mean():.2f} nats; perception has "
            f"{100 * tokens:.0f} % of the tokens and {100 * weight:.0f} % of the weight"
        )


def test_no_line_where_it_is_not_asked_for_or_nothing_was_trained(capsys):
    make_trainer(max_steps=2, srpo_summary=False).train()
    assert not lines_of(capsys.readouterr().out)
    evaluating = {"trainer_options": {"eval_dataset": make_dataset(4)}, "per_device_eval_batch_size": 4}
    trainer = make_trainer(max_steps=2, steps_per_generation=2, eval_strategy="steps", eval_steps=1, **evaluating)
    trainer.train()
    lines = lines_of(capsys.readouterr().out)
    assert [re.match(r"step \d+", line)[0] for line in lines] == ["step 1"]  # of the one batch that was generated


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
