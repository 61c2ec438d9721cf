"""Check of a composed config: what types cannot say, before anything is built."""

import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from RL2.config.data_paths import check_data_path
from RL2.config.models import check_model, context_length
from RL2.config.numbers import check_numbers
from RL2.config.overrides import is_open, unknown_key_message
from RL2.config.paths import not_there
from RL2.config.schema import (
    AvgLevel,
    EngineName,
    Estimator,
    RLConfig,
    SFTConfig,
    TISType,
    key_types,
)
from RL2.runtime.errors import ConfigError
from RL2.runtime.secrets import is_secret_name, redact

_REQUIRED = {
    "train_data.path": "give a data set (train@openai/gsm8k:main), a file, or null for an "
    "environment that writes its own prompts",
    "train_data.prompts_per_rollout": "give the number of prompts of a training step, such as 128",
    "data.path": "give a data set (train@openai/gsm8k:main) or a file",
    "data.max_length": "give the tokens of prompt + response at most, such as 2048",
    "actor.model_name": "give a folder made by save_pretrained, or a hub id such as "
    "Qwen/Qwen3-4B-Thinking-2507",
    "actor.max_length_per_device": "give the tokens of one forward on a rank, at least the longest "
    "prompt + response, such as 8576",
    "rollout.train_sampling_params.max_new_tokens": "give the tokens of a response at most, such "
    "as 8192",
    "rollout.env_path": "give the python file of the environment, such as envs/gsm8k.py",
}

_ABOVE_ZERO = (lambda x: 0 < x < math.inf, "must be above 0")
_FROM_ZERO = (lambda x: 0 <= x < math.inf, "must be 0 or more")
_FROM_ONE = (lambda x: x >= 1, "must be 1 or more")
_FRACTION = (lambda x: 0 <= x <= 1, "must lie between 0 and 1")
_PROBABILITY = (lambda x: 0 < x <= 1, "must be above 0 and at most 1")

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        [
            *(
                f"{data}.{key}"
                for data in ("train_data", "test_data")
                for key in ("prompts_per_rollout", "responses_per_prompt", "max_prompt_length")
            ),
            "test_data.max_examples",
            "data.max_length",
            "data.batch_size",
            *(
                f"{model}.{key}"
                for model in ("actor", "ref_actor")
                for key in (
                    "ddp_size",
                    "tp_size",
                    "sp_size",
                    "max_length_per_device",
                    "max_inference_length_per_device",
                )
            ),
            "actor.update_per_rollout",
            "actor.loss.max_rank",
            "actor.lora.rank",
            "actor.lora.alpha",
            "rollout.tp_size",
            "rollout.max_turns",
            "rollout.max_batch_size",
            "rollout.max_in_flight",
            "rollout.over_sampling",
            "rollout.servers_per_node",
            "rollout.train_sampling_params.max_new_tokens",
            "rollout.test_sampling_params.max_new_tokens",
            "trainer.n_epochs",
            "trainer.max_steps",
            "trainer.test_freq",
            "trainer.save_freq",
            "trainer.keep_last",
            "trainer.max_bad_steps",
            "trainer.health.patience",
            "trainer.health.no_signal_steps",
        ],
        _FROM_ONE,
    ),
    **dict.fromkeys(
        [
            "actor.max_grad_norm",
            "actor.clip",
            "actor.loss.clip_low",
            "actor.loss.clip_high",
            "actor.temperature",
            "ref_actor.temperature",
            "rollout.env_timeout",
            "rollout.llm_kl_alarm",
            "rollout.server_start_timeout",
            "rollout.request_timeout",
            "trainer.rank_timeout",
            "trainer.health.min_entropy",
            "trainer.health.max_entropy",
            "trainer.health.max_llm_kl",
        ],
        _ABOVE_ZERO,
    ),
    **dict.fromkeys(
        [
            "actor.tis_coef",
            "actor.freeze_steps",
            "actor.kl.coef",
            "rollout.env_workers",
            "rollout.max_env_errors",
            "rollout.max_malformed",
            "rollout.max_resampled",
            "rollout.request_retries",
            "rollout.max_restarts",
            "trainer.show_samples",
        ],
        _FROM_ZERO,
    ),
    **dict.fromkeys(["actor.warmup_ratio", "adv.gamma", "adv.lamda"], _FRACTION),
    **dict.fromkeys(
        [
            "rollout.train_sampling_params.top_p",
            "rollout.test_sampling_params.top_p",
            "rollout.gpu_memory_utilization",
            "trainer.health.max_p_max",
            "trainer.health.min_length_ratio",
        ],
        _PROBABILITY,
    ),
    # Bounds that nobody who trains a language model comes near, against a slip such as 1e4.
    "actor.lr": (
        lambda x: 0 < x < 1,
        "must be above 0 and below 1, as AdamW moves each weight by about so much in a step; "
        "give a rate such as 1e-6",
    ),
    "actor.weight_decay": (lambda x: 0 <= x <= 10, "must be 0 to 10; give one such as 1e-2"),
    "rollout.train_sampling_params.temperature": (
        lambda x: 0 < x <= 100,
        "must be above 0 and at most 100; give one such as 1.0",
    ),
    "rollout.test_sampling_params.temperature": (
        lambda x: 0 <= x <= 100,
        "must be 0 (greedy) to 100; give one such as 0.0",
    ),
    "actor.entropy.coef": (math.isfinite, "must be finite"),
    "actor.dropout": (lambda x: x == 0, "must be 0 (none) or null (what the model's config says)"),
    "actor.lora.dropout": (lambda x: 0 <= x < 1, "must be 0 or more and below 1"),
    "rollout.staleness": (lambda x: x in (0, 1), "must be 0 (on-policy) or 1"),
    "actor.loss.target": (lambda x: 0 < x < 1, "must lie between 0 and 1"),
    **dict.fromkeys(
        ["actor.lora.seed", "trainer.seed"],  # what numpy in the servers takes, too
        (lambda x: 0 <= x < 2**32, "must be 0 to 4294967295"),
    ),
    "trainer.num_threads": (lambda x: 1 <= x <= 1024, "must be 1 to 1024"),
    "rollout.base_port": (lambda x: 1 <= x <= 65535, "must be a port, 1 to 65535"),
}

