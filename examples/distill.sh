#!/usr/bin/env bash
# Distils a teacher into a student that was trained less, without any reward, on a CPU in minutes:
#   bash examples/distill.sh                          topk_distillation: KL on its 16 likeliest tokens
#   bash examples/distill.sh gkd                      Jensen-Shannon divergence on these
#   bash examples/distill.sh on_policy_distillation   reverse KL of the sampled tokens, as advantage
# The task is to add two digits; the rewards of envs/gsm8k.py are only used to score the test set.
# Arguments after the first are overrides of the distillation: trainer.max_steps=5
# SEED (default 0) and OUT (default runs/distill) come from the environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_functions.sh"

algorithm=${1:-topk_distillation}
shift || true
seed=${SEED:-0} out=${OUT:-runs/distill}

source "$(dirname "${BASH_SOURCE[0]}")/_active.sh"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

echo "== 1. all sums of two digits, a tokenizer and an untrained model"
mkdir -p "$out"
for a in {0..9}; do for b in {0..9}; do
    echo "{\"question\": \"$a + $b\", \"answer\": \"#### $((a + b))\"}"
done; done >"$out/sums.jsonl"
python "$ROOT/examples/tiny_model.py" --data "$out/sums.jsonl" --out "$out/base" \
    --vocab 320 --width 64 --layers 2 --seed "$seed"

echo "== 2. the teacher learns 400 steps from worked answers, the student 60"
for run in teacher:400 student:60; do
    rl2_train sft "$out/${run%:*}" \
        data.path="$out/sums.jsonl" data.max_length=64 data.batch_size=50 \
        actor.model_name="$out/base" actor.max_length_per_device=4096 actor.lr=3e-3 \
        actor.gradient_checkpointing=false trainer.n_epochs=200 trainer.max_steps="${run#*:}" \
        trainer.seed="$seed" trainer.use_wandb=false trainer.num_threads=1
done

top_k=()
[[ $algorithm == on_policy_distillation ]] || top_k=(teacher.top_k=16)
score() { # <folder> <overrides>: a run that is scored on all sums
    local folder=$1
    shift
    rl2_train ppo "$folder" train_data.path="$out/sums.jsonl" test_data.path="$out/sums.jsonl" \
        train_data.prompts_per_rollout=100 actor.max_length_per_device=4096 \
        actor.gradient_checkpointing=false rollout.train_sampling_params.max_new_tokens=8 \
        trainer.n_epochs=400 trainer.test_freq=50 trainer.seed="$seed" trainer.use_wandb=false \
        trainer.show_samples=0 trainer.num_threads=1 "$@" rollout.env_path="$ROOT/envs/gsm8k.py"
}
echo "== 3. $algorithm: the student answers, the teacher judges each token"
score "$out/$algorithm" algorithm="$algorithm" actor.model_name="$out/student/final" \
    teacher.model_name="$out/teacher/final" "${top_k[@]}" actor.lr=1e-3 \
    actor.scheduler=cosine trainer.max_steps=400 "$@"
score "$out/of_teacher" actor.model_name="$out/teacher/final" trainer.max_steps=1

echo "== 4. the student before and after, and under 'before' the teacher"
python "$ROOT/examples/report.py" "$out/$algorithm" "$out/of_teacher" --png "$out/$algorithm.png"
