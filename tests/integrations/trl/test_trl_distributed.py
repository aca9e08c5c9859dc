"""Two processes on gloo give the weights and gradients of one process on the same rollouts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_worker import SCENARIOS

WORKER = str(Path(__file__).with_name("ddp_worker.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([*torchrun, WORKER, str(folder), "2"], [sys.executable, WORKER, str(folder), "1"]):
        run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        # Of several ranks one says in words what a step did.
        assert run.stdout.count("step 1: ") == len(SCENARIOS), run.stdout[-3000:]
    return folder


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_give_the_weights_and_gradients_of_one(folder, scenario):
    one, two = (torch.load(folder / f"{scenario}.{processes}.pt") for processes in (1, 2))
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two["advantages"], one["advantages"], rtol=1e-5, atol=1e-5)
    assert one["weights"].std() > 0.1
    flat = [torch.cat([gradient.flatten() for gradient in result["gradient"]]) for result in (one, two)]
    assert (flat[1] - flat[0]).norm() / flat[0].norm() <= 1e-5
    for name, value in one["metrics"].items():
        if name != "srpo/seconds":
            assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_rank_of_text_beside_one_of_images_is_refused_on_both(folder):
    for rank in (0, 1):
        assert (folder / f"mixed.{rank}.txt").read_text().startswith("rows [4, 5, 6, 7] of a generation batch have no")