_LONGEST_NAME = 255  # bytes, on all common file systems

_URL = re.compile(r"https?://[^/\s]+/?")


def validate(config: DictConfig, world_size: int) -> None:
    """Check a composed config; touches the file system, never the network.

    Args:
        config: what hydra composed from a yaml file of `RL2/trainer/config`; not changed.
        world_size: number of processes of the run.

    Raises:
        ConfigError: the first thing that cannot work, in one line.
    """
    rl = "rollout" in config
    schema = RLConfig if rl else SFTConfig
    _check_keys(config, schema)
    for key, advice in _REQUIRED.items():
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(config, group)
        if node is not None and OmegaConf.is_missing(node, name):
            raise ConfigError(f"{key}: required; {advice}")
    _check_interpolations(config)
    _check_ranges(config, schema)
    check_numbers(config, key_types(schema))
    _check_mesh(config, world_size)
    for group in ("actor", "ref_actor"):
        if group in config and config[group].use_liger_kernel not in ("auto", True, False):
            value = config[group].use_liger_kernel
            raise ConfigError(f"{group}.use_liger_kernel={value}: must be auto, true or false")
    check_model(config.actor, "actor")
    if config.actor.compile and config.actor.tp_size > 1:
        raise ConfigError(
            "actor.compile=true: torch does not compile layers that "
            f"actor.tp_size={config.actor.tp_size} has split; use one of the two"
        )
    _check_lora(config.actor)
    if rl:
        _check_rollout(config)
        _check_batches(config)
        _check_lengths(config)
        _check_objective(config)
        check_data_path("train_data", config.train_data.path)
        check_data_path("test_data", config.test_data.path)
        _check_evaluation(config)
    else:
        _check_sft(config)
        check_data_path("data", config.data.path)
    _check_trainer(config.trainer)


