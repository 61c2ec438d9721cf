"""Numbers in a config that Python can hold, but the code that computes with them cannot."""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from RL2.config.overrides import is_open
from RL2.config.schema import key_types
from RL2.runtime.errors import ConfigError

_LARGEST, _SMALLEST = (2 - 2.0**-23) * 2.0**127, 2.0**-126  # of float32, with all its digits
_LONGEST = 1e8  # seconds, three years; clocks and sockets fail at about 1e9


def check_numbers(config: DictConfig, schema: type) -> None:
    """Raise ConfigError for the first number that would become infinite, 0 or an overflow.

    Options of the user's own are not checked.
    """
    known = key_types(schema)
    for key, value in _numbers(OmegaConf.to_container(config, resolve=True), "", known):
        fault = _fault(key, value)
        if fault is not None:
            raise ConfigError(f"{key}={value!s:.40}: {fault}")


def _fault(key: str, value: int | float) -> str | None:
    if isinstance(value, int):
        return None if abs(value) < 2**63 else "must be less than 9223372036854775808 (64 bits)"
    if key.endswith("_timeout") and value > _LONGEST:
        return f"must be at most {_LONGEST:.0f} seconds"
    size = abs(value)
    if _LARGEST < size < float("inf"):
        return f"must be at most {_LARGEST:.2g}, the largest number of float32"
    if 0 < size < _SMALLEST:
        return f"is 0 in float32; give 0, or at least {_SMALLEST:.2g}"
    return None


def _numbers(
    node: dict[str, Any], prefix: str, known: dict[str, Any]
) -> Iterator[tuple[str, int | float]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if is_open(key, known):
            continue
        if isinstance(value, dict):
            yield from _numbers(value, f"{key}.", known)
        elif isinstance(value, (int, float)):
            yield key, value
