"""The command `rl2 <trainer> key=value …`, for one process (torchrun: `-m RL2.trainer.spo`)."""

import sys

from RL2 import __version__
from RL2.config.schema import SCHEMAS
from RL2.runtime.leaving import one_line_for_ctrl_c
from RL2.runtime.secrets import readable
from RL2.runtime.streams import keep_streams

USAGE = f"""\
usage: rl2 <trainer> key=value ...
trainers: {", ".join(SCHEMAS)}

rl2 <trainer> --help       the flags, and all keys with their defaults
rl2 <trainer> --cfg job    the config that a command results in
rl2 --version              the version of RL2
Several processes: torchrun --nproc_per_node=N -m RL2.trainer.<trainer> key=value ...
"""


def main() -> None:
    """Run the trainer that the first argument names, with the others as its command line."""
    one_line_for_ctrl_c()
    keep_streams()
    name, *others = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help") and others and others[0] in SCHEMAS:
        name, others = others[0], [*others[1:], "--help"]
    if name in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
    elif name in ("-V", "--version", "version"):
        sys.stdout.write(f"RL2 {__version__}\n")
    elif name in SCHEMAS:
        from RL2.trainer.main import run  # takes a second

        sys.argv = [f"rl2 {name}", *others]
        run(name)
    else:
        shown = readable(name)
        sys.exit(f"rl2: {shown}: unknown trainer; use one of {', '.join(SCHEMAS)}")
