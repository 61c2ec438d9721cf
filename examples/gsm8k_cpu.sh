#!/usr/bin/env bash
# The real GSM8K on a machine without a GPU: an untrained model of 2M parameters is fine-tuned on the
# training split, then trained with spo on its own rollouts. Such a small model solves few problems;
# the example shows the library on real text.
#   bash examples/gsm8k_cpu.sh                           train and test split from the hub
#   bash examples/gsm8k_cpu.sh train.jsonl test.jsonl    from files
#   bash examples/gsm8k_cpu.sh train.jsonl               the file's last tenth is held out as test
#   bash examples/gsm8k_cpu.sh train@owner/name:config test@owner/name:config
# key=value arguments are overrides of the spo run: trainer.max_steps=50
# From the environment: OUT (default runs/gsm8k_cpu), SEED (default 0), MODEL (options of
# tiny_model.py, MODEL="--vocab 4096 --width 256") and SFT (overrides, SFT="trainer.n_epochs=4").
# The same command again resumes where it was interrupted, and keeps finished runs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_functions.sh"

usage() {
    echo "gsm8k_cpu: $1" >&2
    sed -n 's/^#   bash/usage: bash/p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

# Absolute, because _install.sh changes to the repository root.
absolute() { [[ $1 == /* ]] && echo "$1" || echo "$PWD/$1"; }

data=() overrides=()
for argument in "$@"; do
    if [[ -f $argument ]]; then
        data+=("$(absolute "$argument")")
    elif [[ $argument == *@* && -f ${argument#*@} ]]; then
        data+=("${argument%%@*}@$(absolute "${argument#*@}")")
    elif [[ $argument == *=* ]]; then
        overrides+=("$argument")
    elif [[ $argument == *@* ]]; then
        data+=("$argument")
    else
        usage "$argument is not a file, split@name:config or key=value"
    fi
done
case ${#data[@]} in
    0) train=train@openai/gsm8k:main test=test@openai/gsm8k:main ;;
    1)
        [[ -f ${data[0]} ]] || usage "${data[0]}: name the test split as well"
        train="train[:90%]@${data[0]}" test="train[90%:]@${data[0]}"
        ;;
    2) train=${data[0]} test=${data[1]} ;;
    *) usage "${#data[@]} data sets, of which the third is ${data[2]}" ;;
esac
out=${OUT:-runs/gsm8k_cpu} seed=${SEED:-0}

source "$(dirname "${BASH_SOURCE[0]}")/_install.sh"
export TOKENIZERS_PARALLELISM=false
read -ra model <<<"--vocab 2048 --width 192 --layers 4 ${MODEL:-}"
read -ra sft <<<"${SFT:-}"

echo "== 1. a tokenizer and an untrained model for the texts of $train"
python examples/tiny_model.py --data "$train" --out "$out/base" --seed "$seed" "${model[@]}"

echo "== 2. supervised fine-tuning on the worked answers"
rl2_train sft "$out/sft" \
    data.path="'$train'" data.max_length=1024 data.batch_size=16 \
    actor.model_name="$out/base" actor.max_length_per_device=4096 \
    actor.lr=2e-3 actor.gradient_checkpointing=false \
    trainer.project=gsm8k_cpu trainer.experiment_name=sft \
    trainer.n_epochs=1 trainer.save_freq=50 trainer.keep_last=1 \
    trainer.seed="$seed" trainer.use_wandb=false \
    "${sft[@]}"

echo "== 3. spo: rollouts on the training prompts, greedy evaluation on the test set"
# Most steps have only a few correct samples; a step that has none is skipped.
rl2_train spo "$out/spo" \
    train_data.path="'$train'" train_data.prompts_per_rollout=128 \
    test_data.path="'$test'" test_data.max_examples=512 \
    actor.model_name="$out/sft/final" actor.max_length_per_device=4096 \
    actor.gradient_checkpointing=false \
    actor.avg_level=correct actor.entropy.coef=-0.1 actor.lr=1e-5 \
    rollout.train_sampling_params.max_new_tokens=256 rollout.env_path=envs/gsm8k.py \
    trainer.project=gsm8k_cpu trainer.experiment_name=spo \
    trainer.max_steps=20 trainer.test_freq=10 trainer.save_freq=5 trainer.keep_last=1 \
    trainer.seed="$seed" trainer.use_wandb=false \
    "${overrides[@]}"

echo "== 4. results"
python examples/report.py "$out/spo" --png "$out/spo.png"
