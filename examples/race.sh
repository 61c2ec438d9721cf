#!/usr/bin/env bash
# Races the algorithms of docs/algorithms.md on the quickstart's task, on a CPU:
#   bash examples/race.sh
# Each trains on a few problems with several seeds. All are compared at equal generated tokens, on
# these problems and on others; the table is printed and written to <OUT>/table.md. Left out are those
# that need a teacher, pairs or several rewards, and corrections between engine and trainer, which are
# one model here. Arguments are overrides of all runs: trainer.max_steps=10
# From the environment come ALGORITHMS, SEEDS (default "0 1 2"), PROBLEMS (default 32; 32768 are all of
# them), LR of the policy gradients (default 5e-4), OUT (default runs/race) and JOBS, how many runs at
# a time (default 1). docs/race.md has the tables.
# The same command again resumes where it was interrupted, and keeps finished runs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_functions.sh"

out=${OUT:-runs/race} jobs=${JOBS:-1} problems=${PROBLEMS:-32} lr=${LR:-5e-4}
algorithms=${ALGORITHMS:-dr_grpo grpo dapo gspo gspo_token gmpo cispo sapo dppo dual_clip clip_cov \
    kl_cov entropy_80_20 rloo reinforce reinforce_pp reinforce_pp_baseline opo remax maxrl pass_k \
    ppo_critic spo spo_0p5 rank_jsd}

source "$(dirname "${BASH_SOURCE[0]}")/_install.sh"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

# One rate for all policy gradients; the losses towards a target collapse with it.
declare -A settings=(
    [spo]="actor.lr=1e-4 actor.avg_level=correct" [spo_0p5]="actor.lr=1e-5 actor.avg_level=correct"
    [rank_jsd]="actor.lr=1e-4 actor.avg_level=correct" [ppo_critic]="critic.lr=1e-3"
)

run() { # <seed> <algorithm> <overrides>
    local seed=$1 algorithm=$2
    shift 2
    # shellcheck disable=SC2086
    rl2_train ppo "$out/$seed/$algorithm" algorithm="$algorithm" \
        train_data.path="$out/$seed/problems.jsonl" train_data.prompts_per_rollout=32 \
        train_data.responses_per_prompt=8 test_data.path="$out/$seed/data/test.jsonl" \
        test_data.max_examples=256 actor.model_name="$out/$seed/warmup/final" \
        actor.max_length_per_device=8192 actor.gradient_checkpointing=false \
        actor.update_per_rollout=2 actor.lr="$lr" rollout.train_sampling_params.max_new_tokens=24 \
        rollout.train_sampling_params.top_p=0.9 rollout.env_path=envs/gsm8k.py \
        trainer.n_epochs=100 trainer.max_steps=30 trainer.test_freq=3 trainer.test_sampled=true \
        trainer.save_freq=30 trainer.keep_last=1 trainer.keep_best=false trainer.num_threads=1 \
        trainer.show_samples=0 trainer.seed="$seed" trainer.use_wandb=false \
        ${settings[$algorithm]:-} "$@" >"$out/$seed/$algorithm.log" 2>&1 ||
        { tail -n 5 "$out/$seed/$algorithm.log" >&2 && return 1; }
}

for seed in ${SEEDS:-0 1 2}; do
    echo "== seed $seed: problems, an untrained model, and a warm-up"
    python examples/word_problems.py --out "$out/$seed" --seed "$seed"
    head -n "$problems" "$out/$seed/data/train.jsonl" >"$out/$seed/problems.jsonl"
    python examples/tiny_model.py --data "$out/$seed/data/warmup.jsonl" --out "$out/$seed/base" \
        --vocab 512 --width 128 --layers 4 --seed "$seed"
    rl2_train sft "$out/$seed/warmup" \
        data.path="$out/$seed/data/warmup.jsonl" data.max_length=192 data.batch_size=32 \
        actor.model_name="$out/$seed/base" actor.max_length_per_device=8192 actor.lr=2e-3 \
        actor.gradient_checkpointing=false trainer.max_steps=400 trainer.seed="$seed" \
        trainer.num_threads=1 trainer.use_wandb=false
    for algorithm in $algorithms; do
        while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
        echo "== seed $seed: $algorithm"
        run "$seed" "$algorithm" "$@" &
    done
    while (($(jobs -rp | wc -l) > 0)); do wait -n; done
done

echo "== results"
python examples/race.py "$out" --out "$out/table.md"
