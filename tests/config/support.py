"""Composition of the trainers' configs as hydra does it, without running hydra's main."""

import json
from functools import cache
from pathlib import Path

import numpy
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from safetensors.numpy import save_file

import RL2
from RL2.config import register_schemas

ROOT = Path(RL2.__file__).parents[1]
CONFIG_DIR = Path(RL2.__file__).parent / "trainer" / "config"

RL_REQUIRED = [
    "train_data.path=train@openai/gsm8k:main",
    "train_data.prompts_per_rollout=8",
    "actor.model_name=Qwen/Qwen3-4B-Thinking-2507",
    "actor.max_length_per_device=512",
    "rollout.train_sampling_params.max_new_tokens=256",
    "rollout.env_path=env.py",
]
SFT_REQUIRED = [
    "data.path=train@openai/gsm8k:main",
    "data.max_length=512",
    "actor.model_name=Qwen/Qwen3-4B-Thinking-2507",
]


def required(name: str) -> list[str]:
    """The keys that the user of a trainer must give."""
    return SFT_REQUIRED if name in ("sft", "dpo", "rm") else RL_REQUIRED


def write_model_files(folder: Path, **config) -> Path:
    """What the checks ask of a model's folder: a config.json and whole weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": numpy.zeros(3)}, folder / "model.safetensors")
    return folder


def compose_config(name: str, overrides: list[str]) -> DictConfig:
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(name, overrides)


@cache
def _base_config(name: str) -> DictConfig:
    return compose_config(name, required(name))


def quick_config(name: str, overrides: list[str]) -> DictConfig:
    """The required keys and these overrides, without composing anew: hundreds of tests need it."""
    config = _base_config(name).copy()
    for override in OverridesParser.create().parse_overrides(overrides):
        OmegaConf.update(
            config, override.key_or_group, override.value(), force_add=override.is_add()
        )
    return config
