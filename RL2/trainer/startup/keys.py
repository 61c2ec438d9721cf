"""The defaults, types and explanations of a trainer's keys."""

import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import RL2
from RL2.config.flat import as_text
from RL2.config.schema import SCHEMAS, Key, keys_of, structured

FOLDER = Path(RL2.__file__).parent / "trainer" / "config"

Names = Mapping[str, Mapping[str, str]]
"""By key: the names of its registry, each with what it means."""

NAMES = Path(__file__).with_name("names.yaml")
# Of a key with more names, only the names are shown.
_MOST_EXPLAINED = 9
_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def yaml_files(trainer: str) -> list[Path]:
    """The yaml files of a trainer, its own last."""
    path = FOLDER / f"{trainer}.yaml"
    base = OmegaConf.load(path).defaults[0]
    return [path] if base.endswith("_schema") else [*yaml_files(base), path]


def header(path: Path) -> str:
    """The comment at the top of a yaml file, without its marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    n = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:n])


def listed_names() -> Names:
    """The names that `reference` has written: the registries themselves import torch, which takes
    seconds."""
    return OmegaConf.to_container(OmegaConf.load(NAMES))


def defaults(trainer: str) -> dict[str, str]:
    """Every key of a trainer with its default, as on a command line; `${…}` unresolved."""
    schema = SCHEMAS[trainer]
    given = [OmegaConf.load(path) for path in yaml_files(trainer)]
    for node in given:
        node.pop("defaults"), node.pop("hydra", None)
    merged = OmegaConf.to_container(OmegaConf.merge(structured(schema), *given), enum_to_str=True)
    return {
        name: _written(_at(merged, name))
        for name, key in keys_of(schema).items()
        if not key.is_group
    }


def _at(tree: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _written(value: Any) -> str:
    return as_text(value).replace("e-0", "e-") or "''"  # 1e-6


def explanation(name: str, key: Key, names: Names) -> str:
    """What a key means, and the names that it takes."""
    if name not in names or "${" in str(key.default):
        return key.help
    if len(names[name]) > _MOST_EXPLAINED:
        return f"{key.help}: {' | '.join(names[name])}"
    said = (f"{one} ({meaning})" if meaning else one for one, meaning in names[name].items())
    return f"{key.help}: {' | '.join(said)}"


def type_in_words(name: str, key: Key, names: Names) -> str:
    """The values that a key takes, in words."""
    if key.takes is not None:
        return key.takes
    members = typing.get_args(key.kind) if isinstance(key.kind, types.UnionType) else (key.kind,)
    null = " or null" if type(None) in members else ""
    (member,) = [one for one in members if one is not type(None)]
    if name in names:
        several = "list of " if typing.get_origin(member) is list else ""
        return several + " | ".join(names[name]) + null
    if isinstance(member, type) and issubclass(member, Enum):
        return " | ".join(one.value for one in member) + null
    if typing.get_origin(member) is list:
        numbers = typing.get_args(member) == (float,)
        return ("list of numbers" if numbers else "list of texts") + null
    if typing.get_origin(member) is dict:
        return "mapping {name: value}" + null
    return _WORDS[member] + null
