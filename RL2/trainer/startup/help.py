"""`--help`: every key with its default and its explanation."""

import shutil
import textwrap
from collections.abc import Sequence

from RL2.config.presets import GROUP, preset_names, read_preset
from RL2.config.schema import SCHEMAS, keys_of
from RL2.trainer.startup.keys import defaults, explanation, header, listed_names, yaml_files

_WIDEST = 100


def asks_for_help(argv: Sequence[str]) -> bool:
    return any(word in ("--help", "-h") for word in argv)


def help_text(trainer: str, argv: Sequence[str] = ()) -> str:
    """The keys of a trainer, each with its default and its explanation.

    argv: the command line. If it has words that are neither flags nor overrides, only keys that
        mention one of them are shown.
    """
    words = [word.lower() for word in argv if not word.startswith("-") and "=" not in word]
    width = min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns)
    values, names = defaults(trainer), listed_names()
    lines = [
        f"python -m RL2.trainer.{trainer} key=value ...",
        f"torchrun --nproc_per_node=N -m RL2.trainer.{trainer} key=value ...",
        "",
        header(yaml_files(trainer)[-1]),
        "",
        *_algorithms(trainer, width),
        "Keys and their defaults; ??? must be set, ${key} follows another key.",
    ]
    group = None
    for name, key in keys_of(SCHEMAS[trainer]).items():
        if key.is_group:
            continue
        said = explanation(name, key, names)
        if words and not any(word in f"{name} {said}".lower() for word in words):
            continue
        if name.partition(".")[0] != group:
            group = name.partition(".")[0]
            lines.append("")
        lines.append(f"{name}={values[name]}")
        lines += textwrap.wrap(
            said, width, initial_indent=" " * 4, subsequent_indent=" " * 4,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    lines += [
        "",
        "--help WORD shows the keys that mention WORD, --cfg job the config that a command makes,",
        "--hydra-help hydra's flags: several values at once (--multirun), yaml files of your own.",
    ]
    return "\n".join(lines) + "\n"


def _algorithms(trainer: str, width: int) -> list[str]:
    names = [name for name in preset_names() if read_preset(name).trainer == trainer]
    if not names:
        return []
    said = (
        f"{GROUP}=NAME sets the keys of one algorithm, under those of the command line: "
        f"{' | '.join(names)} (`python -m RL2.trainer.algorithms` says what they are)."
    )
    return [*textwrap.wrap(said, width, break_long_words=False, break_on_hyphens=False), ""]
