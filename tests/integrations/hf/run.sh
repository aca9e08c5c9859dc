#!/usr/bin/env bash
# From nothing to a verdict: makes .venv-hf, installs this package and transformers, runs every test of the scorer.
#
#   bash tests/integrations/hf/run.sh              # all tests
#   bash tests/integrations/hf/run.sh -k prefix    # arguments go to pytest
#
# No GPU, no network but the package registry, no torchvision.
set -euo pipefail
cd "$(dirname "$0")/../../.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
python=.venv-hf/bin/python

[ -x $python ] || python3 -m venv .venv-hf
if ! $python -c "import transformers, PIL, peft, pytest, hypothesis, matplotlib, rich, typer, orjson, srpo_core" 2>/dev/null; then
  $python -m pip install -q --no-compile -c constraints.txt -e ".[cli,plot]" "transformers>=5.4" peft pillow pytest hypothesis
fi
if $python -c "import torchvision" 2>/dev/null; then
  echo "torchvision is installed in .venv-hf: beside a CPU build of torch it breaks transformers' imports" >&2
  exit 1
fi

$python -m pytest -q -W ignore -p no:cacheprovider integrations/srpo_hf tests/integrations/hf "$@"
$python -c "
from importlib.metadata import version
print('held: srpo_hf with transformers', version('transformers'), 'and torch', version('torch'))
"
