# Functions that the shell scripts share; sourcing this file installs nothing. With -h or --help among
# the script's arguments it prints the comment at the top of the script, and ends.

for rl2_argument in "$@"; do
    if [[ $rl2_argument == -h || $rl2_argument == --help ]]; then
        sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"
        exit 0
    fi
done

rl2_die() {
    echo "RL2 install: $*" >&2
    exit 1
}

# Sizes of the two builds of torch with their dependencies, on Linux on x86-64, for the pins.
RL2_CUDA_SIZE="2.7 GB to download, 4.4 GB on disk" RL2_CPU_SIZE="0.2 GB, 0.7 GB on disk"

# rl2_pip <python> <log file> <arguments>: quiet pip; its last lines are shown if it fails.
rl2_pip() {
    local python=$1 log=$2
    shift 2
    PIP_USE_PEP517=1 "$python" -m pip install --quiet --disable-pip-version-check \
        --no-input --no-deps --no-compile "$@" >"$log" 2>&1 && return
    tail -n 20 "$log" >&2
    return 1
}

# rl2_torch <python> <log file> <cpu|cuda>: the pinned torch. The CPU build for Linux is not in the
# registry that pip asks by default, and the CUDA build, which is, runs on CPUs as well.
rl2_torch() {
    local python=$1 log=$2 device=$3 shown
    if [[ $device == cpu ]]; then
        shown=$(rl2_pip "$python" "$log" --require-hashes -r requirements/torch-cpu.txt 2>&1) && return
        if ! grep -q "No matching distribution found for torch==.*+cpu" "$log"; then
            echo "$shown" >&2
            rl2_die "pip could not install requirements/torch-cpu.txt; see above"
        fi
        echo "RL2 install: pip finds no CPU build of torch, so this takes the CUDA build, which runs" \
            "on CPUs as well: $RL2_CUDA_SIZE. For the CPU build ($RL2_CPU_SIZE) stop this and point" \
            "pip to PyTorch's CPU wheel index: PIP_EXTRA_INDEX_URL=<its address, see" \
            "pytorch.org/get-started>" >&2
    fi
    rl2_pip "$python" "$log" --require-hashes -r requirements/gpu.txt ||
        rl2_die "pip could not install requirements/gpu.txt; see above"
}

# rl2_train <trainer> <folder> key=value...: a run of RL2.trainer.<trainer> that writes its results to
# the folder. A finished run of the same command is kept, and an interrupted one resumes from its newest
# checkpoint; any other command starts anew. <folder>.command records the command; its time
# distinguishes this command's results from older ones.
rl2_train() {
    local trainer=$1 folder=$2 command start=null
    shift 2
    command=$(rl2_described "$trainer" "$@")
    if [[ ! -f $folder.command || $(<"$folder.command") != "$command" ]]; then
        mkdir -p "$(dirname "$folder")"
        echo "$command" >"$folder.command"
    elif [[ $folder/final/config.json -nt $folder.command ]]; then
        echo "(kept from an earlier run: $folder; remove it to train anew)"
        return
    elif [[ $folder/checkpoints/latest -nt $folder.command ]]; then
        start=latest
    fi
    python -m RL2.trainer."$trainer" \
        trainer.save_dir="$folder" trainer.load_ckpt_from="$start" "$@"
}

# Prints the words of a command, with a checksum after each that names a file or a model's folder.
rl2_described() {
    local word file
    for word in "$@"; do
        echo "$word"
        for file in "${word#*=}" "${word#*=}/model.safetensors"; do
            if [[ -f $file ]]; then cksum <"$file"; fi
        done
    done
}
