"""The part of a config that sinks read."""

from omegaconf import DictConfig, OmegaConf


def config_of(folder, *trackers: str, **more) -> DictConfig:
    trainer = {"save_dir": str(folder), "project": "p", "experiment_name": "e"}
    return OmegaConf.create({"trainer": trainer | {"trackers": [*trackers]}} | more)