def _check_keys(config: DictConfig, schema: type) -> None:
    """Keys that slipped past the types: `+key` and yaml files of the user's own may add any."""
    known = key_types(schema)

    def walk(node: dict, prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if is_open(key, known):
                return
            if key == "defaults":
                continue  # a yaml file's own list, where that is loaded without hydra
            if key not in known:
                raise ConfigError(unknown_key_message(key, schema))
            if isinstance(value, dict) and is_dataclass(known[key]):
                walk(value, f"{key}.")

    walk(OmegaConf.to_container(config, resolve=False), "")


def _check_interpolations(node: DictConfig | ListConfig, prefix: str = "") -> None:
    """Every key has a value, and what `${…}` stands for is there and of the right type."""
    raw = OmegaConf.to_container(node, resolve=False)
    for name in raw if isinstance(node, DictConfig) else range(len(raw)):
        key = f"{prefix}{name}"
        if raw[name] == "???":
            raise ConfigError(f"{key}=???: required; give a value, or leave it out for the default")
        try:
            value = node[name]
        except (OmegaConfBaseException, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"{key}={raw[name]}: does not resolve ({reason}); name a key that has a value"
            ) from error
        if isinstance(value, (DictConfig, ListConfig)):
            _check_interpolations(value, f"{key}.")


def _check_ranges(config: DictConfig, schema: type) -> None:
    def follows(key: str) -> bool:
        group, _, name = key.rpartition(".")
        return OmegaConf.is_interpolation(OmegaConf.select(config, group), name)

    # A key that follows another comes last: the other one is what the user has set.
    known = key_types(schema)
    for key in sorted((key for key in _RANGES if key in known), key=follows):
        holds, what = _RANGES[key]
        value = OmegaConf.select(config, key)
        if value is not None and not holds(value):
            raise ConfigError(f"{key}={value}: {what}")


def _check_mesh(config: DictConfig, world_size: int) -> None:
    for group in ("actor", "ref_actor"):
        if group not in config:
            continue
        node = config[group]
        sizes = {name: node[name] for name in ("tp_size", "sp_size", "ddp_size")}
        for name, size in sizes.items():
            _check_divides(f"{group}.{name}", size, world_size)
        for other in ("sp_size", "ddp_size"):
            product = node.tp_size * node[other]
            if world_size % product:
                raise ConfigError(
                    f"{group}.tp_size={node.tp_size} * {group}.{other}={node[other]} = {product}: "
                    f"must divide world_size={world_size}; lower one of them"
                )
    if "rollout" in config:
        _check_divides("rollout.tp_size", config.rollout.tp_size, world_size)


def _check_divides(key: str, size: int, world_size: int) -> None:
    if world_size % size:
        divisors = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        use = " or ".join(filter(None, [", ".join(divisors[:-1]), divisors[-1]]))
        raise ConfigError(f"{key}={size}: must divide world_size={world_size}; use {use}")


def _check_lora(actor: DictConfig) -> None:
    lora = actor.lora
    for name, unchanged in _WITHOUT_LORA.items():
        if lora.rank is None and lora[name] != unchanged:
            raise ConfigError(
                f"actor.lora.{name}={lora[name]}: has no effect without actor.lora.rank; set that, "
                "such as 16, or leave it out"
            )
    names = lora.target_modules
    names = [*names] if isinstance(names, ListConfig) else [names]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"actor.lora.target_modules={lora.target_modules}: must be all-linear, or a list of "
            "names of layers such as [q_proj,v_proj]"
        )
    if len(names) > 1 and "all-linear" in names:
        raise ConfigError(
            f"actor.lora.target_modules={lora.target_modules}: all-linear stands alone; leave out "
            "that or the others"
        )
    if lora.dropout > 0 and actor.tp_size > 1:
        raise ConfigError(
            f"actor.lora.dropout={lora.dropout}: tensor-parallel ranks would leave out different "
            f"inputs of one adapter; use 0, or actor.tp_size=1 instead of {actor.tp_size}"
        )


