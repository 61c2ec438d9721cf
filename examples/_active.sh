# For scripts that run in the user's own environment, such as one with a rollout engine: uses the
# Python that comes first on PATH if it can run RL2, otherwise makes .venv (_install.sh).
#
#   source "$(dirname "${BASH_SOURCE[0]}")/_active.sh"     # from a script in examples/
#
# Afterwards `python` and `torchrun` are those of that environment, $ROOT is the repository, and the
# working directory is unchanged.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/examples/_functions.sh"

if command -v torchrun >/dev/null && PYTHONPATH=$ROOT python -c \
    'from RL2.trainer.main import check_versions; check_versions()' >/dev/null 2>&1; then
    export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
else
    source "$ROOT/examples/_install.sh"
    cd "$OLDPWD" || exit 1
fi
