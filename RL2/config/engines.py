"""The rollout engines by name: the one list of them. Nothing here imports an engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineKind:
    """An engine that `rollout.engine` can name.

    Attributes:
        module: of the engine; its `build(config, tokenizer, device)` makes one. `RL2.engines`
            imports it when it is asked for, so that a machine without one engine's packages runs
            the others.
        server: whether it is a program of its own that the trainer talks to. Its package then has
            the engine's name, as has the extra of RL2 that installs it.
    """

    module: str
    server: bool


# Servers stand in the order in which `auto` tries them.
ENGINES: dict[str, EngineKind] = {
    "transformers": EngineKind("RL2.engines.transformers.engine", server=False),
    "sglang": EngineKind("RL2.engines.servers.sglang", server=True),
    "vllm": EngineKind("RL2.engines.servers.vllm", server=True),
}

EMBEDDED = "transformers"
"""What `auto` takes where there is no server."""

SERVERS = tuple(name for name, kind in ENGINES.items() if kind.server)
