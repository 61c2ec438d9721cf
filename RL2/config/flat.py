"""A config as one level of dotted keys, and its values as on the command line."""

from collections.abc import Iterator
from typing import Any

ABSENT = object()
"""What a config has for a key that is not in it."""


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`("actor.lr", 1e-6)`, … of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif name == "target_modules":  # order does not matter, and a text is a list of one
            yield prefix + name, sorted([value] if isinstance(value, str) else value)
        else:
            yield prefix + name, value


def as_text(value: Any) -> str:
    """A value as on the command line."""
    if value is ABSENT:
        return "absent"
    if isinstance(value, list):
        return f"[{','.join(map(as_text, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and {*"{}"} & {*value}:
        return f'"{value}"'
    return "null" if value is None else str(value)
