#!/usr/bin/env bash
# The suite on the oldest torch, numpy, einops, jaxtyping and beartype that pyproject.toml allows, in an environment of its
# own. Ends with a line that says what held. Ten minutes and 5 GB: from PyPI, torch comes with its CUDA libraries.
#   bash tests/floor.sh          the published floor
#   bash tests/floor.sh 2.11     another version
set -euo pipefail
cd "$(dirname "$0")/.."
others=$(sed -n 's/^ *"\(numpy\|einops\|jaxtyping\|beartype\)>=\([0-9.]*\)",$/\1==\2.*/p' pyproject.toml | sed 's/\(\.[0-9]*\.[0-9]*\)\.\*$/\1/')
version=${1:-$(sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)}
venv=.venv-floor-$version
if [[ ! $venv/installed -nt pyproject.toml ]]; then
  "${PYTHON:-python3.11}" -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check "torch==$version.*" $others -e '.[dev]'
  touch "$venv/installed"
fi
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$venv/bin/python" -m pytest -q -p no:cacheprovider -n 2 --dist worksteal
echo "held: the suite on torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)'), $(echo $others)"
