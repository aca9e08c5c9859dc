"""Leaves out what needs OpenRLHF where it is not installed; environment.sh makes one that has it, without CUDA."""

import importlib.util
import sys
from pathlib import Path

collect_ignore_glob = ["cpu/*", "runs.py"]
if importlib.util.find_spec("openrlhf") is None:
    collect_ignore_glob.append("test_openrlhf_experience.py")
elif importlib.util.find_spec("vllm") is None:
    sys.path.insert(0, str(Path(__file__).parent / "cpu"))
