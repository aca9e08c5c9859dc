"""These tests need TRL, which has an environment of its own: `bash tests/integrations/trl/run.sh` makes it."""

import importlib.util
import os

collect_ignore_glob = [] if importlib.util.find_spec("trl") else ["*.py"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
