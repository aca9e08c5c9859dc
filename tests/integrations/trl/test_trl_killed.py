"""A run that is killed with SIGKILL and resumed ends with the parameters and the file of a run that was not."""

import multiprocessing
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch

STEPS, KILLED = 4, 3  # generation batches; the one that kills, counted from 1


def run(folder: Path, kill: str | None, done: int) -> None:
    """Train in this process, from the checkpoint after `done` steps; in batch KILLED end it without any farewell."""
    from srpo_hf.policy import Policy
    from training import Rollouts, make_trainer

    from srpo_core.rollouts.line_file import LineFile

    torch.set_num_threads(1)

    trainer = make_trainer(
        # Transformers resumes Qwen2.5-VL without the weights that it saved under other names.
        family="qwen3_vl",
        max_steps=STEPS,
        output_dir=str(folder / "checkpoints"),
        save_strategy="steps",
        save_steps=1,
        srpo_rollouts=str(folder / "rollouts.jsonl"),
        srpo_scale="ema_rms",
        rollouts=Rollouts(calls=done),
    )
    credited, append, log_probs = trainer._srpo_credit, LineFile.append, Policy.log_probs
    batches = {"scored": done, "passes": 0, "written": done}

    def credit(*args):
        batches["scored"] += 1
        batches["passes"] = 0
        return credited(*args)

    def score(self, *args, **kwargs):
        found = log_probs(self, *args, **kwargs)
        batches["passes"] += 1
        if kill == "passes" and batches["scored"] == KILLED and batches["passes"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def write(self, lines):
        batches["written"] += 1
        if kill == "writing" and batches["written"] == KILLED:
            append(self, lines[: len(lines) // 2])  # one line and a part of another reach the disk
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, lines)

    with (
        mock.patch.object(trainer, "_srpo_credit", credit),
        mock.patch.object(Policy, "log_probs", score),
        mock.patch.object(LineFile, "append", write),
    ):
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoints/checkpoint-{done}") if done else None)
    torch.save([parameter.detach() for parameter in trainer.model.parameters()], folder / "parameters.pt")


def in_a_process(folder: Path, kill: str | None = None, done: int = 0) -> int | None:
    """Its exit status: 0, or minus the signal that ended it."""
    process = multiprocessing.get_context("spawn").Process(target=run, args=(folder, kill, done))
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert in_a_process(folder) == 0
    return folder


@pytest.mark.parametrize("kill", ["passes", "writing"])
def test_a_killed_run_resumes_to_the_same_parameters_and_the_same_file(undisturbed, tmp_path, kill):
    assert in_a_process(tmp_path, kill) == -signal.SIGKILL
    assert not (tmp_path / "parameters.pt").exists()
    done = max(int(each.name.split("-")[1]) for each in (tmp_path / "checkpoints").glob("checkpoint-*"))
    assert done == KILLED - 1
    left, whole = ((each / "rollouts.jsonl").read_bytes() for each in (tmp_path, undisturbed))
    assert left != whole
    assert left.endswith(b"\n") == (kill == "passes")  # the kill in the middle of writing tore a line
    assert in_a_process(tmp_path, done=done) == 0
    assert (tmp_path / "rollouts.jsonl").read_bytes() == whole
    resumed, expected = (torch.load(each / "parameters.pt") for each in (tmp_path, undisturbed))
    assert len(resumed) == len(expected) > 10
    assert all(torch.equal(one, other) for one, other in zip(resumed, expected, strict=True))
