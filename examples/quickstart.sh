#!/usr/bin/env bash
# Trains a tiny language model with rollouts, rewards and an Exploring Paths loss, from start to end,
# without a GPU, a hub or an account:
#   bash examples/quickstart.sh           spo: learn from correct samples, towards the likeliest token
#   bash examples/quickstart.sh ppo       Dr. GRPO, the baseline
#   bash examples/quickstart.sh spo_0p5   learn from correct samples, towards a probability of 0.5
#   bash examples/quickstart.sh all       all three from the same start, in one picture
# Arguments after the first are overrides of the training runs: trainer.max_steps=5
# SEED (default 0) and OUT (default runs/quickstart) come from the environment.
# The same command again resumes where it was interrupted, and keeps finished runs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_functions.sh"

which=${1:-spo}
shift || true
case $which in
    spo | ppo | spo_0p5) algorithms=$which ;;
    all) algorithms="ppo spo spo_0p5" ;;
    *) echo "quickstart: $which is not one of spo, ppo, spo_0p5, all" >&2 && exit 2 ;;
esac
seed=${SEED:-0} out=${OUT:-runs/quickstart}

source "$(dirname "${BASH_SOURCE[0]}")/_install.sh"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

echo "== 1. word problems, a tokenizer and an untrained model"
python examples/word_problems.py --out "$out" --seed "$seed"
python examples/tiny_model.py --data "$out/data/warmup.jsonl" --out "$out/base" \
    --vocab 512 --width 128 --layers 4 --seed "$seed"

echo "== 2. warm-up: supervised fine-tuning on worked answers"
rl2_train sft "$out/warmup" \
    data.path="$out/data/warmup.jsonl" data.max_length=192 data.batch_size=32 \
    actor.model_name="$out/base" actor.max_length_per_device=8192 \
    actor.lr=2e-3 actor.gradient_checkpointing=false \
    trainer.project=quickstart trainer.experiment_name=warmup \
    trainer.max_steps=400 trainer.save_freq=50 trainer.keep_last=1 \
    trainer.seed="$seed" trainer.use_wandb=false

# Sampling is limited to the likeliest 90 %: a wrong token in a sample that is still correct is its
# rarest one, and would get the largest update.
declare -A settings=(
    [spo]="train_data.prompts_per_rollout=512 actor.avg_level=correct actor.lr=1e-4"
    [spo_0p5]="train_data.prompts_per_rollout=512 actor.avg_level=correct actor.lr=1e-5"
    [ppo]="train_data.prompts_per_rollout=64 train_data.responses_per_prompt=8 actor.lr=1e-5"
)
runs=()
for algorithm in $algorithms; do
    echo "== 3. $algorithm: rollouts, rewards, updates, and an evaluation every 5 steps"
    # shellcheck disable=SC2086
    rl2_train "$algorithm" "$out/$algorithm" \
        train_data.path="$out/data/train.jsonl" test_data.path="$out/data/test.jsonl" \
        actor.model_name="$out/warmup/final" actor.max_length_per_device=8192 \
        actor.gradient_checkpointing=false \
        rollout.train_sampling_params.max_new_tokens=24 rollout.train_sampling_params.top_p=0.9 \
        rollout.env_path=envs/gsm8k.py \
        trainer.project=quickstart trainer.experiment_name="$algorithm" \
        trainer.max_steps=40 trainer.test_freq=5 trainer.test_sampled=true \
        trainer.save_freq=5 trainer.keep_last=1 trainer.seed="$seed" trainer.use_wandb=false \
        ${settings[$algorithm]} "$@"
    runs+=("$out/$algorithm")
done

echo "== 4. results"
python examples/report.py "${runs[@]}" --png "$out/$which.png"
