"""Keys whose value is a name out of a few: what to say of one that is not.

Some of these names are those of a registry, such as the token losses. A registry stands further up
than this package, so that the functions here are given `registry_of`, which finds the registry of a
key (`RL2.trainer.registries`).
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
"""The registry that a key names an entry of; None where any value of its type will do."""


def check_names(config: DictConfig, registry_of: RegistryOf) -> None:
    """ConfigError for the first value of a composed config that no registry has."""
    for key, entry in keys_of(schema_of(config)).items():
        if (known := registry_of(key)) is not None:
            check_name(key, OmegaConf.select(config, key), entry, known)


def check_name(key: str, value: Any, entry: Key, known: Collection[str]) -> None:
    """ConfigError where a value, or one of a list, is none of the `known` names. A key that may
    name a file takes file.py:name and package.module:name as well."""
    several = isinstance(value, (list, ListConfig))
    for name in value if several else [value]:
        if name is None or name in known or (entry.code and ":" in str(name)):
            continue
        told = advice(key.removesuffix("s") if several else key, name, [*known], entry.own)
        raise ConfigError(f"{key}={as_text([*value] if several else value)}: {told}")


def advice(key: str, value: Any, choices: Sequence[str], own: str | None = None) -> str:
    """What to say of a value that is none of the choices: what another library means by it, or
    what may have been meant. own: how to name what is none of them."""
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
