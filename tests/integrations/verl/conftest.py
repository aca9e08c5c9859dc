"""What needs verl is collected where verl is installed (run.sh makes such an environment); the rest runs everywhere."""

import importlib.util
import os
import sys

sys.path.insert(0, os.path.dirname(__file__))  # verl_harness

if importlib.util.find_spec("verl") is None:
    collect_ignore_glob = [
        *("test_verl_contract.py", "test_verl_engine.py", "test_verl_logs.py", "test_verl_loss_options.py"),
        *("verl_harness/*", "check_runs.py"),
    ]
else:
    collect_ignore_glob = ["verl_harness/*", "check_runs.py"]
    # verl reads them while it is imported.
    os.environ.update(
        VERL_USE_EXTERNAL_MODULES="verl_harness.platform",
        VERL_PLATFORM="cpu",
        VERL_ENGINE_DEVICE="cuda",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
