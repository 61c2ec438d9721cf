"""An engine that uses servers: it distributes requests, retries failures and delivers weights.

The differences between SGLang and vLLM are in a `Dialect` (dialect.py). The rest is the same:

- A request goes to the server with the fewest open requests. It has a deadline and a limited number
  of retries; attempts on a server that died do not count, as restarts have their own limit.
- If one of our own servers ends or no longer answers, it is restarted (pool.py) and gets the
  current weights from `HostWeights` before it gets requests.
- Weights go to all servers at once, and are then compared bit for bit.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from torch import Tensor

from RL2.engines.protocol import Completion, MalformedReply, SamplingParams, check_request
from RL2.engines.servers.dialect import Dialect
from RL2.engines.servers.http import ServerRefused, ServerUnreachable
from RL2.engines.servers.pool import Limits, Member, ServerPool
from RL2.engines.servers.process import ServerOptions
from RL2.engines.servers.weights import HostWeights
from RL2.runtime.errors import EngineError

logger = logging.getLogger(__name__)

_BACKOFF = (0.2, 5.0)  # seconds before the first retry, and at most
_ABORT_AGAIN = 0.5  # seconds; a request may reach its server after the abort


class ServerEngine:
    """Engine over one or more servers (see `protocol.Engine`). Use it on one event loop.

    Args:
        dialect: the servers' dialect.
        weights: this node's copy of the weights; closed with the engine.
        servers, urls, key, log_dir, base_port, limits: see `ServerPool`.
        weight_sync: "auto" or one of the dialect's `weight_methods`.

    Raises EngineError for a `weight_sync` that the dialect does not know.
    """

    def __init__(
        self,
        dialect: Dialect,
        weights: HostWeights,
        *,
        servers: Sequence[ServerOptions] = (),
        urls: Sequence[str] = (),
        key: str = "",
        log_dir: str | Path = "servers",
        base_port: int | None = None,
        weight_sync: str = "auto",
        limits: Limits | None = None,
    ):
        self.dialect = dialect
        self.weights = weights
        self.weight_version = 0
        self.context_length: int | None = None
        self._limits = limits or Limits()
        self._method = weight_method(weight_sync, dialect, urls)
        self._pool = ServerPool(
            dialect, self._restore, lambda: weights.model_folder, servers=servers, urls=urls,
            key=key, log_dir=Path(log_dir), base_port=base_port, limits=self._limits,
        )  # fmt: skip
        self._weights_lock = asyncio.Lock()
        self._paused = self._asleep = self._closed = False
        self._aborts = 0
        self._open: set[asyncio.Future] = set()

    # ------------------------------------------------------------------ life

    async def start(self, settled: asyncio.Event | None = None) -> None:
        """Wait until all servers answer. Raises EngineError with the log of one that does not."""
        members = self._pool.members
        try:
            await self._pool.wait_until_ready()
            lengths = await asyncio.gather(
                *(self.dialect.context_length(member.server) for member in members)
            )
        except BaseException:
            await self.close()
            raise
        self.context_length = min((n for n in lengths if n is not None), default=None)
        await self._pool.serve()
        logger.info(
            "%s: %d server%s ready after %.0f s, weights by %s", self.dialect.name, len(members),
            "s" * (len(members) > 1), time.monotonic() - members[0].since, self._method,
        )  # fmt: skip

    async def close(self) -> None:
        """Stop our servers and everything they started, and remove the copy of the weights."""
        if self._closed:
            return
        self._closed = True
        await self._pool.close()
        self.weights.close()

    @property
    def restarts(self) -> int:
        """Number of restarts of all servers in the run so far."""
        return sum(member.restarts for member in self._pool.members)

    def metrics(self) -> dict[str, float]:
        """See `Engine.metrics`."""
        return {"rollout/server_restarts": float(self.restarts)}

    async def healthy(self) -> bool:
        """Whether a server is available for a request."""
        return bool(self._pool.serving)

    # ------------------------------------------------------------------ requests

    async def generate(
        self, token_ids: list[int], sampling: SamplingParams, *, seed: int
    ) -> Completion:
        """Complete `token_ids` on the least busy server. See `Engine.generate`.

        Raises EngineError for a prompt that is empty or does not fit, when all retries
        (`Limits.retries`) have failed, and when no server is left; MalformedReply if the answer to
        the last attempt made no sense.
        """
        if self._closed:
            raise EngineError(f"{self.dialect.name} engine: generate called after close")
        check_request(token_ids, sampling, self.context_length)
        aborts, failures, repetitions = self._aborts, 0, 0
        done: asyncio.Future = asyncio.get_running_loop().create_future()
        self._open.add(done)
        try:
            while True:
                member = await self._pick(lambda: self._aborts != aborts)
                if member is None:
                    return Completion([], [], "abort", [])
                try:
                    return await self._attempt(member, token_ids, sampling, seed)
                except (ServerUnreachable, ServerRefused, MalformedReply) as error:
                    died = not isinstance(error, MalformedReply) and await self._pool.has_died(
                        member, error
                    )
                    failures += not died
                    if failures > self._limits.retries:
                        raise
                    logger.debug("%s: sent again: %s", member.name, error)
                if self._aborts != aborts:
                    return Completion([], [], "abort", [])
                await asyncio.sleep(min(_BACKOFF[0] * 2**repetitions, _BACKOFF[1]))
                repetitions += 1
        finally:
            self._open.discard(done)
            done.set_result(None)

    async def _attempt(
        self, member: Member, token_ids: list[int], sampling: SamplingParams, seed: int
    ) -> Completion:
        # A new id for each attempt: a server may still hold the one before.
        path, body = self.dialect.request(token_ids, sampling, seed, uuid.uuid4().hex)
        member.open_requests += 1
        try:
            reply = await member.server.post(path, body, timeout=self._limits.request_timeout)
        finally:
            member.open_requests -= 1
        completion = self.dialect.completion(reply, sampling, member.version)
        if len(completion.token_ids) > sampling.max_new_tokens:
            raise MalformedReply(
                f"{member.name}: {len(completion.token_ids)} tokens where "
                f"max_new_tokens={sampling.max_new_tokens}"
            )
        return completion

    async def _pick(self, stop: Callable[[], bool]) -> Member | None:
        """The least busy server; waits while there is none, or while paused. None when `stop`."""
        async with self._pool.changed:
            while not stop():
                serving = self._pool.serving
                # A paused server would accept a request and might not release it.
                if serving and not self._paused:
                    return min(serving, key=lambda member: member.open_requests)
                self._pool.check_left()
                await self._pool.changed.wait()
        return None

    async def abort(self) -> None:
        """See `Engine.abort`. Raises EngineError if a request is open a minute later."""
        self._aborts += 1
        waiting = set(self._open)
        async with self._pool.changed:
            self._pool.changed.notify_all()
        deadline = time.monotonic() + 60.0
        while waiting:
            await self._pool.on_all(self.dialect.abort)
            await asyncio.wait(waiting, timeout=_ABORT_AGAIN)
            waiting = {future for future in waiting if not future.done()}
            if waiting and time.monotonic() > deadline:
                raise EngineError(
                    f"{self.dialect.name} engine: {len(waiting)} requests were still open a "
                    "minute after they were aborted"
                )

    async def pause(self) -> None:
        """See `Engine.pause`."""
        self._paused = True
        await self._pool.on_all(self.dialect.pause)

    async def resume(self) -> None:
        """See `Engine.resume`."""
        self._paused = False
        await self._pool.on_all(self.dialect.resume)
        async with self._pool.changed:
            self._pool.changed.notify_all()

    async def sleep(self) -> None:
        """See `Engine.sleep`."""
        if not self._asleep:
            self._asleep = True
            await self._pool.on_all(self.dialect.sleep)

    async def wake(self) -> None:
        """See `Engine.wake`."""
        if self._asleep:
            self._asleep = False
            await self._pool.on_all(self.dialect.wake)
            if self._paused:  # waking may start a server that was paused
                await self._pool.on_all(self.dialect.pause)

    # ------------------------------------------------------------------ weights

    async def update_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], version: int
    ) -> None:
        """Copy the weights, send them to all servers, and compare what arrived.

        A server that dies meanwhile gets the new weights when it is back; this waits for it.
        Raises EngineError naming a parameter that did not arrive, and when no server is left.
        """
        async with self._weights_lock:
            # Iterating may be a collective; it blocks only this event loop.
            self.weights.fill(named_tensors, version)
            self.weight_version = version
            await asyncio.gather(*map(self._update, self._pool.serving))
        await self._pool.wait_for_all()

    async def _update(self, member: Member) -> None:
        try:
            await self._deliver(member)
        except (ServerUnreachable, ServerRefused) as error:
            if not await self._pool.has_died(member, error):
                raise EngineError(
                    f"{member.name}: weight update {self.weights.version} failed: {error}"
                ) from error

    async def _deliver(self, member: Member) -> None:
        """Load the weights into one server, which is paused meanwhile."""
        await self.dialect.pause(member.server)
        await self.dialect.load_weights(member.server, self.weights, self._method)
        problem = await self.dialect.mismatch(member.server, self.weights)
        if problem is not None:
            raise EngineError(
                f"{member.name}: weight update {self.weights.version} by {self._method} did not "
                f"arrive: {problem}; try another rollout.weight_sync"
            )
        member.version = self.weights.version
        if not self._paused:
            await self.dialect.resume(member.server)

    async def _restore(self, member: Member) -> None:
        """Bring a server that was restarted, or answers again, to the state of the others."""
        async with self._weights_lock:
            if self.weights.version is not None:
                await self._deliver(member)
            elif self._paused:
                await self.dialect.pause(member.server)
            if self._asleep:
                await self.dialect.sleep(member.server)
            await self._pool.set_state(member, "serving")


def weight_method(asked: str, dialect: Dialect, urls: Sequence[str]) -> str:
    """Resolve `auto`: on other machines, servers can be reached only by "distributed"."""
    if asked == "auto":
        near = all(urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1") for url in urls)
        asked = dialect.weight_methods[0] if near else "distributed"
    if asked not in dialect.weight_methods:
        raise EngineError(
            f"rollout.weight_sync={asked}: {dialect.name} servers take "
            f"{', '.join(dialect.weight_methods)} here"
        )
    return asked
