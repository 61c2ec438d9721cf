"""Builds the server engine that a run's config asks for."""

from __future__ import annotations

import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path

import torch
from omegaconf import DictConfig
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from RL2.config.models import hub_options
from RL2.engines.servers.dialect import Dialect
from RL2.engines.servers.engine import ServerEngine
from RL2.engines.servers.pool import Limits
from RL2.engines.servers.process import ServerOptions
from RL2.engines.servers.weights import HostWeights
from RL2.runtime.errors import ConfigError


def server_engine(
    dialect: Dialect, config: DictConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> ServerEngine:
    """The server engine of this node that a run's config asks for; its servers start at once.

    Each server gets `rollout.tp_size` GPUs of this machine; clients of `rollout.server_url` send
    the key that RL2_SERVER_KEY holds.

    Raises ConfigError for more servers than there are GPUs.
    """
    rollout = config.rollout
    model = AutoConfig.from_pretrained(rollout.model_name, **hub_options(config.actor))
    generation = None
    with suppress(OSError):  # not every model has one
        generation = GenerationConfig.from_pretrained(
            rollout.model_name, revision=config.actor.revision
        )
    # Weights are compared bit for bit, so the copy must have the servers' dtype.
    dtype = str(model.dtype).removeprefix("torch.") if rollout.dtype == "auto" else rollout.dtype
    urls = rollout.server_url
    urls = [] if urls is None else [urls] if isinstance(urls, str) else list(urls)
    servers = [] if urls else _server_options(config, model, str(dtype), device)
    return ServerEngine(
        dialect,
        HostWeights(
            getattr(torch, str(dtype)), config=model, tokenizer=tokenizer, generation=generation,
            folder=rollout.weights_dir,
        ),
        servers=servers,
        urls=urls,
        key=os.environ.get("RL2_SERVER_KEY", "") if urls else secrets.token_urlsafe(32),
        log_dir=Path(config.trainer.save_dir) / "servers",
        base_port=rollout.base_port,
        weight_sync=str(rollout.weight_sync),
        limits=Limits(
            request_timeout=rollout.request_timeout,
            retries=rollout.request_retries,
            max_restarts=rollout.max_restarts,
            start_timeout=rollout.server_start_timeout,
        ),
    )  # fmt: skip


def _server_options(
    config: DictConfig, model: PretrainedConfig, dtype: str, device: torch.device
) -> list[ServerOptions]:
    rollout, n_ranks = config.rollout, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = rollout.tp_size
    n_servers = rollout.servers_per_node or max(1, n_ranks // size)
    if device.type == "cuda" and n_servers * size > torch.cuda.device_count():
        raise ConfigError(
            f"rollout.servers_per_node={n_servers}: with rollout.tp_size={size} needs "
            f"{n_servers * size} GPUs, and this machine has {torch.cuda.device_count()}"
        )
    # The longest sequence that training or an evaluation needs; otherwise a server would reserve
    # memory for the model's full context.
    train, test = rollout.train_sampling_params, rollout.test_sampling_params
    prompt = config.actor.max_length_per_device - train.max_new_tokens
    prompt = max(prompt, config.test_data.max_prompt_length or prompt)
    length = max(config.actor.max_length_per_device, prompt + test.max_new_tokens)
    limit = getattr(model.get_text_config(), "max_position_embeddings", None)
    return [
        ServerOptions(
            model_name=rollout.model_name,
            dtype=dtype,
            device=device.type,
            tp_size=size,
            context_length=min(length, limit or length),
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            max_in_flight=rollout.max_in_flight,
            sleep=rollout.sleep,
            trust_remote_code=config.actor.trust_remote_code,
            revision=config.actor.revision,
            allow_pickle=config.actor.allow_pickle,
            seed=config.trainer.seed,
            # Links are not resolved: the python of a virtual environment is a link.
            python=os.path.abspath(rollout.server_python or sys.executable),
            extra_args=tuple(rollout.server_args),
            gpus=tuple(range(i * size, (i + 1) * size)) if device.type == "cuda" else (),
        )
        for i in range(n_servers)
    ]
