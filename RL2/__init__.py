"""RL2: token-level losses for reasoning models, from rollouts to checkpoints."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from RL2.runtime.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        EngineError,
        EnvError,
        HealthError,
        RL2Error,
        TrainingError,
    )

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngineError",
    "EnvError",
    "HealthError",
    "RL2Error",
    "TrainingError",
    "__version__",
]


def __getattr__(name: str) -> type[Exception]:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not before it is asked for: reading a config takes a second to import, and an entry point
    # has to come first.
    from RL2.runtime import errors

    return getattr(errors, name)
