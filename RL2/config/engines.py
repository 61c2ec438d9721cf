"""The rollout engines by name: the one list of them. Nothing here imports an engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineKind:
    """An engine that `rollout.engine` can name.

    Attributes:
        made_by: module:name of what makes one, for `RL2.engines.registry`: of a server its dialect,
            else a function (config, tokenizer, device) -> engine. It is imported when it is asked
            for, so that a machine without one engine's packages runs the others.
        help: a few words on what it is.
        server: whether it is a program of its own that the trainer talks to. Its package has the
            engine's name then, as has the extra of RL2 that installs it.
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
"""What `auto` takes where there is no server."""

SERVERS = tuple(name for name, kind in ENGINES.items() if kind.server)
