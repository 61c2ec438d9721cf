# Makes .venv in the repository root and installs the pinned packages and RL2 into it, once.
#
#   source "$(dirname "${BASH_SOURCE[0]}")/_install.sh"     # from a script in examples/
#
# Afterwards the working directory is the repository root, as is $ROOT, and .venv/bin comes first
# on PATH, so `python`, `torchrun` and `pytest` are those of this environment.
#
#   PYTHON=python3.12 bash examples/quickstart.sh     chooses the interpreter (3.11 to 3.14)
#   RL2_DEVICE=cpu|cuda bash ...                      chooses the build of torch
#                                                     (default: cuda if nvidia-smi works; if pip
#                                                     finds no CPU build, it installs the CUDA build)
#
# If it is interrupted, it continues when a script is called again.

rl2_python_fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

# Prints the interpreter to use: $PYTHON, else the user's own python3, else the newest that fits.
rl2_find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        rl2_python_fits "$candidate" && command -v "$candidate" && return
    done
    rl2_die "${PYTHON:-python3} is not Python 3.11 to 3.14; install one, or name it: PYTHON=<path>"
}

rl2_install() {
    local device python stamp wanted log folder start=$SECONDS
    device=${RL2_DEVICE:-$(nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)}
    case $device in cpu | cuda) ;; *) rl2_die "RL2_DEVICE=$device: use cpu or cuda" ;; esac

    stamp=.venv/rl2-installed
    wanted=$(echo "$ROOT $device" | cat - pyproject.toml requirements/*.txt | cksum)
    [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]] && return

    if [[ -x .venv/bin/python ]]; then
        rl2_python_fits .venv/bin/python ||
            rl2_die ".venv does not hold Python 3.11 to 3.14; remove it and run again"
    else
        python=$(rl2_find_python) || exit 1
        echo "RL2 install: making .venv with $("$python" --version)" >&2
        "$python" -m venv .venv >/dev/null 2>&1 ||
            rl2_die "$python -m venv .venv failed; on Debian and Ubuntu install python3-venv"
    fi
    .venv/bin/python -m pip --version >/dev/null 2>&1 ||
        .venv/bin/python -m ensurepip >/dev/null 2>&1 ||
        rl2_die ".venv has no pip; remove it and run again"

    python=.venv/bin/python
    log=.venv/rl2-install.log
    rm -f "$stamp"
    # pip writes RECORD last: without it a package is incomplete, but would count as installed.
    for folder in .venv/lib/python*/site-packages/*.dist-info; do
        if [[ -d $folder && ! -f $folder/RECORD ]]; then rm -r "$folder"; fi
    done
    # pip would keep a CPU build in place of the CUDA build that gpu.txt names.
    if [[ $device == cuda ]] &&
        compgen -G '.venv/lib/python*/site-packages/torch-*+cpu.dist-info' >/dev/null; then
        $python -m pip uninstall --quiet --yes torch
    fi
    echo "RL2 install: pinned packages ($device); once, a few minutes" >&2
    # setuptools first: it builds the one package that ships no wheel, and RL2 itself.
    rl2_pip $python "$log" --require-hashes -r requirements/build.txt ||
        rl2_die "pip could not install setuptools; see above"
    rl2_torch $python "$log" "$device"
    rl2_pip $python "$log" --require-hashes --no-build-isolation -r requirements/base.txt ||
        rl2_die "pip could not install requirements/base.txt; see above"
    rl2_pip $python "$log" --no-build-isolation --editable . ||
        rl2_die "pip could not install RL2 itself; see above"
    echo "$wanted" >"$stamp"
    echo "RL2 install: done in $((SECONDS - start)) s" >&2
    if [[ $device == cuda ]]; then
        echo "RL2 install: flash-attn is left out (it takes long to build); to add it:" \
            '.venv/bin/python -m pip install --no-build-isolation -e ".[gpu]"' >&2
    fi
}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/examples/_functions.sh"
cd "$ROOT" || exit 1
rl2_install
export PATH="$ROOT/.venv/bin:$PATH"
