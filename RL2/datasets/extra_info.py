"""Whether the extra_info of a row can be sent to the environment, checked before the run begins."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any

from RL2.runtime.errors import one_line

# Levels of nested lists and objects. Copies recurse, and Python limits recursion to 1,000.
_DEEPEST = 200


def fault_of(extra_info: dict[str, Any], limit: int | None) -> str | None:
    """Why it cannot be sent to an environment, and what to do; None if it can.

    limit: maximum size in bytes, pickled, for a process of the environment; None for no limit.
    """
    try:
        data = pickle.dumps(extra_info, pickle.HIGHEST_PROTOCOL)
    except RecursionError:
        data = None
    except Exception as error:  # a table may hold anything
        if limit is None:
            return None
        return (
            f"extra_info cannot be sent to another process ({one_line(error)}); put plain data "
            "there, or use rollout.env_workers=0"
        )
    # The pickle has one mark for each list and dict. Texts may hold the same bytes, so look closer.
    if data is None or (
        data.count(b"]") + data.count(b"}") > _DEEPEST and _is_deeper(extra_info, _DEEPEST)
    ):
        return (
            f"extra_info is nested more than {_DEEPEST} levels deep; make it flatter, or write it "
            "as one text that the environment reads"
        )
    if limit is not None and len(data) > limit:
        return (
            f"extra_info is {len(data)} bytes (pickled), more than the {limit} that can be sent to "
            "a process of the environment; put the name of a file there for the environment to "
            "read, or use rollout.env_workers=0"
        )
    return None


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists, tuples and dicts are nested deeper than that."""
    layer: list[Any] = [value]
    for _ in range(levels + 1):
        layer = [part for one in layer for part in _parts(one)]
        if not layer:
            return False
    return True


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()
