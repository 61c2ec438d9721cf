"""Functions of some groups of a config, called for the configs that have these groups."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from omegaconf import DictConfig


def call_each(
    functions: Iterable[Callable[..., Any]], config: DictConfig, **others: Any
) -> Iterator[Any]:
    """The results of functions whose parameters are names of groups, or of `others`, in turn. One
    that names a group which the config does not have is left out: `rollout` does not concern sft.
    """
    for function in functions:
        wanted = inspect.signature(function).parameters
        if all(name in config or name in others for name in wanted):
            yield function(**{name: others.get(name, config.get(name)) for name in wanted})