# What the keys of actor.lora are in ppo.yaml and sft.yaml.
_WITHOUT_LORA = {"alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}


def _check_rollout(config: DictConfig) -> None:
    rollout = config.rollout
    _check_servers(rollout)
    if rollout.model_name != config.actor.model_name:
        raise ConfigError(
            f"rollout.model_name={rollout.model_name}: the engine generates with the weights of "
            f"actor.model_name={config.actor.model_name}; leave it out"
        )
    if rollout.responses_per_prompt != config.train_data.responses_per_prompt:
        raise ConfigError(
            f"rollout.responses_per_prompt={rollout.responses_per_prompt}: must equal "
            f"train_data.responses_per_prompt={config.train_data.responses_per_prompt}; set that "
            "one and leave this out"
        )
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
    if not os.path.isfile(rollout.env_path):
        raise ConfigError(
            f"rollout.env_path={rollout.env_path}: {not_there(rollout.env_path)}; give the python "
            "file of the environment, such as envs/gsm8k.py"
        )


def _check_servers(rollout: DictConfig) -> None:
    servers = rollout.engine in (EngineName.sglang, EngineName.vllm)
    url = rollout.server_url
    if url is not None:
        if not servers:
            raise ConfigError(
                f"rollout.server_url={url}: say which kind of server it is, rollout.engine=sglang "
                "or rollout.engine=vllm"
            )
        for one in url if isinstance(url, ListConfig) else [url]:
            if isinstance(one, str) and redact(one) != one:
                raise ConfigError(
                    f"rollout.server_url={redact(one)}: an address with a password in it ends in "
                    "logs; put the servers' key into RL2_SERVER_KEY in the environment"
                )
            if not isinstance(one, str) or not _URL.fullmatch(one):
                raise ConfigError(
                    f"rollout.server_url={one}: must be an address such as "
                    "http://127.0.0.1:30000, or a list of them"
                )
        if not url:
            raise ConfigError("rollout.server_url=[]: names no server; leave it out")
        for key in ("server_python", "servers_per_node", "base_port"):
            if rollout[key] is not None:
                raise ConfigError(
                    f"rollout.{key}={rollout[key]}: has no effect with rollout.server_url, whose "
                    "servers are not started here; leave one of the two out"
                )
        if rollout.server_args:
            raise ConfigError(
                f"rollout.server_args={list(rollout.server_args)}: has no effect with "
                "rollout.server_url, whose servers are not started here; leave one of the two out"
            )
    for argument in rollout.server_args:
        name = argument.partition("=")[0]
        if name.startswith("-") and is_secret_name(name):
            raise ConfigError(
                f"rollout.server_args: {name} puts a secret on the server's command line, where "
                "all users of the machine see it; leave it out (each run makes a key of its own, "
                "and servers inherit HF_TOKEN from the environment)"
            )
    if rollout.weights_dir is not None:
        _check_folder("rollout.weights_dir", rollout.weights_dir)
    python = rollout.server_python
    program = python or sys.executable
    if not os.path.isfile(program) or not os.access(program, os.X_OK):
        raise ConfigError(
            f"rollout.server_python={python}: no executable file; give the python of the "
            "environment that holds the engine, such as .venv-vllm/bin/python"
        )


def _check_batches(config: DictConfig) -> None:
    """How a step's batch comes together, and what its age amounts to."""
    rollout, actor = config.rollout, config.actor
    if rollout.partial_rollout and rollout.staleness:
        raise ConfigError(
            "rollout.partial_rollout=true: its engine has to stand still between two steps, which "
            f"it does not with rollout.staleness={rollout.staleness}; use one of the two"
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
    if rollout.sleep and rollout.staleness:
        raise ConfigError(
            "rollout.sleep=true: the engine generates all the time with "
            f"rollout.staleness={rollout.staleness}; leave it out"
        )
    if actor.tis_type == TISType.mask and actor.tis_coef < 1:
        advice = "has no effect with" if actor.tis_coef == 0 else "leaves no token with"
        raise ConfigError(
            f"actor.tis_type=mask: {advice} actor.tis_coef={actor.tis_coef}; set actor.tis_coef to "
            "1 or more, such as 2"
        )


def _check_lengths(config: DictConfig) -> None:
    actor, new = config.actor, config.rollout.train_sampling_params.max_new_tokens
    longest = actor.max_length_per_device * actor.sp_size
    room = _room(actor)
    context = context_length(actor.model_name)
    for name in ("train_sampling_params", "test_sampling_params"):
        asked = config.rollout[name].max_new_tokens
        if context is not None and asked >= context:
            raise ConfigError(
                f"rollout.{name}.max_new_tokens={asked}: must be below {context}, the context of "
                f"actor.model_name={actor.model_name}, which holds prompt and response"
            )
    if new >= longest:
        raise ConfigError(
            f"rollout.train_sampling_params.max_new_tokens={new}: must be below {room}, which "
            "holds prompt and response; raise that or lower this"
        )
    prompt = config.train_data.max_prompt_length
    if prompt is not None and prompt + new > longest:
        raise ConfigError(
            f"train_data.max_prompt_length={prompt}: with max_new_tokens={new} more than {room}; "
            f"use at most {longest - new}"
        )
    for group in ("actor", "ref_actor"):
        node = config[group]
        length = node.max_inference_length_per_device
        if length * node.sp_size < longest:
            times = f" * {group}.sp_size={node.sp_size}" if node.sp_size > 1 else ""
            raise ConfigError(
                f"{group}.max_inference_length_per_device={length}{times}: must be at least "
                f"{room}, the longest sequence; leave it out or raise it"
            )


def _check_objective(config: DictConfig) -> None:
    actor, kl = config.actor, config.actor.kl
    if kl.coef > 0 and kl.type is None:
        raise ConfigError(
            f"actor.kl.coef={kl.coef}: has no effect without actor.kl.type; use loss, reward or "
            "advantage"
        )
    if kl.type is not None and kl.coef == 0:
        raise ConfigError(
            f"actor.kl.type={kl.type}: has no effect with actor.kl.coef=0; set "
            "actor.kl.coef above 0"
        )
    built_in = actor.loss.import_path is None
    reference = config.ref_actor.model_name
    if reference != actor.model_name:
        if kl.coef == 0 and built_in:
            raise ConfigError(
                f"ref_actor.model_name={reference}: has no effect with actor.kl.coef=0; set "
                "actor.kl.coef and actor.kl.type, or leave it out"
            )
        check_model(config.ref_actor, "ref_actor")
    if actor.clip is not None and built_in and actor.loss.name != "ppo":
        raise ConfigError(
            f"actor.clip={actor.clip}: has no effect with actor.loss.name={actor.loss.name}; "
            "leave it out"
        )
    for name in ("gamma", "lamda"):
        if config.adv[name] != 1:
            raise ConfigError(
                f"adv.{name}={config.adv[name]}: has no effect with adv.estimator="
                f"{config.adv.estimator}, which has no critic; leave it out"
            )
    for name in ("global_norm", "norm_var"):
        if config.adv[name] and config.adv.estimator == Estimator.spo:
            raise ConfigError(
                f"adv.{name}=true: has no effect with adv.estimator=spo; leave it out, or use "
                "adv.estimator=reinforce"
            )
    samples = config.train_data.prompts_per_rollout * config.train_data.responses_per_prompt
    if samples % actor.update_per_rollout:
        raise ConfigError(
            f"actor.update_per_rollout={actor.update_per_rollout}: must divide the {samples} "
            "samples of a rollout (train_data.prompts_per_rollout * responses_per_prompt)"
        )


def _check_evaluation(config: DictConfig) -> None:
    path, freq = config.test_data.path, config.trainer.test_freq
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
    if config.trainer.test_sampled and freq is None:
        raise ConfigError(
            "trainer.test_sampled=true: has no effect without trainer.test_freq; set that to the "
            "steps between evaluations, and test_data.path"
        )


def _check_sft(config: DictConfig) -> None:
    separator = config.data.separator
    if re.search(r"\\[nrt]", separator):
        raise ConfigError(
            f"data.separator={separator}: holds a backslash and a letter, of which neither shell "
            "nor hydra makes a line break; in bash, write one as $'data.separator=\"\\n\"'"
        )
    if config.actor.avg_level == AvgLevel.correct:
        raise ConfigError(
            "actor.avg_level=correct: in sft every sequence counts as correct; use token or "
            "sequence"
        )
    length, actor = config.data.max_length, config.actor
    context = context_length(actor.model_name)
    if context is not None and length > context:
        raise ConfigError(
            f"data.max_length={length}: must be at most {context}, the context of "
            f"actor.model_name={actor.model_name}"
        )
    if length > actor.max_length_per_device * actor.sp_size:
        raise ConfigError(
            f"data.max_length={length}: must be at most {_room(actor)}; lower this or raise that"
        )


def _room(actor: DictConfig) -> str:
    """What holds the longest sequence, in words."""
    times = f" * actor.sp_size={actor.sp_size}" if actor.sp_size > 1 else ""
    return f"actor.max_length_per_device={actor.max_length_per_device}{times}"


def _check_trainer(trainer: DictConfig) -> None:
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
    _check_folder("trainer.save_dir", trainer.save_dir)
    health = trainer.health
    if None not in (low := health.min_entropy, high := health.max_entropy) and low >= high:
        raise ConfigError(
            f"trainer.health.min_entropy={low}: must be below trainer.health.max_entropy={high}; "
            "lower it, or set one of the two to null"
        )
    start = trainer.load_ckpt_from
    if start not in (None, "latest"):
        key = f"trainer.load_ckpt_from={start}"
        try:
            names = os.listdir(start if start.strip() else "")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(
                f"{key}: {not_there(start, 'folder')}; use null, latest or the folder of a "
                "checkpoint"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"{key}: cannot be read ({error.strerror}); make it readable, or use null or latest"
            ) from error
        if "manifest.json" not in names:
            raise ConfigError(
                f"{key}: is no checkpoint, as it has no manifest.json; use null, latest or a "
                "folder such as <save_dir>/checkpoints/step000020"
            )
    project = trainer.project
    if trainer.use_wandb and (
        not project.strip()
        or not project.isprintable()
        or len(project) > 128
        or re.search(r"[/\\#?%:]", project)
    ):
        raise ConfigError(
            f"trainer.project={project}: no name that wandb takes; use at most 128 characters, "
            "none of them / \\ # ? % or :, or trainer.use_wandb=false"
        )


def _check_folder(key: str, path: str) -> None:
    if not path.strip() or not path.isprintable() or not _can_exist(path):
        raise ConfigError(
            f"{key}={path}: cannot be a folder; give a path without control characters, such as "
            "runs/first"
        )
    if os.path.exists(path) and not os.path.isdir(path):
        raise ConfigError(f"{key}={path}: is a file; give a folder")


def _can_exist(path: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return True  # what is in its way, other checks tell
    except (OSError, ValueError):
        return False
    return True
