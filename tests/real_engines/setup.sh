#!/usr/bin/env bash
# Makes .venv-sglang or .venv-vllm in the repository root, once, for the tests against real servers:
#   bash tests/real_engines/setup.sh sglang            SGLang on CPU, with tests/real_engines/sglang_stand_in
#   bash tests/real_engines/setup.sh vllm              vLLM's CPU build
#   PYTHON=<path> bash tests/real_engines/setup.sh ... chooses the interpreter
# Both are for Linux on x86-64. Nothing of RL2 goes in: a server is a program of its own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../examples/_functions.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

die() {
    echo "engines: $*" >&2
    exit 1
}

engine=${1:-}
case $engine in
    sglang) newest=11 versions="Python 3.11" ;; # its wheel is for no other
    vllm) newest=13 versions="Python 3.11 to 3.13" ;;
    *) die "name an engine: bash tests/real_engines/setup.sh sglang|vllm" ;;
esac
[[ $(uname -sm) == "Linux x86_64" ]] || die "$engine: the pinned packages are for Linux on x86-64"

fits() {
    "$1" -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $newest))" 2>/dev/null
}

venv=.venv-$engine
stamp=$venv/rl2-installed
log=$venv/rl2-install.log
wanted=$(cat requirements/torch-cpu.txt "requirements/engines/$engine.txt" | cksum)
[[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]] && exit

if [[ -x $venv/bin/python ]]; then
    fits "$venv/bin/python" || die "$venv does not hold $versions; remove it and run again"
else
    python=
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13 python}; do
        fits "$candidate" && python=$candidate && break
    done
    [[ -n $python ]] ||
        die "$engine needs $versions, which ${PYTHON:-none on PATH} is not; install it, or name" \
            "it: PYTHON=<path> bash tests/real_engines/setup.sh $engine"
    echo "engines: making $venv with $("$python" --version)" >&2
    "$python" -m venv "$venv" >/dev/null 2>&1 ||
        die "$python -m venv $venv failed; on Debian and Ubuntu install python3-venv"
fi
"$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
    "$venv/bin/python" -m ensurepip >/dev/null 2>&1 ||
    die "$venv has no pip; remove it and run again"

rm -f "$stamp"
start=$SECONDS
echo "engines: pinned packages of $engine; once, a few minutes" >&2
rl2_torch "$venv/bin/python" "$log" cpu
rl2_pip "$venv/bin/python" "$log" --require-hashes -r "requirements/engines/$engine.txt" ||
    die "pip could not install requirements/engines/$engine.txt; see above"
echo "$wanted" >"$stamp"
echo "engines: $venv is ready after $((SECONDS - start)) s" >&2
