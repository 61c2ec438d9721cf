"""What there is to say of the keys of a trainer: their defaults, types and explanations."""

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
from RL2.trainer.registries import registry_of

FOLDER = Path(RL2.__file__).parent / "trainer" / "config"

_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def yaml_files(trainer: str) -> list[Path]:
    """The yaml files behind a trainer, that of its own last."""
    path = FOLDER / f"{trainer}.yaml"
    base = OmegaConf.load(path).defaults[0]
    return [path] if base.endswith("_schema") else [*yaml_files(base), path]


def header(path: Path) -> str:
    """What a yaml file says at its top, without the marks of a comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    n = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:n])


def defaults(trainer: str) -> dict[str, str]:
    """Every key of a trainer with its default, as one would write it; `${…}` unresolved."""
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


def explanation(name: str, key: Key) -> str:
    """What a key means, and what the names are that it may have."""
    registry = registry_of(name)
    if registry is None or "${" in str(key.default):
        return key.help
    return f"{key.help}: {' | '.join(_with_meaning(*one) for one in registry.items())}"


def _with_meaning(name: str, entry: Any) -> str:
    """A name with the first words of the docstring behind it."""
    said = "" if entry is None or isinstance(entry, str) else entry.__doc__ or ""
    said = said.partition("\n")[0].partition(": ")[0].partition(" (")[0].rstrip(".,;")
    return (
        f"{name} ({said[:1].lower() + said[1:] if said[1:2].islower() else said})" if said else name
    )


def type_in_words(name: str, key: Key) -> str:
    """The values that a key takes, in words."""
    if key.takes is not None:
        return key.takes
    members = typing.get_args(key.kind) if isinstance(key.kind, types.UnionType) else (key.kind,)
    null = " or null" if type(None) in members else ""
    (member,) = [one for one in members if one is not type(None)]
    if (names := registry_of(name)) is not None:
        return " | ".join(names) + null
    if isinstance(member, type) and issubclass(member, Enum):
        return " | ".join(one.value for one in member) + null
    if typing.get_origin(member) is list:
        return "list of texts" + null
    if typing.get_origin(member) is dict:
        return "mapping {name: value}" + null
    return _WORDS[member] + null
