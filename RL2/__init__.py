"""RL2: token-level losses for reasoning models, from rollouts to checkpoints."""

from RL2.config.errors import (
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
