#!/usr/bin/env bash
# From nothing to a verdict: makes .venv-swift, installs this package and ms-swift, runs every test of the adapter.
#
#   bash tests/integrations/swift/run.sh                # all tests; ms-swift takes long to import, and each run does so
#   bash tests/integrations/swift/run.sh -k settings    # arguments go to pytest
#
# No GPU, no network but the package registry, no torchvision.
set -euo pipefail
cd "$(dirname "$0")/../../.."
export HF_HUB_OFFLINE=1 USE_HF=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
python=.venv-swift/bin/python

[ -x $python ] || python3 -m venv .venv-swift
if ! $python -c "import msgspec, pytest, hypothesis, rich, typer, orjson, srpo_swift; from importlib.metadata import version; version('ms-swift')" 2>/dev/null; then
  # msgspec: ms-swift's GRPO imports it and does not ask for it.
  $python -m pip install -q -c constraints.txt -e ".[swift,cli]" "ms-swift==4.6.0" msgspec pytest hypothesis
fi

$python -m pytest -q -W ignore -p no:cacheprovider integrations/srpo_swift/options.py integrations/srpo_swift/__main__.py \
  tests/integrations/swift "$@"
$python -c "
from importlib.metadata import version
print('held: srpo_swift on ms-swift', version('ms-swift'), 'with trl', version('trl'), 'and torch', version('torch'))
"
