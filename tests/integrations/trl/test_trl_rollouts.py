"""What `srpo_rollouts` writes, read by the commands that are for it."""

import pytest
import torch
from srpo_trl import SRPOTrainer
from training import make_trainer
from typer.testing import CliRunner

from srpo_core.commands import app
from srpo_core.rollouts import read_rollouts
from srpo_core.summaries import CreditOptions, score_rollouts


def train(folder, *, steps=2, **options):
    """Train, and return the file and what the trainer kept of each batch."""
    path, batches = folder / "rollouts.jsonl", []
    trainer = make_trainer(max_steps=steps, srpo_rollouts=str(path), **options)
    write = trainer._srpo_write
    trainer._srpo_write = lambda *args: batches.append(args) or write(*args)
    trainer.train()
    return path, batches, trainer


@pytest.mark.parametrize("options", [{}, {"srpo_strength": 0.0}, {"srpo_use_spans": 2}])
def test_every_training_batch_is_in_the_file_as_it_was_trained_on(tmp_path, options):
    path, batches, trainer = train(tmp_path, **options)
    written = list(read_rollouts(path))
    assert len(batches) == 2
    assert len(written) == sum(len(rollouts.mask) for rollouts, *_ in batches)
    place = 0
    for step, (rollouts, credit, _, views) in enumerate(batches):
        for row, mask in enumerate(rollouts.mask):
            line = written[place]
            ids = rollouts.token_ids[row][mask].tolist()
            assert line.text == trainer._srpo_tokenizer.decode(ids)
            assert line.step == step
            for name, values in (
                ("old_log_probs", views.log_probs),
                ("corrupted_log_probs", views.corrupted_log_probs),
                ("counterfactual_log_probs", views.counterfactual_log_probs),
                ("weights", credit.weights),
            ):
                found = torch.as_tensor(getattr(line, name), dtype=torch.float32)
                torch.testing.assert_close(found, values[row][mask], atol=1e-4, rtol=0)
            text = line.text.removesuffix(trainer._srpo_tokenizer.eos_token)
            assert line.reward == sum(letter in "aeiou" for letter in text)
            assert line.advantage == pytest.approx(rollouts.advantages[row].item(), abs=1e-4)
            assert "it" in line.prompt or "count" in line.prompt
            assert (path.parent / line.image).is_file()
            place += 1


def test_the_commands_show_it(tmp_path):
    path, batches, _ = train(tmp_path)
    for arguments in (
        ["report", str(path), "-o", str(tmp_path / "report.html")],
        ["show", str(path), "--index", "1"],
        ["segment", str(path)],
        ["weights", str(path), "--strength", "0.5"],
    ):
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0, (arguments, shown.output)
    # With the trainer's options the recorded log-probs give the weights that it trained with.
    weights = [
        row[mask] for rollouts, credit, *_ in batches for row, mask in zip(credit.weights, rollouts.mask, strict=True)
    ]
    for scored, expected in zip(
        score_rollouts(read_rollouts(path), CreditOptions(recompute=True)), weights, strict=True
    ):
        torch.testing.assert_close(torch.as_tensor(scored.weights).float(), expected, atol=1e-3, rtol=0)


def test_a_resumed_run_appends_and_a_new_one_replaces(tmp_path):
    output = str(tmp_path / "checkpoints")
    options = {"output_dir": output, "save_strategy": "steps", "save_steps": 1}
    path, _, _ = train(tmp_path, steps=1, **options)
    first = path.read_text()
    trainer = make_trainer(max_steps=2, srpo_rollouts=str(path), **options)
    trainer.train(resume_from_checkpoint=True)
    assert path.read_text().startswith(first)
    assert len(path.read_text()) > len(first)
    train(tmp_path, steps=1)
    assert path.read_text() == first


def test_evaluation_is_not_written(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    trainer = make_trainer(SRPOTrainer, srpo_rollouts=str(path))
    trainer.evaluate(trainer.train_dataset)
    assert not path.exists()
