#!/usr/bin/env bash
# From nothing to a verdict: makes .venv-trl, installs this package and TRL, runs every test of the adapter.
#
#   bash tests/integrations/trl/run.sh              # all tests, then the example
#   bash tests/integrations/trl/run.sh -k parity    # arguments go to pytest; the example is then left out
#
# No GPU, no network but the package registry, no torchvision.
set -euo pipefail
cd "$(dirname "$0")/../../.."
export HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
python=.venv-trl/bin/python

[ -x $python ] || python3 -m venv .venv-trl
if ! $python -c "import trl, peft, pytest, hypothesis, rich, typer, srpo_trl" 2>/dev/null; then
  # Not the newest TRL there is: the newest that these tests have been run with.
  $python -m pip install -q --no-compile -c constraints.txt -e ".[trl]" "trl==1.16.*" peft pytest hypothesis rich typer
fi
if $python -c "import torchvision" 2>/dev/null; then
  echo "torchvision is installed in .venv-trl: beside a CPU build of torch it breaks transformers' imports" >&2
  exit 1
fi

$python -m pytest -q -W ignore -p no:cacheprovider tests/integrations/trl "$@"
if [ $# -eq 0 ]; then
  $python -W ignore -m srpo_trl.example --steps 3 --warm-up 30 --output "$(mktemp -d)" | tail -n 10
fi
$python -c "
from importlib.metadata import version
print('held: SRPOTrainer on TRL', version('trl'), 'with transformers', version('transformers'), 'and torch', version('torch'))
"
