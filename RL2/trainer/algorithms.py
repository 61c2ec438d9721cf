"""Lists the algorithms that `algorithm=<name>` chooses: `python -m RL2.trainer.algorithms`.

With `--json` everything that docs/algorithms.md says about them. Names as arguments choose some.
"""

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from RL2.config.presets import check_preset, preset_names, read_preset
from RL2.runtime.errors import ConfigError

USAGE = "usage: python -m RL2.trainer.algorithms [--json] [NAME ...]\n"


def listed(argv: Sequence[str]) -> str:
    """What the command with these arguments writes.

    Raises:
        ConfigError: an unknown name or flag.
    """
    if "--help" in argv or "-h" in argv:
        return USAGE
    names = [word for word in argv if word != "--json"]
    if flags := [word for word in names if word.startswith("-")]:
        raise ConfigError(f"{flags[0]}: unknown flag; the flags are --json and --help")
    known = preset_names()
    for name in names:
        check_preset(name, read_preset(name).trainer if name in known else "ppo")
    presets = [read_preset(name) for name in names or known]
    if "--json" in argv:
        return json.dumps([asdict(one) for one in presets], indent=2) + "\n"
    lines = []
    for one in presets:
        lines.append(f"{one.name}: {one.what}" + f" ({one.trainer})" * (one.trainer != "ppo"))
        lines += textwrap.wrap(
            " ".join(one.overrides) or "(the trainer's defaults)", 100,
            initial_indent="    ", subsequent_indent="    ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        sys.stdout.write(listed(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(str(error))
