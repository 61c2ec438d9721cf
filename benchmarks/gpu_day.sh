#!/usr/bin/env bash
# All that has to be measured and checked on a GPU, in resumable parts of under ten minutes:
#   bash benchmarks/gpu_day.sh               every part that has no report yet
#   bash benchmarks/gpu_day.sh --help        what else it takes
#   RL2_PYTHON=<interpreter> bash …          an environment that is there already: nothing is installed
# Without RL2_PYTHON it makes .venv with the CUDA packages first, as the examples do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${RL2_PYTHON:-} ]]; then
    for argument in "$@"; do
        case $argument in -h | --help | --list) RL2_PYTHON=python3 ;; esac
    done
fi
if [[ -z ${RL2_PYTHON:-} ]]; then
    source examples/_install.sh
    RL2_PYTHON=.venv/bin/python
fi
exec "$RL2_PYTHON" benchmarks/gpu_day.py "$@"
