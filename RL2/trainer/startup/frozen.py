"""What models that compute fields of a batch have in common."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from RL2.distributed.comm import Batch
from RL2.runtime.errors import ConfigError

Provider = Callable[[Batch | None, Mapping[str, str]], Batch | None]
"""Adds fields, given as {name: statistic}, to rank 0's batch (a collective)."""


@contextmanager
def said_of(node: str) -> Iterator[None]:
    """ConfigErrors of a model name the keys of its node; the model knows those of `actor` only."""
    try:
        yield
    except ConfigError as error:
        text = re.sub(r"(?<![\w./])actor\.", f"{node}.", str(error))
        raise ConfigError(text) from error
