"""How a key is declared: type, default, range and help in one place.

    lr: float = key(1e-6, "peak learning rate of AdamW", within=ABOVE_ZERO)

The checks, the comments of the yaml files, `--help` and docs/config.md all read this.
"""

import dataclasses
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_type_hints

from omegaconf import MISSING


@dataclass(frozen=True)
class Range:
    """Values that a key may have, besides null where its type allows it.

    Attributes:
        holds: whether a value is one of them.
        must: the rule in words, to follow "must" in the message.
        advice: the rest of the message.
    """

    holds: Callable[[Any], bool]
    must: str
    advice: str = ""

    def __str__(self) -> str:
        return f"must {self.must}{self.advice}"


ABOVE_ZERO = Range(lambda x: 0 < x < math.inf, "be above 0")
FROM_ZERO = Range(lambda x: 0 <= x < math.inf, "be 0 or more")
FROM_ONE = Range(lambda x: x >= 1, "be 1 or more")
FRACTION = Range(lambda x: 0 <= x <= 1, "lie between 0 and 1")
PROBABILITY = Range(lambda x: 0 < x <= 1, "be above 0 and at most 1")
# Servers pass it to numpy, which takes nothing larger.
SEED = Range(lambda x: 0 <= x < 2**32, "be 0 to 4294967295")


@dataclass(frozen=True)
class Key:
    """What is known about a key, or about a group of keys.

    Attributes:
        kind: its type; a dataclass if it is a group.
        default: its default in the schema, interpolations included. A trainer's yaml file may have
            another. MISSING: the user must give one.
        help: its meaning, for users.
        within: its range; None if any value of the type is allowed.
        required: what to give, for a key that the user must give.
        path: whether it may name a file or folder.
        code: whether it may name user code, `file.py:name` or `package.module:name`.
        takes: its type in words, for a key that is `Any` because omegaconf has no unions of a text
            and a list or a bool.
        own: how to name an entry of the user's own, for a key that names an entry of a registry.
    """

    kind: Any
    default: Any
    help: str
    within: Range | None = None
    required: str | None = None
    path: bool = False
    code: bool = False
    takes: str | None = None
    own: str | None = None

    @property
    def is_group(self) -> bool:
        return dataclasses.is_dataclass(self.kind)


def key(
    default: Any,
    help: str,
    within: Range | None = None,
    *,
    path: bool = False,
    code: bool = False,
    takes: str | None = None,
    own: str | None = None,
) -> Any:
    """A key with a default, which a trainer's yaml file may override."""
    metadata = {
        "help": help, "within": within, "path": path, "code": code, "takes": takes, "own": own,
    }  # fmt: skip
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(give: str, help: str, within: Range | None = None, *, path: bool = False) -> Any:
    """A key that the user must give. give: what to give, after "required; give" in the message."""
    metadata = {"help": help, "within": within, "path": path, "required": f"give {give}"}
    return field(default=MISSING, metadata=metadata)


def by_trainer(help: str, *, path: bool = False, code: bool = False, own: str | None = None) -> Any:
    """A key whose default is set in the yaml file of each trainer."""
    metadata = {"help": help, "path": path, "code": code, "own": own}
    return field(default=MISSING, metadata=metadata)


def follow(
    other: str,
    help: str | None = None,
    within: Range | None = None,
    *,
    path: bool = False,
    takes: str | None = None,
) -> Any:
    """A key that has the value of another one unless it is set."""
    return key(f"${{{other}}}", help or f"as {other}", within, path=path, takes=takes)


def following(kind: type, node: str, without: tuple[str, ...] = ()) -> type:
    """A group with the keys of another one, which follow those of `node` unless they are set."""
    fields = []
    for one in dataclasses.fields(kind):
        entry = f"{node}.{one.name}"
        if one.name in without:
            continue
        if dataclasses.is_dataclass(hint := get_type_hints(kind)[one.name]):
            hint = following(hint, entry)
            declared = group(hint)
        else:
            about = {name: one.metadata.get(name) for name in ("within", "path", "takes")}
            declared = follow(entry, **about)
        fields.append((one.name, hint, declared))
    return dataclasses.make_dataclass(kind.__name__, fields)


def group(kind: type, help: str = "") -> Any:
    """A group of keys, with a help text for the whole group."""
    return field(default_factory=kind, metadata={"help": help})


@cache
def keys_of(schema: type, prefix: str = "") -> dict[str, Key]:
    """All keys and groups of a schema by their dotted names. Do not change it: it is cached."""
    found: dict[str, Key] = {}
    hints = get_type_hints(schema)
    for one in dataclasses.fields(schema):
        default = one.default
        if default is dataclasses.MISSING:
            default = one.default_factory()
        entry = Key(hints[one.name], default, **one.metadata)
        found[prefix + one.name] = entry
        if entry.is_group:
            found |= keys_of(entry.kind, f"{prefix}{one.name}.")
    return found


def key_types(schema: type) -> dict[str, Any]:
    """The type of each key by its dotted name; for a group its dataclass."""
    return {name: entry.kind for name, entry in keys_of(schema).items()}
