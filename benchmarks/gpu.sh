#!/usr/bin/env bash
# Fills every row of the documentation that says "not measured", on one GPU, in under ten minutes. The environments take
# longer and are made once, before the clock starts:
#     bash benchmarks/gpu.sh                  # .venv-peers and .venv-trl, the measurements, the pages
#     SMALL=1 DEVICE=cpu bash benchmarks/gpu.sh   # every command in a small form on a CPU, with what is installed
# PEERS and TRL name the interpreters; where one lacks a peer, the table says "not installed". Each part has a limit of
# its own, so that one that hangs costs no other. Results lie in benchmarks/results/gpu/; copy the numbers to
# docs/explanation/fused_loss.md and docs/explanation/shared_prefixes.md, and say which card it was.
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda} small=${SMALL:-}
peers=${PEERS:-.venv-peers/bin/python} trl=${TRL:-.venv-trl/bin/python}
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out"
if [[ ! -x $peers ]]; then sh benchmarks/install_peers.sh .venv-peers; fi
if [[ ! -x $trl ]]; then
  "${PYTHON:-python3.11}" -m venv .venv-trl
  .venv-trl/bin/pip install --quiet --disable-pip-version-check -e '.[trl]' rich typer matplotlib
fi
if [[ -z $small ]]; then
  rounds=5 vocabulary=32000 tasks=train,log-probs,KL,JSD sizes=3,4,5 big=6 big_tasks=train slack=1 cells=0,2,9 prefix_rounds=3
  step=(--prompt 1024 --response 256 --perception 100 --group 8 --rounds 3)
else
  rounds=1 vocabulary=512 tasks=log-probs sizes=7 big=7 big_tasks=log-probs slack=5 cells=1 prefix_rounds=1
  step=(--prompt 256 --response 16 --perception 6 --group 2 --rounds 1)
fi
failed=()
started=$SECONDS

# part SECONDS NAME COMMAND...: runs it under a limit, with its output beside the results.
part() {
  local limit=$(($1 * slack)) name=$2 began=$SECONDS
  shift 2
  if timeout "$limit" "$@" > "$out/$name.log" 2>&1; then
    echo "$name: done in $((SECONDS - began)) s"
  else
    failed+=("$name")
    echo "$name: FAILED after $((SECONDS - began)) s of at most $limit, see $out/$name.log"
  fi
}

fused="$out/fused_loss.json"
# Capture and synchronization: the last row of the table of the fused loss.
part 60 cuda_graph "$peers" -m benchmarks.cuda_graph --device "$device" --vocabulary "$vocabulary"
# The size of the goals first: 16,384 tokens, width 3584, vocabulary 152k; training decides the first two rows.
part 150 fused_big "$peers" -m benchmarks.fused_loss time --device "$device" --rounds "$rounds" --sizes "$big" \
  --tasks "$big_tasks" --out "$fused"
part 60 fused_memory "$peers" -m benchmarks.fused_loss memory --device "$device" --sizes "$big" --out "$fused"
part 90 fused_small "$peers" -m benchmarks.fused_loss time --device "$device" --rounds "$rounds" --sizes "$sizes" \
  --tasks "$tasks" --out "$fused"
part 20 fused_page "$peers" -m benchmarks.fused_loss page --source "$fused"
part 120 shared_prefix "$trl" -m benchmarks.shared_prefix run --device "$device" --rounds "$prefix_rounds" \
  --cells "$cells" --out "$out/shared_prefix.json"
part 20 shared_prefix_page "$peers" -m benchmarks.shared_prefix page "$out/shared_prefix.json"
part 60 trl_step "$trl" -m benchmarks.trl_step run --device "$device" "${step[@]}" --output "$out/trl_step.json"
took=$((SECONDS - started))
if ((${#failed[@]})); then
  echo "failed after $took s: ${failed[*]}"
  exit 1
fi
echo "held: every part ran on $device in $took s; the numbers are in $out"
