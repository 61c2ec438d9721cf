"""Keys whose value is one of a few names: the check, and the message about any other value.

Some of these names come from a registry, such as the token losses. Registries are in higher layers
than this package, so the functions here are given `registry_of`, which finds the registry of a key
(`RL2.trainer.registries`).
"""

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from RL2.config.elsewhere import VALUES, value_here
from RL2.config.flat import as_text
from RL2.config.schema import Key, keys_of, schema_of
from RL2.runtime.errors import ConfigError

RegistryOf = Callable[[str], Mapping[str, Any] | None]
"""Finds the registry of a key; None if the key takes any value of its type."""


def check_names(config: DictConfig, registry_of: RegistryOf) -> None:
    """Raise ConfigError for the first value of a composed config that its registry lacks."""
    for key, entry in keys_of(schema_of(config)).items():
        if (known := registry_of(key)) is not None:
            check_name(key, OmegaConf.select(config, key), entry, known)


def check_name(key: str, value: Any, entry: Key, known: Collection[str]) -> None:
    """Raise ConfigError if a value, or one of a list, is not among the `known` names. A key that
    may name a file also takes file.py:name and package.module:name."""
    several = isinstance(value, (list, ListConfig))
    for name in value if several else [value]:
        if name is None or name in known or (entry.code and ":" in str(name)):
            continue
        told = advice(key.removesuffix("s") if several else key, name, [*known], entry.own)
        raise ConfigError(f"{key}={as_text([*value] if several else value)}: {told}")


def advice(key: str, value: Any, choices: Sequence[str], own: str | None = None) -> str:
    """The message about a value that is not one of the choices: its meaning in another library, or
    a similar choice. own: how to name an entry of the user's own."""
    group, _, name = key.rpartition(".")
    if name == "name":  # actor.loss.name
        name = f"{group.rpartition('.')[2]}.name"
    what = name.partition(".")[0]
    use = f"use {listing(choices, 'or')}" + (f", or {own} for your own" if own else "")
    if (here := value_here(name, value)) is not None:
        return f"{here}; {use}"
    elsewhere = VALUES.get(name, {})
    close = difflib.get_close_matches(str(value), [*choices, *elsewhere], n=1)
    hint = f" (did you mean {close[0]}?" if close else ""
    if close and close[0] in elsewhere:
        hint += f" {elsewhere[close[0]]}"
    article = "an" if what[0] in "aeiou" else "a"
    return f"not {article} {what}; {use}{hint}{')' if hint else ''}"


def listing(items: Sequence[str], last: str) -> str:
    """`a, b or c`."""
    *front, end = items
    return f"{', '.join(front)} {last} {end}" if front else end
