"""What differs between kinds of servers."""

from __future__ import annotations

from typing import Any, Protocol

from RL2.engines.protocol import Completion, SamplingParams
from RL2.engines.servers.http import Server
from RL2.engines.servers.process import ServerOptions
from RL2.engines.servers.weights import HostWeights


class Dialect(Protocol):
    """What one kind of server wants to hear, and how its answers are read. Without state.

    name: "sglang" or "vllm". health_path: answers GET with 200 once the server can generate.
    weight_methods: of "tensor", "distributed" and "disk", those it can do, the best on one machine
    first.
    """

    name: str
    health_path: str
    weight_methods: tuple[str, ...]

    def command(self, options: ServerOptions, port: int) -> list[str]:
        """argv of a server on loopback; without a secret, as every user can read it."""
        ...

    def environment(self, options: ServerOptions, key: str) -> dict[str, str]:
        """Variables of the server's process; the key that it asks of its clients among them."""
        ...

    def headers(self, key: str) -> dict[str, str]:
        """Headers of a request that carry the key."""
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
        """Read the answer. `version`: of the weights, where the server does not tell.

        Raises MalformedReply for one that cannot be trained on: another number of
        log-probabilities than tokens, one that is not finite, a field that is missing or odd.
        """
        ...

    async def abort(self, server: Server) -> None:
        """End all requests; each answers with what it has."""
        ...

    async def pause(self, server: Server) -> None:
        """Nothing is written until `resume`; requests stay open."""
        ...

    async def resume(self, server: Server) -> None: ...

    async def sleep(self, server: Server) -> None:
        """Release weights and key-value cache."""
        ...

    async def wake(self, server: Server) -> None: ...

    async def load_weights(self, server: Server, weights: HostWeights, method: str) -> None:
        """Bring `weights` into an idle or paused server and drop what it has cached."""
        ...

    async def mismatch(self, server: Server, weights: HostWeights) -> str | None:
        """None where the server holds `weights` exactly, else a line that names a parameter."""
        ...
