#!/usr/bin/env bash
# SRPO in verl on a CPU, from nothing: an environment of its own, the tests inside one process, then verl's real command
# line with Ray: one and two workers, SRPO, strength 0, GRPO, and two runs that must fail. 15 to 30 minutes on two cores.
# The environment holds the versions that verl's engines pin (engine_pins.txt), installed before this package.
#   bash tests/integrations/verl/run.sh [WORK]      WORK keeps logs and records; default: a temporary folder
#   bash tests/integrations/verl/run.sh --tests     the environment and the tests inside one process only
# VERL_VENV and BASE_PYTHON say where the environment is made, and of which Python (3.11 or newer).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
venv=${VERL_VENV:-$root/.venv-verl}
export PYTHON=$venv/bin/python OMP_NUM_THREADS=1

if [[ ! -e $venv/installed ]]; then
  "${BASE_PYTHON:-python3.11}" -m venv "$venv"
  # As a user has it: verl beside what its engine extras pin. The extras themselves want CUDA, so their other needs are
  # named one by one. PyPI's torch is a CUDA build of some 5 GB, which also runs on a CPU.
  "$PYTHON" -m pip install --quiet --requirement "$here/engine_pins.txt" \
    'verl>=0.9.1,<0.10' TransferQueue pyzmq msgspec cachetools fastapi uvicorn
  # Then this package, by pip's resolver and without a constraint: it must leave the pinned versions alone.
  "$PYTHON" -m pip install --quiet --editable "$root[verl,cli]" pytest hypothesis
  "$PYTHON" - "$here/engine_pins.txt" <<'PYTHON'
import sys
from importlib.metadata import version

pins = dict(line.split("==") for line in open(sys.argv[1]).read().splitlines() if not line.startswith("#"))
installed = {name: version(name).split("+")[0] for name in pins}
assert installed == pins, f"installing srpo-core[verl] changed {pins} to {installed}"
PYTHON
  touch "$venv/installed"
fi
echo "run.sh: $("$PYTHON" -m pip list 2>/dev/null | awk '$1 ~ /^(verl|torch|transformers|TransferQueue|ray)$/ {printf "%s %s  ", $1, $2}')"

"$PYTHON" -m pytest -q -W ignore "$here"
if [[ ${1:-} == --tests ]]; then
  echo "run.sh --tests: the tests inside one process held"
  exit
fi

work=${1:-$(mktemp -d)}
mkdir -p "$work"
work=$(cd "$work" && pwd)
rm -rf "$work"/record_* "$work"/srpo "$work"/*.log
(cd "$here" && "$PYTHON" -m verl_harness.tiny_vlm "$work" >"$work/model.log" 2>&1)

train() { # NAME MODE WORKERS [overrides...]
  local name=$1 mode=$2 workers=$3 status=0
  shift 3
  local began=$SECONDS
  "$here/train.sh" "$work" "$mode" "$workers" trainer.experiment_name="$name" "$@" >"$work/$name.log" 2>&1 || status=$?
  echo "exit status $status" >>"$work/$name.log"
  echo "$name: exit status $status after $((SECONDS - began)) s"
}

SRPO_VERL_RECORD=$work/record_one train srpo_one srpo 1 +algorithm.srpo.strength=1 \
  +algorithm.srpo.rollouts="$work/rollouts.jsonl"
train zero_one srpo 1 +algorithm.srpo.strength=0 +algorithm.srpo.reliance_spans=2
train grpo_one sync 1
# Two workers, uneven groups (so verl pads the batch), importance sampling against the rollout engine.
correction=algorithm.rollout_correction
train zero_two srpo 2 +scripted_uneven=true $correction.rollout_is=token +algorithm.srpo.strength=0
train grpo_two sync 2 +scripted_uneven=true $correction.rollout_is=token
# The same, old log-probs taken from the rollout engine, the perception dropped, and reliance.
SRPO_VERL_RECORD=$work/record_two train srpo_two srpo 2 +scripted_uneven=true $correction.bypass_mode=true \
  +algorithm.srpo.counterfactual=drop +algorithm.srpo.reliance_spans=2
train wrong_option srpo 1 +algorithm.srpo.strenght=1
SRPO_VERL_FAIL_WORKER=1 train failing_worker srpo 1

PYTHONPATH=$here VERL_USE_EXTERNAL_MODULES=verl_harness.platform VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda \
  HF_HUB_OFFLINE=1 "$PYTHON" "$here/check_runs.py" "$work" 2>"$work/check.log" || { tail -5 "$work/check.log"; exit 1; }
"$venv/bin/srpo" segment "$work/rollouts.jsonl"
echo "run.sh: SRPO held in verl $("$PYTHON" -m pip show verl | sed -n 's/^Version: //p'): two steps from the command" \
  "line, weights proved to reach the update, strength 0 = GRPO with 1 and 2 workers, weights = srpo_core, log-probs =" \
  "one by one, no pixels on the driver"
