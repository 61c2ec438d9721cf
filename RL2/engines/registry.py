"""The engines by name. A factory imports its module when it is called, so that a machine without
one engine's packages runs the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from RL2.config.models import weight_options
from RL2.engines.protocol import Engine


def _transformers(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Engine:
    from RL2.engines.transformers.engine import TransformersEngine

    return TransformersEngine(
        config.rollout.model_name,
        tokenizer=tokenizer,
        dtype=config.rollout.dtype,
        device=device,
        max_batch_size=config.rollout.max_batch_size,
        eager=config.rollout.partial_rollout,
        options=weight_options(config.actor),
    )


def _sglang(config: DictConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Engine:
    from RL2.engines.servers.engine import server_engine
    from RL2.engines.servers.sglang import SGLang

    return server_engine(SGLang(), config, tokenizer, device)


def _vllm(config: DictConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Engine:
    from RL2.engines.servers.engine import server_engine
    from RL2.engines.servers.vllm import VLLM

    return server_engine(VLLM(), config, tokenizer, device)


ENGINES: dict[str, Callable[[DictConfig, PreTrainedTokenizerBase, torch.device], Engine]] = {
    "transformers": _transformers,
    "sglang": _sglang,
    "vllm": _vllm,
}


def build_engine(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Engine:
    """The engine that `rollout.engine` names. Servers start at once; `Engine.start` waits for them.

    config: of the whole run, checked and resolved (`RL2.config`).
    """
    return ENGINES[str(config.rollout.engine)](config, tokenizer, device)
