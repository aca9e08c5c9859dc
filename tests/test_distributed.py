"""Real processes of gloo compute what one process computes: tests/distributed/equivalence.py, its quick cases."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

SCRIPT = Path(__file__).parent / "distributed" / "equivalence.py"


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch was built without gloo")
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_1_2_and_4_processes_compute_the_same_loss_gradients_and_metrics():
    """DDP, FSDP2 and a shared vocabulary; ragged rows, accumulation, processes without a response."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "held: 42 comparisons on 1, 2 and 4 processes within 1e-06" in done.stdout
