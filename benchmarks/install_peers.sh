#!/bin/sh
# Installs the peers of benchmarks/fused_loss.py, at the versions of its results page, into an environment of their own:
#     sh benchmarks/install_peers.sh && .venv-peers/bin/python -m benchmarks.fused_loss --help
# Their dependencies are left out where the measured code does not need them (verl wants Ray, for one).
set -eu
python=${PYTHON:-python3}
environment=${1:-.venv-peers}
"$python" -m venv "$environment"
pip="$environment/bin/pip --disable-pip-version-check"
$pip install --quiet torch==2.13.0 transformers accelerate datasets
$pip install --quiet --no-deps liger-kernel==0.8.5 trl==1.16.0 verl==0.9.1 triton==3.9.0
$pip install --quiet --editable . matplotlib rich typer
$pip list 2>/dev/null | grep --extended-regexp '^(torch|trl|liger-kernel|verl|transformers|srpo-core|triton) '
