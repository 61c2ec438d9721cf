"""Data sets: what their paths name, the separator of sft, and evaluation."""

import re

from omegaconf import DictConfig

from RL2.config.data_paths import find_data
from RL2.runtime.errors import ConfigError


def check_prompts(train_data: DictConfig, test_data: DictConfig) -> None:
    for group, node in (("train_data", train_data), ("test_data", test_data)):
        if node.path is not None:
            find_data(group, node.path)


def check_rows(data: DictConfig) -> None:
    find_data("data", data.path)
    if data.test_path is not None:
        find_data("data", data.test_path, "test_path")


def check_held_out(data: DictConfig, trainer: DictConfig) -> None:
    ratio, path, freq = data.test_ratio, data.test_path, trainer.test_freq
    if ratio and path is not None:
        raise ConfigError(
            f"data.test_ratio={ratio}: has no effect with data.test_path={path}, which gives the "
            "rows to evaluate; leave one of the two out"
        )
    if freq is not None and not ratio and path is None:
        raise ConfigError(
            f"trainer.test_freq={freq}: has no effect without rows to evaluate; set "
            "data.test_ratio to a share of the rows, such as 0.05, or data.test_path to a file"
        )
    if freq is None and (ratio or path is not None):
        key = f"data.test_ratio={ratio}" if ratio else f"data.test_path={path}"
        raise ConfigError(
            f"{key}: has no effect without trainer.test_freq; set that to the steps between "
            "evaluations"
        )


def check_separator(data: DictConfig) -> None:
    if re.search(r"\\[nrt]", data.separator):
        raise ConfigError(
            f"data.separator={data.separator}: has a backslash and a letter, which neither shell "
            "nor hydra turns into a line break; in bash, write one as $'data.separator=\"\\n\"'"
        )


def check_evaluation(test_data: DictConfig, trainer: DictConfig) -> None:
    path, freq = test_data.path, trainer.test_freq
    if path is None and freq is not None:
        raise ConfigError(
            f"trainer.test_freq={freq}: has no effect without test_data.path; give one "
            "(test@openai/gsm8k:main or a file)"
        )
    if path is not None and freq is None:
        raise ConfigError(
            f"test_data.path={path}: has no effect without trainer.test_freq; set "
            "trainer.test_freq to the steps between evaluations"
        )
    if trainer.test_sampled and freq is None:
        raise ConfigError(
            "trainer.test_sampled=true: has no effect without trainer.test_freq; set that to the "
            "steps between evaluations, and test_data.path"
        )
