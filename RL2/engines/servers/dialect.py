"""The differences between kinds of servers."""

from __future__ import annotations

from typing import Any, Protocol

from RL2.engines.protocol import Completion, SamplingParams
from RL2.engines.servers.http import Server
from RL2.engines.servers.process import ServerOptions
from RL2.engines.servers.weights import HostWeights


class Dialect(Protocol):
    """How to talk to one kind of server: requests, and how to read the answers. Has no state.

    name: "sglang" or "vllm". health_path: answers GET with 200 once the server can generate.
    weight_methods: those of "tensor", "distributed" and "disk" that it supports; first the best one
    on a single machine.
    """

    name: str
    health_path: str
    weight_methods: tuple[str, ...]

    def command(self, options: ServerOptions, port: int) -> list[str]:
        """argv of a server on loopback; without secrets, as every user can read it."""
        ...

    def environment(self, options: ServerOptions, key: str) -> dict[str, str]:
        """Environment variables of the server, including the key that clients must send."""
        ...

    def headers(self, key: str) -> dict[str, str]:
        """Request headers with the key."""
        ...

    async def context_length(self, server: Server) -> int | None:
        """Most tokens of prompt and completion together."""
        ...

    def request(
        self, token_ids: list[int], sampling: SamplingParams, seed: int, request_id: str
    ) -> tuple[str, dict[str, Any]]:
        """Path and JSON body of a completion."""
        ...

    def completion(self, reply: Any, sampling: SamplingParams, version: int) -> Completion:
        """Read the answer. version: version of the weights, if the server does not report it.

        Raises MalformedReply for an answer that cannot be trained on: log-probabilities that do not
        match the tokens or are not finite, a field that is missing or invalid.
        """
        ...

    async def abort(self, server: Server) -> None:
        """End all requests; each answers with the tokens so far."""
        ...

    async def pause(self, server: Server) -> None:
        """Once this returns, no token is written until `resume`; requests stay open."""
        ...

    async def resume(self, server: Server) -> None: ...

    async def sleep(self, server: Server) -> None:
        """Release the memory of the weights and the key-value cache."""
        ...

    async def wake(self, server: Server) -> None: ...

    async def load_weights(self, server: Server, weights: HostWeights, method: str) -> None:
        """Load `weights` into an idle or paused server and drop its caches."""
        ...

    async def mismatch(self, server: Server, weights: HostWeights) -> str | None:
        """None if the server holds exactly `weights`, else a line that names a parameter."""
        ...
