"""From the name of an engine (`RL2.config.engines`) to an engine."""

import pkgutil

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from RL2.config.engines import ENGINES
from RL2.engines.protocol import Engine
from RL2.engines.servers.build import server_engine


def build_engine(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Engine:
    """The engine that `rollout.engine` names. Servers start at once; `Engine.start` waits for them.

    config: of the whole run, checked and resolved (`RL2.config`).
    """
    kind = ENGINES[str(config.rollout.engine)]
    made_by = pkgutil.resolve_name(kind.made_by)
    if kind.server:
        return server_engine(made_by(), config, tokenizer, device)
    return made_by(config, tokenizer, device)
