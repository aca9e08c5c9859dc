"""What `srpo_rollouts` writes, read by the commands that are for it."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from srpo_trl import SRPOTrainer
from training import Rollouts, make_dataset, make_trainer, watching
from typer.testing import CliRunner

from srpo_core.cli.app import app
from srpo_core.rollouts import ScoringOptions, read_rollouts, score_rollouts


def train(folder, *, steps=2, **options):
    """Train, and return the file and what the core was given and made of each batch."""
    path = folder / "rollouts.jsonl"
    trainer = make_trainer(max_steps=steps, srpo_rollouts=str(path), **options)
    with watching() as made:
        trainer.train()
    return path, made, trainer


@pytest.mark.parametrize("options", [{}, {"srpo_strength": 0.0}, {"srpo_reliance_spans": 2}])
def test_every_training_batch_is_in_the_file_as_it_was_trained_on(tmp_path, options):
    path, made, trainer = train(tmp_path, **options)
    written = list(read_rollouts(path))
    tokenizer = trainer.processing_class.tokenizer
    assert len(made) == 2
    assert len(written) == sum(len(advantages) for _, _, advantages, _ in made)
    place = 0
    for step, (batch, (own, corrupted, *_), advantages, credit) in enumerate(made):
        for row, mask in enumerate(batch.mask):
            line = written[place]
            ids = batch.token_ids[row][mask].tolist()
            assert line.text == tokenizer.decode(ids)
            assert line.step == step
            assert line.swapped == (credit.donors[row] >= 0)
            for name, values in (
                ("old_log_probs", own),
                ("corrupted_log_probs", corrupted),
                ("counterfactual_log_probs", credit.counterfactual_log_probs),
                ("scores", credit.scores),
                ("weights", credit.weights),
            ):
                found = torch.as_tensor(getattr(line, name), dtype=torch.float32)
                torch.testing.assert_close(found, values[row][mask], atol=1e-4, rtol=0)
            text = line.text.removesuffix(tokenizer.eos_token)
            assert line.reward == sum(letter in "aeiou" for letter in text)
            assert line.advantage == pytest.approx(advantages[row].item(), abs=1e-4)
            assert "it" in line.prompt or "count" in line.prompt
            assert (path.parent / line.image).is_file()
            place += 1


def test_the_commands_show_it(tmp_path):
    path, made, _ = train(tmp_path)
    for arguments in (
        ["report", str(path), "-o", str(tmp_path / "report.html")],
        ["show", str(path), "--index", "1"],
        ["segment", str(path)],
        ["weights", str(path), "--strength", "0.5"],
    ):
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0, (arguments, shown.output)
    # With the trainer's options the recorded log-probs give the weights that it trained with.
    weights = [row[mask] for batch, *_, credit in made for row, mask in zip(credit.weights, batch.mask, strict=True)]
    scored_again = score_rollouts(read_rollouts(path), ScoringOptions(recompute=True))
    for scored, expected in zip(scored_again, weights, strict=True):
        torch.testing.assert_close(torch.as_tensor(scored.weights).float(), expected, atol=1e-3, rtol=0)


def test_a_resumed_run_leaves_the_file_of_a_run_that_was_never_interrupted(tmp_path):
    # Qwen3-VL: transformers 5.23 resumes Qwen2.5-VL without the weights it saved under other names.
    options = {"family": "qwen3_vl", "output_dir": str(tmp_path / "checkpoints"), "max_steps": 3}
    path = tmp_path / "rollouts.jsonl"
    make_trainer(srpo_rollouts=str(path), save_strategy="steps", save_steps=2, **options).train()
    whole = path.read_text()
    # Killed after the step that follows the checkpoint, while it wrote one line more.
    path.write_text(whole + '{"text": "torn')
    resumed = make_trainer(srpo_rollouts=str(path), rollouts=Rollouts(calls=2), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints/checkpoint-2"))
    assert path.read_text() == whole


def test_a_new_run_replaces_the_file(tmp_path):
    path, *_ = train(tmp_path, steps=2)
    train(tmp_path, steps=1)
    assert {line.step for line in read_rollouts(path)} == {0}


def test_evaluation_is_not_written(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    trainer = make_trainer(SRPOTrainer, srpo_rollouts=str(path))
    trainer.evaluate(trainer.train_dataset)
    assert not path.exists()


def test_two_prompts_of_one_step_are_two_groups_and_draw_for_themselves(tmp_path):
    """With steps_per_generation=1 and accumulation there are several generation batches in an optimizer step."""
    options = {"steps_per_generation": 1, "gradient_accumulation_steps": 2}
    path, made, _ = train(tmp_path, steps=1, **options)
    written = list(read_rollouts(path))
    assert len(made) == 2
    assert [line.step for line in written] == [0] * 8
    groups = [line.group for line in written]
    assert [groups.count(group) for group in groups] == [4] * 8
    prompts = {line.group: line.prompt for line in written}
    assert len(set(prompts.values())) == 2
    # The identity is the prompt's own: another trainer that meets the same prompts later gives them the same numbers.
    again, *_ = train(tmp_path / "again", steps=2)
    later = {line.prompt: line.group for line in read_rollouts(again)}
    assert all(later.get(prompt, group) == group for group, prompt in prompts.items())
    assert set(later) & set(prompts.values())


def reward_format(completions, **_):
    return [0.1] * len(completions)


def reward_some(completions, **_):
    """None where the function has nothing to say."""
    return [1.0, 0.0, None, 0.0][: len(completions)]


@pytest.mark.parametrize(
    ("rule", "said", "expected"),
    [
        ("reward_some", "reward_some > 0", [True, False, None, False]),
        ("reward_format>=0.2", "reward_format >= 0.2", [False] * 4),
        (">=1", "reward >= 1", [True, False, False, False]),
        (None, None, [None] * 4),
    ],
)
def test_what_counts_as_right_is_named_and_written(tmp_path, rule, said, expected):
    rewards = [reward_some, reward_format]
    path, _, trainer = train(tmp_path, steps=1, reward=rewards, srpo_correct=rule)
    written = list(read_rollouts(path))
    assert [line.correct for line in written] == expected
    assert {line.correct_by for line in written if line.correct is not None} == ({said} if said else set())
    assert [round(line.reward, 6) for line in written] == [1.1, 0.1, 0.1, 0.1]  # 1.1 of which 1 is for the answer
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    known = [answer for answer in expected if answer is not None]
    share = pytest.approx(sum(known) / len(known)) if known else None
    assert logged[0].get("srpo/right/fraction") == share


def test_a_reward_function_that_does_not_exist_is_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="'reward_vowel'.*did you mean 'reward_vowels'"):
        make_trainer(srpo_correct="reward_vowel")
    with pytest.raises(ValueError, match="srpo_correct: what counts as right must be"):
        make_trainer(srpo_correct="> = 3")


def test_an_image_that_no_png_holds_does_not_end_the_run(tmp_path):
    rows = list(make_dataset())
    cmyk = [row | {"images": [image.convert("CMYK") for image in row["images"]]} for row in rows]
    path, made, _ = train(tmp_path, steps=1, dataset=Dataset.from_list(cmyk))
    (written, *_) = lines = list(read_rollouts(path))
    assert len(lines) == 4 * len(made)
    assert Image.open(path.parent / written.image).mode == "RGB"
