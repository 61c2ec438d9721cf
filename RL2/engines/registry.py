"""Builds an engine from its name or file."""

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from RL2.algorithms.parameters import import_function
from RL2.config.engines import ENGINES, SERVERS
from RL2.engines.protocol import Engine
from RL2.engines.servers.build import server_engine
from RL2.runtime.errors import EngineError, RL2Error, raised

PARTS = {name for name in {**vars(Engine), **Engine.__annotations__} if not name.startswith("_")}


def engine_maker(name: str) -> Callable[..., Any]:
    """What makes the engine that `rollout.engine` names: the dialect of a server, else a function
    (config, tokenizer, device) -> Engine.

    Raises ConfigError for a file, module or function that does not exist.
    """
    if ":" in name:
        return import_function(name, f"rollout.engine={name}", "my_engine.py:make")
    return pkgutil.resolve_name(ENGINES[name].made_by)


def build_engine(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Engine:
    """The engine that `rollout.engine` names. Servers start at once; `Engine.start` waits for them.

    config: the config of the whole run, checked and resolved (`RL2.config`).

    Raises EngineError for a user's engine that lacks a part of the protocol.
    """
    name = str(config.rollout.engine)
    maker = engine_maker(name)
    if name in SERVERS:
        return server_engine(maker(), config, tokenizer, device)
    if name in ENGINES:
        return maker(config, tokenizer, device)
    try:
        engine = maker(config, tokenizer, device)
    except RL2Error:
        raise
    except Exception as error:  # user code may raise anything
        what = raised(error, inspect.getfile(maker))
        raise EngineError(f"rollout.engine={name}: making it {what}") from error
    if lacks := sorted(part for part in PARTS if not hasattr(engine, part)):
        raise EngineError(
            f"rollout.engine={name}: what it makes has no {', '.join(lacks)}; derive it from "
            "RL2.engines.protocol.Engine"
        )
    return engine
