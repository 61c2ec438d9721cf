"""The run: names and folders, the rules that stop it, and what it starts from."""

import os
import re

from omegaconf import DictConfig

from RL2.config.paths import check_folder, not_there
from RL2.config.trackers import trackers_of
from RL2.runtime.errors import ConfigError

_LONGEST_NAME = 255  # bytes, on all common file systems


def check_folder_names(trainer: DictConfig) -> None:
    name = trainer.experiment_name
    if (
        not name
        or name != name.strip()
        or name.startswith((".", "-"))  # hidden, or an option of the next command
        or "/" in name
        or "\\" in name
        or not name.isprintable()
        or len(name.encode()) > _LONGEST_NAME
    ):
        raise ConfigError(
            f"trainer.experiment_name={name}: names a folder; use a text without slashes and "
            f"control characters that begins with a letter, a digit or _ and has at most "
            f"{_LONGEST_NAME} bytes"
        )
    check_folder("trainer.save_dir", trainer.save_dir)


def check_health(trainer: DictConfig) -> None:
    low, high = trainer.health.min_entropy, trainer.health.max_entropy
    if None not in (low, high) and low >= high:
        raise ConfigError(
            f"trainer.health.min_entropy={low}: must be below trainer.health.max_entropy={high}; "
            "lower it, or set one of the two to null"
        )


def check_checkpoint(trainer: DictConfig) -> None:
    start = trainer.load_ckpt_from
    if start in (None, "latest"):
        return
    key = f"trainer.load_ckpt_from={start}"
    try:
        names = os.listdir(start if start.strip() else "")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"{key}: {not_there(start, 'folder')}; use null, latest or the folder of a checkpoint"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{key}: cannot be read ({error.strerror}); make it readable, or use null or latest"
        ) from error
    if "manifest.json" not in names:
        raise ConfigError(
            f"{key}: is not a checkpoint, as it has no manifest.json; use null, latest or a "
            "folder such as <save_dir>/checkpoints/step000020"
        )


def check_trackers_agree(trainer: DictConfig) -> None:
    given, use_wandb = trainer.trackers, trainer.use_wandb
    if given is None or use_wandb is None or use_wandb == ("wandb" in given):
        return
    has = "has" if "wandb" in given else "does not have"
    raise ConfigError(
        f"trainer.use_wandb={str(use_wandb).lower()}: trainer.trackers={given} {has} wandb; leave "
        "out trainer.use_wandb"
    )


def check_wandb_project(trainer: DictConfig) -> None:
    project = trainer.project
    if "wandb" in trackers_of(trainer) and (
        not project.strip()
        or not project.isprintable()
        or len(project) > 128
        or re.search(r"[/\\#?%:]", project)
    ):
        raise ConfigError(
            f"trainer.project={project}: not a name that wandb accepts; use at most 128 characters "
            "without / \\ # ? % and :, or trainer.use_wandb=false"
        )
