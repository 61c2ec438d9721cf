#!/usr/bin/env bash
# Section 3.3, a short run that shows whether everything works: 10 steps of 16 prompts.
# NPROC=4 bash examples/gsm8k_0p5_test.sh [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_active.sh"

torchrun \
    --nproc_per_node="${NPROC:-1}" \
    -m RL2.trainer.spo_0p5 \
    train_data.path=train@openai/gsm8k:main \
    train_data.prompts_per_rollout=16 \
    train_data.responses_per_prompt=1 \
    test_data.path=test@openai/gsm8k:main \
    test_data.prompts_per_rollout=16 \
    test_data.responses_per_prompt=1 \
    test_data.max_examples=64 \
    actor.model_name=Qwen/Qwen3-4B-Thinking-2507 \
    actor.use_liger_kernel=true \
    actor.max_length_per_device=4608 \
    actor.avg_level=sequence \
    actor.entropy.coef=0 \
    rollout.train_sampling_params.max_new_tokens=4096 \
    rollout.env_path="$ROOT/envs/gsm8k.py" \
    rollout.gpu_memory_utilization=0.3 \
    trainer.project=GSM8K \
    trainer.experiment_name=section_3.3_test \
    trainer.max_steps=10 \
    trainer.test_freq=5 \
    "$@"
