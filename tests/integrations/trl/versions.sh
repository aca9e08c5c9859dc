#!/usr/bin/env bash
# Strength 0 against GRPOTrainer, bit for bit, on several TRL versions, each in an environment of its own.
#
#   bash tests/integrations/trl/versions.sh                 # the versions of docs/how-to/trl.md
#   bash tests/integrations/trl/versions.sh 1.14.2 1.16.0   # others
#
# Needs about 1.5 GB and a few minutes for each version. Ends with the rows of the table in docs/how-to/trl.md.
set -uo pipefail
cd "$(dirname "$0")/../../.."
export HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(1.0.0 1.5.1 1.9.2 1.12.0 1.14.2 1.16.0)

rows=()
failures=0
for version in "${versions[@]}"; do
  environment=.venv-trl-$version
  log=$environment/tests.log
  echo "== TRL $version"
  if [ ! -f "$environment/ready" ]; then
    python3 -m venv "$environment" &&
      "$environment/bin/pip" install -q --no-compile -c constraints.txt "trl==$version" peft pillow requests pytest hypothesis rich hatchling editables &&
      "$environment/bin/pip" install -q --no-compile --no-build-isolation -c constraints.txt -e ".[trl]" &&
      touch "$environment/ready"
  fi 2>&1 | grep -v "^WARNING"
  "$environment/bin/python" -m pytest -q -p no:cacheprovider -W ignore tests/integrations/trl/test_trl_parity.py \
    tests/integrations/trl/test_trl_contract.py >"$log" 2>&1
  status=$?
  [ $status -eq 0 ] || { failures=$((failures + 1)); tail -n 15 "$log"; }
  transformers=$("$environment/bin/python" -c "from importlib.metadata import version; print(version('transformers'))")
  rows+=("| $version | $transformers | $(grep -E '[0-9]+ (passed|failed|error)' "$log" | tail -n 1 | sed 's/,* [0-9]* warnings*//; s/ in .*//; s/=//g') |")
done
echo
echo "| TRL | transformers | strength 0 = GRPOTrainer, and contract |"
echo "|---|---|---|"
printf '%s\n' "${rows[@]}"
echo "$((${#versions[@]} - failures)) of ${#versions[@]} TRL versions hold"
exit $((failures > 0))
