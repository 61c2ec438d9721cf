"""Functions of some groups of a config, called for the configs that have these groups."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from omegaconf import DictConfig


def call_each(
    functions: Iterable[Callable[..., Any]], config: DictConfig, **others: Any
) -> Iterator[Any]:
    """Call each function with the groups, or `others`, that its parameters name; yield the results.
    A function that names a group missing from the config is skipped (`rollout` in sft)."""
    for function in functions:
        wanted = inspect.signature(function).parameters
        if all(name in config or name in others for name in wanted):
            yield function(**{name: others.get(name, config.get(name)) for name in wanted})
