"""These tests need ms-swift, which has an environment of its own: `bash tests/integrations/swift/run.sh` makes it."""

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
collect_ignore_glob = ["own_plugin.py"] if importlib.util.find_spec("swift") else ["*.py"]

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "USE_HF": "1"}
sys.path.append(str(HERE.parent / "trl"))  # for its tiny models, which need transformers alone
