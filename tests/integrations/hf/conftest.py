"""These tests need transformers, in an environment of its own: `bash tests/integrations/hf/run.sh` makes it."""

import importlib.util
import os

collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["*.py"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
