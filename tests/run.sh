#!/usr/bin/env bash
# Installs into .venv where that is not done yet, and runs the tests; arguments go to pytest, with
# paths relative to the repository root:
#   bash tests/run.sh                       everything
#   bash tests/run.sh tests/ops -k packing  some
#   bash tests/run.sh engines               the rollout engines against real servers, whose
#                                           environments (.venv-vllm, .venv-sglang) it makes first
#   bash tests/run.sh engines vllm ...      one of them, beside the embedded engine
#   bash tests/run.sh faults                kills, full disks, damaged files, random rewards and
#                                           conversations: many more of each
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/_install.sh"

# One thread a process: the models of the tests are tiny, and more threads slow them down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# Nothing may reach for a hub, an account or a screen.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline MPLBACKEND=Agg

if [[ ${1:-} == engines ]]; then
    shift
    engines=(vllm sglang) selection=()
    if [[ ${1:-} == vllm || ${1:-} == sglang ]]; then
        engines=("$1") selection=(-k "$1 or transformers")
        shift
    fi
    for engine in "${engines[@]}"; do
        bash tests/real_engines/setup.sh "$engine"
    done
    set -- tests/real_engines "${selection[@]}" "$@"
else
    if [[ ${1:-} == faults ]]; then
        shift
        export RL2_FAULTS=long
        set -- tests/faults tests/envs/test_gsm8k_fuzz.py tests/rollout/test_player.py "$@"
    fi
    # The CPU build of torch does without triton, the tests of the Triton kernels (interpreted) do
    # not. Not for the engines: CI runs both at once, and two installations would meet.
    # The trackers of trainer.trackers, but wandb, which is always there: half a minute, 130 MB. And
    # TRL, which tests/parity compares with: one megabyte, what it needs is there.
    for extra in trackers trl; do
        cmp -s "requirements/$extra.txt" ".venv/rl2-$extra" ||
            { rl2_pip python ".venv/rl2-$extra.log" --require-hashes -r "requirements/$extra.txt" &&
                cp "requirements/$extra.txt" ".venv/rl2-$extra"; } ||
            echo "no $extra for this machine: the tests skip" >&2
    done
    python -c 'import triton' 2>/dev/null ||
        rl2_pip python .venv/rl2-triton.log --require-hashes -r requirements/triton.txt ||
        echo "no triton for this machine: the tests of the Triton kernels skip" >&2
fi
exec python -m pytest "$@"
