"""`--help`: every key with its default and what `config/*.yaml` says of it."""

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

_FOLDER = Path(__file__).parents[1] / "config"
_WIDEST = 100


def asks_for_help(argv: Sequence[str]) -> bool:
    return any(word in ("--help", "-h") for word in argv)


def help_text(config_name: str, argv: Sequence[str] = ()) -> str:
    """The keys of a trainer, each with its default and its explanation.

    argv: words in it that are neither flag nor override choose the keys: those whose name or
        explanation holds one of them.
    """
    words = [word.lower() for word in argv if not word.startswith("-") and "=" not in word]
    width = min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns)
    values = _values(config_name)
    lines = [
        f"python -m RL2.trainer.{config_name} key=value ...",
        f"torchrun --nproc_per_node=N -m RL2.trainer.{config_name} key=value ...",
        "",
        "Keys and their defaults; ??? has to be given, ${key} follows another key.",
    ]
    group = None
    for key, explanation in _explanations(config_name).items():
        if words and not any(word in f"{key} {explanation}".lower() for word in words):
            continue
        if key.partition(".")[0] != group:
            group = key.partition(".")[0]
            lines.append("")
        lines.append(f"{key}={values[key]}")
        lines += textwrap.wrap(
            explanation, width, initial_indent=" " * 4, subsequent_indent=" " * 4,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    lines += [
        "",
        "--help WORD shows the keys that speak of WORD, --cfg job the config that a command makes,",
        "--hydra-help hydra's flags: several values at once (--multirun), yaml files of your own.",
    ]
    return "\n".join(lines) + "\n"


def _chain(config_name: str) -> list[Path]:
    """The yaml files behind a trainer, that of its own last."""
    path = _FOLDER / f"{config_name}.yaml"
    base = OmegaConf.load(path).defaults[0]
    return [path] if base.endswith("_schema") else [*_chain(base), path]


def _values(config_name: str) -> dict[str, str]:
    """Every key with its default, as one would write it."""
    merged = OmegaConf.merge(*(OmegaConf.load(path) for path in _chain(config_name)))
    found: dict[str, str] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for name, value in node.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = _written(value)

    walk(OmegaConf.to_container(merged, resolve=False), "")
    return found


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace("e-0", "e-") or "''"  # 1e-6


def _explanations(config_name: str) -> dict[str, str]:
    """Every key with its comment, in the order of the file that has them all."""
    found: dict[str, str] = {}
    for path in _chain(config_name):
        parents: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            code, _, comment = line.partition(" # ")
            name, colon, value = code.strip().partition(":")
            if not colon or not name.isidentifier():
                continue
            depth = (len(code) - len(code.lstrip())) // 2
            parents = [*parents[:depth], name]
            key = ".".join(parents)
            if value.strip() and parents[0] not in ("hydra", "defaults"):
                said = [found.get(key, ""), comment.strip()]
                if all(said):
                    said[1] = f"in {config_name}: {said[1]}"
                found[key] = "; ".join(filter(None, said))
    return found
