"""What differs between kinds of servers, and what their dialects have in common."""

from __future__ import annotations

from typing import Any, Protocol

from RL2.engines.protocol import Completion, MalformedReply, SamplingParams
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


def token_versions(name: str, spans: list[dict[str, Any]], count: int, version: int) -> list[int]:
    """Version of the weights of each of `count` tokens, from spans that follow one another.

    name: of the kind of server. spans: {"version", "start", "end"} each, as SGLang and vLLM tell
    them; the version "default" of a server that was never told one stands for `version`. A span
    may be empty: SGLang sends one with a request that is aborted before its first token.

    Raises MalformedReply for spans that leave a gap, overlap, or cover another number of tokens.
    """
    versions: list[int] = []
    try:
        for span in spans:
            start, end = span["start"], span["end"]
            if start != len(versions) or not start <= end <= count:
                raise ValueError("no span of these tokens")
            number = version if span["version"] == "default" else int(span["version"])
            versions += [number] * (end - start)
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedReply(f"{name}: weight versions {spans!r:.200}, {count} tokens") from error
    if len(versions) != count:
        raise MalformedReply(f"{name}: weight versions {spans!r:.200}, {count} tokens")
    return versions
