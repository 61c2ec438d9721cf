"""The sinks by name, and a check that those of a run are installed."""

from importlib.util import find_spec

from omegaconf import DictConfig

from RL2.config.trackers import trackers_of
from RL2.runtime.errors import ConfigError
from RL2.trainer.sinks.jsonl import Jsonl
from RL2.trainer.sinks.mlflow import MLflow
from RL2.trainer.sinks.sink import Sink
from RL2.trainer.sinks.tensorboard import TensorBoard
from RL2.trainer.sinks.trackio import Trackio
from RL2.trainer.sinks.wandb import Wandb

# jsonl is always there, in the trainer's own process: the others read its file.
SINKS: dict[str, type[Sink]] = {
    "jsonl": Jsonl,
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def check_trackers(config: DictConfig) -> None:
    """ConfigError for the first tracker whose package is not installed."""
    for name in trackers_of(config.trainer):
        sink = SINKS[name]
        if lacking := [a for a in ("module", "install", "afterwards") if not hasattr(sink, a)]:
            raise ConfigError(
                f"trainer.trackers={config.trainer.trackers}: {sink.__name__} has no "
                f"{', '.join(lacking)}, see RL2.trainer.sinks.sink.Sink"
            )
        if find_spec(sink.module) is None:
            given = config.trainer.trackers
            key = "trainer.use_wandb=true" if given is None else f"trainer.trackers={given}"
            raise ConfigError(
                f"{key}: {sink.module} is not installed; pip install {sink.install}, or leave "
                f"{name} out"
            )
