"""The rollout engines by name: the one list of them. Nothing here imports an engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineKind:
    """An engine that `rollout.engine` can name.

    Attributes:
        made_by: the factory as module:name, for `RL2.engines.registry`: for a server its dialect,
            else a function (config, tokenizer, device) -> engine. It is imported only when used, so
            that a machine without one engine's packages can run the others.
        help: a short description.
        server: whether it is a separate program that the trainer talks to. Its package, and the
            extra of RL2 that installs it, then have the engine's name.
    """

    made_by: str
    help: str
    server: bool = False


# `auto` tries the servers in this order.
ENGINES: dict[str, EngineKind] = {
    "transformers": EngineKind(
        "RL2.engines.transformers.engine:transformers_engine", "in this process"
    ),
    "sglang": EngineKind("RL2.engines.servers.sglang:SGLang", "servers", server=True),
    "vllm": EngineKind("RL2.engines.servers.vllm:VLLM", "servers", server=True),
}

EMBEDDED = "transformers"
"""The engine that `auto` takes if no server is installed."""

SERVERS = tuple(name for name, kind in ENGINES.items() if kind.server)
