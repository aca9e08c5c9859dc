#!/usr/bin/env bash
# Builds .venv-openrlhf: OpenRLHF, DeepSpeed and Ray without CUDA, and this repository. Does nothing when it is there.
# A plain `pip install openrlhf` would build flash-attn, which needs nvcc: so without dependencies, then those it needs.
set -euo pipefail
cd "$(dirname "$0")/../../.."

VENV=.venv-openrlhf
STAMP=$VENV/installed
if [[ $STAMP -nt ${BASH_SOURCE[0]} ]]; then exit 0; fi

${PYTHON:-python3.11} -m venv "$VENV"
PIP="$VENV/bin/pip --quiet --disable-pip-version-check"
$PIP install "setuptools<82" wheel ninja py-cpuinfo hatchling
$PIP install --no-deps openrlhf==0.11.2
$PIP install torch==2.13.0 ray==2.55.0 aiohttp transformers==5.15.0 accelerate peft datasets einops jsonlines tqdm \
    torchmetrics torchdata pylatexenc tensorboard loralib optree pillow jaxtyping beartype typer rich pytest hypothesis
DS_BUILD_OPS=0 $PIP install --no-build-isolation deepspeed==0.19.6 torch==2.13.0
$PIP install --no-build-isolation --no-deps -e .
touch "$STAMP"
