#!/usr/bin/env bash
# Everything about the OpenRLHF adapter, from nothing, on a CPU: an environment of its own (5 minutes), the adapter's
# tests, OpenRLHF's own tests with the hook active, and whole runs with Ray and DeepSpeed (15 minutes or more).
# Ends with a line that says what held.
set -euo pipefail
cd "$(dirname "$0")/../../.."
HERE=tests/integrations/openrlhf
./$HERE/environment.sh

PYTHON=$PWD/.venv-openrlhf/bin/python
FOLDER=${1:-$(mktemp -d /tmp/srpo_openrlhf.XXXX)}
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1

$PYTHON -m pytest -q -p no:cacheprovider $HERE integrations/srpo_openrlhf/options.py

PACKAGES=$($PYTHON -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
(cd "$FOLDER" && PYTHONPATH=$OLDPWD/$HERE/cpu $PYTHON -m pytest -q -p hooked -p no:cacheprovider -c /dev/null \
    --rootdir "$PACKAGES" --confcutdir "$PACKAGES/tests" "$PACKAGES/tests")

$PYTHON $HERE/runs.py "$FOLDER"
echo "held: stock loop on a CPU, strength 0 identical, dp 2, async, packed text, OpenRLHF's own tests (logs in $FOLDER)"
