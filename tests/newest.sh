#!/usr/bin/env bash
# The suite on the newest versions of everything, in an environment of its own: what a user gets who installs today. Ends
# with a line that says what held. Ten minutes and 5 GB, as tests/floor.sh.
#   bash tests/newest.sh         the newest releases
#   bash tests/newest.sh --pre   with pre-releases
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-newest
"${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager "$@" -e '.[dev]'
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$venv/bin/python" -m pytest -q -p no:cacheprovider -n 2 --dist worksteal
echo "held: the suite on $("$venv/bin/pip" list --format freeze 2>/dev/null |
  grep -E '^(torch|numpy|einops|jaxtyping|beartype)==' | tr '\n' ' ')"
