"""Rollouts: servers, stop texts, the environment, and how a step's batch is formed."""

import math
import os
import re
import sys

from omegaconf import DictConfig, ListConfig

from RL2.config.engines import SERVERS
from RL2.config.models import check_model
from RL2.config.paths import check_folder, not_there
from RL2.runtime.errors import ConfigError
from RL2.runtime.secrets import is_secret_name, redact

_URL = re.compile(r"https?://[^/\s]+/?")


def check_server_url(rollout: DictConfig) -> None:
    url = rollout.server_url
    if url is None:
        return
    if rollout.engine not in SERVERS:
        kinds = " or ".join(f"rollout.engine={name}" for name in SERVERS)
        raise ConfigError(f"rollout.server_url={url}: say which kind of server it is, {kinds}")
    for one in url if isinstance(url, ListConfig) else [url]:
        if isinstance(one, str) and redact(one) != one:
            raise ConfigError(
                f"rollout.server_url={redact(one)}: an address with a password ends up in "
                "logs; put the servers' key into RL2_SERVER_KEY in the environment"
            )
        if not isinstance(one, str) or not _URL.fullmatch(one):
            raise ConfigError(
                f"rollout.server_url={one}: must be an address such as "
                "http://127.0.0.1:30000, or a list of them"
            )
    if not url:
        raise ConfigError("rollout.server_url=[]: names no server; leave it out")
    for key in ("server_python", "servers_per_node", "base_port", "server_args"):
        value = rollout[key]
        if value not in (None, []):
            raise ConfigError(
                f"rollout.{key}={value}: has no effect with rollout.server_url, whose "
                "servers are not started here; leave one of the two out"
            )


def check_server_args(rollout: DictConfig) -> None:
    for argument in rollout.server_args:
        name = argument.partition("=")[0]
        if name.startswith("-") and is_secret_name(name):
            raise ConfigError(
                f"rollout.server_args: {name} puts a secret on the server's command line, where "
                "all users of the machine see it; leave it out (each run makes a key of its own, "
                "and servers inherit HF_TOKEN from the environment)"
            )


def check_server_files(rollout: DictConfig) -> None:
    if rollout.weights_dir is not None:
        check_folder("rollout.weights_dir", rollout.weights_dir)
    python = rollout.server_python
    program = python or sys.executable
    if not os.path.isfile(program) or not os.access(program, os.X_OK):
        raise ConfigError(
            f"rollout.server_python={python}: not an executable file; give the python of the "
            "environment that holds the engine, such as .venv-vllm/bin/python"
        )


def check_what_follows(rollout: DictConfig, actor: DictConfig, train_data: DictConfig) -> None:
    """Keys that must equal those of another group."""
    if rollout.model_name != actor.model_name:
        raise ConfigError(
            f"rollout.model_name={rollout.model_name}: the engine generates with the weights of "
            f"actor.model_name={actor.model_name}; leave it out"
        )
    if rollout.responses_per_prompt != train_data.responses_per_prompt:
        raise ConfigError(
            f"rollout.responses_per_prompt={rollout.responses_per_prompt}: must equal "
            f"train_data.responses_per_prompt={train_data.responses_per_prompt}; set that "
            "one and leave this out"
        )


def check_stops(rollout: DictConfig) -> None:
    for name in ("train_sampling_params", "test_sampling_params"):
        stop = rollout[name].stop
        texts = [stop] if stop is None or isinstance(stop, str) else stop
        if isinstance(stop, (bool, int, float, DictConfig)) or not all(
            text is None or (isinstance(text, str) and text) for text in texts
        ):
            raise ConfigError(
                f"rollout.{name}.stop={stop}: must be a text, a list of texts or null; quote it: "
                f"'rollout.{name}.stop=\"...\"'"
            )


def check_reward_model(rollout: DictConfig) -> None:
    name, judges = rollout.reward_model.model_name, rollout.judges
    if name is None and "reward_model" in judges:
        raise ConfigError(
            "rollout.judges=[reward_model]: has no model; give rollout.reward_model.model_name, "
            "such as the final/ of RL2.trainer.rm"
        )
    if name is not None and "reward_model" not in judges:
        raise ConfigError(
            f"rollout.reward_model.model_name={name}: has no effect without the judge "
            "reward_model; add it to rollout.judges, or leave this out"
        )
    if name is not None:
        check_model(rollout.reward_model, "rollout.reward_model")


def check_environment(rollout: DictConfig) -> None:
    if rollout.env_path is not None and not os.path.isfile(rollout.env_path):
        raise ConfigError(
            f"rollout.env_path={rollout.env_path}: {not_there(rollout.env_path)}; give the python "
            "file of the environment, such as envs/gsm8k.py"
        )


def check_batches(rollout: DictConfig) -> None:
    """How a step's batch is formed, and how old its weights may be."""
    if rollout.partial_rollout and rollout.staleness:
        raise ConfigError(
            "rollout.partial_rollout=true: its engine must pause between two steps, which it does "
            f"not do with rollout.staleness={rollout.staleness}; use one of the two"
        )
    if rollout.over_sampling is not None and not rollout.partial_rollout:
        raise ConfigError(
            f"rollout.over_sampling={rollout.over_sampling}: has no effect without "
            "rollout.partial_rollout=true; set that, or leave it out"
        )
    if rollout.max_resampled:
        key = f"rollout.max_resampled={rollout.max_resampled}"
        if not rollout.dynamic_filtering:
            raise ConfigError(
                f"{key}: has no effect with rollout.dynamic_filtering=false, which leaves nothing "
                "out; leave it out"
            )
        if rollout.responses_per_prompt == 1:
            raise ConfigError(
                f"{key}: has no effect with train_data.responses_per_prompt=1, as one sample of a "
                "prompt leaves nothing to compare; raise that, or leave it out"
            )
    for name, weight in rollout.rewards.items():
        if not math.isfinite(weight):
            raise ConfigError(f"rollout.rewards.{name}={weight}: must be finite")
    limit = rollout.train_sampling_params.max_new_tokens
    if rollout.overlong_buffer > limit:
        raise ConfigError(
            f"rollout.overlong_buffer={rollout.overlong_buffer}: more than all "
            f"rollout.train_sampling_params.max_new_tokens={limit}; lower it"
        )
    if rollout.overlong_buffer and rollout.truncated == "zero":
        raise ConfigError(
            f"rollout.overlong_buffer={rollout.overlong_buffer}: an answer that was cut off would "
            "get reward 0 by rollout.truncated=zero, more than one that ended just before; use one "
            "of the two"
        )
    if rollout.overlong_penalty != 1 and not rollout.overlong_buffer:
        raise ConfigError(
            f"rollout.overlong_penalty={rollout.overlong_penalty}: has no effect with "
            "rollout.overlong_buffer=0; set that, or leave it out"
        )
    if rollout.sleep and rollout.staleness:
        raise ConfigError(
            "rollout.sleep=true: the engine generates all the time with "
            f"rollout.staleness={rollout.staleness}; leave it out"
        )
