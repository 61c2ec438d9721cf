"""The command `rl2 <trainer> key=value …`, for one process (torchrun: `-m RL2.trainer.spo`)."""

import sys

from RL2.config.schema import SCHEMAS
from RL2.config.streams import keep_streams
from RL2.trainer.main import run

USAGE = f"""\
usage: rl2 <trainer> key=value ...
trainers: {", ".join(SCHEMAS)}

rl2 <trainer> --help       the flags, and all keys with their defaults
rl2 <trainer> --cfg job    what a command amounts to
Several processes: torchrun --nproc_per_node=N -m RL2.trainer.<trainer> key=value ...
"""


def main() -> None:
    """Run the trainer that the first argument names, with the others as its command line."""
    keep_streams()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(USAGE)
    elif name in SCHEMAS:
        sys.argv = [f"rl2 {name}", *sys.argv[2:]]
        run(name)
    else:
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)
        sys.exit(f"rl2: {shown}: unknown trainer; use one of {', '.join(SCHEMAS)}")
