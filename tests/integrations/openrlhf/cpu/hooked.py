"""``pytest -p hooked``: OpenRLHF's own tests with its experience maker imported and patched, as in a Ray worker."""

import importlib

from srpo_openrlhf import hooks

hooks.install()
importlib.import_module(hooks.TARGET)
