"""The servers of an engine: started, watched, and restarted when they end or stop answering.

A server is "starting", "serving", "lost" (it gets no requests until it is back) or "gone" (given up
or closed).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from RL2.engines.protocol import MalformedReply
from RL2.engines.servers.addresses import HOST, free_port
from RL2.engines.servers.dialect import Dialect
from RL2.engines.servers.http import Server, ServerRefused, ServerUnreachable
from RL2.engines.servers.process import ServerOptions, ServerProcess, wait_until_healthy
from RL2.runtime.errors import EngineError

logger = logging.getLogger(__name__)

_WATCH_EVERY = 0.5  # seconds between checks whether our own process still runs
_HEALTH_EVERY = 10.0  # seconds between health checks
_HEALTH_TIMEOUT = 20.0
_UNHEALTHY = 3  # failed health checks in a row before a server counts as dead
_FAILED_STARTS = 2  # failed starts in a row before a server is given up
_LOST_FOR = 30.0  # seconds without an answer before an external server is given up


@dataclass(frozen=True)
class Limits:
    """Limits on waiting and retries.

    request_timeout: seconds for one attempt at a completion. retries: attempts after the first.
    max_restarts: restarts of one server in a run. start_timeout: seconds for a server to start.
    """

    request_timeout: float = 1800.0
    retries: int = 3
    max_restarts: int = 8
    start_timeout: float = 600.0


@dataclass
class Member:
    """One server of a pool. process: None for an external server. problem: why it is not serving.
    version: version of its weights. since: when it was started."""

    name: str
    server: Server
    options: ServerOptions | None = None
    process: ServerProcess | None = None
    state: str = "starting"
    problem: str = ""
    open_requests: int = 0
    restarts: int = 0
    failed_starts: int = 0
    version: int = 0
    since: float = field(default_factory=time.monotonic)


class ServerPool:
    """Servers of one kind. Our own servers start at once. Use it on one event loop.

    Args:
        dialect: the servers' dialect.
        restore: called with a server that is back; brings it to the state of the others and then
            sets it to "serving".
        model_folder: returns the run's own copy of the model, once there is one.
        servers: options of the servers to start, one entry for each; or
        urls: addresses of external servers.
        key: what clients must send; passed to our servers in their environment.
        log_dir: folder for the logs of our servers.
        base_port: port of our first server, the others use the next ones; None takes free ports.
        limits: limits on waiting and retries.

    changed: notified whenever a server's state changes.
    """

    def __init__(
        self,
        dialect: Dialect,
        restore: Callable[[Member], Awaitable[None]],
        model_folder: Callable[[], Path | None],
        *,
        servers: Sequence[ServerOptions],
        urls: Sequence[str],
        key: str,
        log_dir: Path,
        base_port: int | None,
        limits: Limits,
    ):
        self.dialect = dialect
        self.changed = asyncio.Condition()
        self._restore, self._model_folder = restore, model_folder
        self._key, self._log_dir, self._base_port = key, log_dir, base_port
        self._limits = limits
        self._watchers: list[asyncio.Task] = []
        self.members = [
            Member(f"{dialect.name} server {url}", Server(url, dialect.headers(key)))
            for url in urls
        ]
        for index, options in enumerate(servers):
            self.members.append(self._launch(index, options))

    @property
    def serving(self) -> list[Member]:
        return [member for member in self.members if member.state == "serving"]

    async def wait_until_ready(self) -> None:
        """Wait until all servers answer. Raises EngineError with the log of one that does not."""
        await asyncio.gather(*map(self._until_ready, self.members))

    async def serve(self) -> None:
        """Let all servers get requests from now on, and watch them."""
        for member in self.members:
            await self.set_state(member, "serving")
            self._watchers.append(asyncio.create_task(self._watch(member)))

    async def close(self) -> None:
        """Stop our servers and everything they started."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(
            *(member.process.stop() for member in self.members if member.process),
            return_exceptions=True,
        )
        for member in self.members:
            await member.server.close()
            await self.set_state(member, "gone", "closed")

    async def set_state(self, member: Member, state: str, problem: str = "") -> None:
        async with self.changed:
            member.state, member.problem = state, problem
            self.changed.notify_all()

    async def on_all(self, action: Callable[[Server], Awaitable[None]]) -> None:
        """Run `action` on all servers that serve. If one dies, its watcher brings it back."""

        async def on(member: Member) -> None:
            try:
                await action(member.server)
            except (ServerUnreachable, ServerRefused) as error:
                if not await self.has_died(member, error):
                    raise

        await asyncio.gather(*map(on, self.serving))

    async def wait_for_all(self) -> None:
        """Wait until every server serves or is given up. Raises EngineError if none is left."""
        async with self.changed:
            while any(member.state in ("starting", "lost") for member in self.members):
                self.check_left()
                await self.changed.wait()
            self.check_left()

    def check_left(self) -> None:
        """Raise EngineError if no server is left. Call with `changed` held."""
        if all(member.state == "gone" for member in self.members):
            problems = "\n".join(f"{member.name}: {member.problem}" for member in self.members)
            raise EngineError(f"no {self.dialect.name} server is left\n{problems}")

    async def has_died(self, member: Member, error: ServerUnreachable | ServerRefused) -> bool:
        """Whether a request failed because its server died; if so, the server gets no requests
        until it is back."""
        if member.state != "serving":
            return True
        if isinstance(error, ServerRefused) and error.status < 500:
            return False
        if member.process is not None and isinstance(error, ServerUnreachable):
            # Its connections close before the process ends.
            for _ in range(10):
                if member.process.status is not None:
                    await self._lost(member, f"ended with status {member.process.status}")
                    return True
                await asyncio.sleep(0.1)
        if await self._answers(member):
            return False
        await self._lost(member, "does not answer")
        return True

    async def _watch(self, member: Member) -> None:
        """Detect when a server is gone, and bring it back, as long as the engine lives."""
        silent, asked = 0, time.monotonic()
        while member.state != "gone":
            await asyncio.sleep(_WATCH_EVERY)
            if member.state == "serving" and time.monotonic() - asked > _HEALTH_EVERY:
                silent = 0 if await self._answers(member) else silent + 1
                asked = time.monotonic()
                if silent >= _UNHEALTHY:
                    await self._lost(member, f"did not answer {silent} times in a row")
            if member.process is not None and member.process.status is not None:
                await self._lost(member, f"ended with status {member.process.status}")
            while member.state == "lost":
                await self._try_to_bring_back(member)
                silent, asked = 0, time.monotonic()

    async def _answers(self, member: Member) -> bool:
        try:
            await member.server.get(self.dialect.health_path, timeout=_HEALTH_TIMEOUT)
        except (ServerUnreachable, ServerRefused):
            return False
        except MalformedReply:
            return True
        return True

    async def _lost(self, member: Member, why: str) -> None:
        if member.state != "serving":
            return
        await self.set_state(member, "lost", why)
        end = f"; {member.process.end_of_log()}" if member.process else ""
        logger.warning("%s %s%s", member.name, why, end)

    async def _try_to_bring_back(self, member: Member) -> None:
        """Sets it to "serving", "lost" (for another attempt), or "gone"."""
        if member.process is not None and member.restarts >= self._limits.max_restarts:
            problem = (
                f"{member.problem}; it was restarted {member.restarts} times already "
                f"(rollout.max_restarts); {member.process.end_of_log()}"
            )
            member.failed_starts = _FAILED_STARTS
        else:
            try:
                await self._bring_back(member)
                member.failed_starts = 0
                return
            except Exception as error:  # otherwise requests would wait for this server forever
                problem = str(error) if isinstance(error, EngineError) else repr(error)
                member.failed_starts += 1 if member.process is not None else _FAILED_STARTS
        if member.failed_starts >= _FAILED_STARTS:
            logger.error("%s is given up: %s", member.name, problem)
            await self.set_state(member, "gone", problem)
        else:
            logger.warning("%s: %s", member.name, problem)
            await self.set_state(member, "lost", problem)

    async def _bring_back(self, member: Member) -> None:
        """Start a new process, or wait for the external server; then restore it."""
        if member.process is not None:
            await member.process.stop()
            await member.server.close()
            index = self.members.index(member)
            fresh = self._launch(index, self._restart_options(member.options))
            member.server, member.process = fresh.server, fresh.process
            member.restarts += 1
            await self.set_state(member, "starting", member.problem)
            await self._until_ready(member)
        else:
            deadline = time.monotonic() + _LOST_FOR
            while not await self._answers(member):
                if time.monotonic() > deadline:
                    raise EngineError(f"{member.problem} for {_LOST_FOR:g} s")
                await asyncio.sleep(1.0)
        await self._restore(member)
        logger.info("%s is back, weights of version %d", member.name, member.version)

    def _restart_options(self, options: ServerOptions) -> ServerOptions:
        """Options for a restart, from the run's own copy of the model, as the original files may
        have changed. Code that comes with a model is not in the copy."""
        own = self._model_folder()
        if own is None or options.trust_remote_code:
            return options
        return replace(options, model_name=str(own), revision=None, allow_pickle=False)

    def _launch(self, index: int, options: ServerOptions) -> Member:
        port = free_port() if self._base_port is None else self._base_port + index
        name = f"{self.dialect.name} server {index} ({HOST}:{port})"
        process = ServerProcess(
            self.dialect.command(options, port),
            self.dialect.environment(options, self._key),
            self._log_dir / f"{self.dialect.name}{index}.log",
        )
        server = Server(f"http://{HOST}:{port}", self.dialect.headers(self._key))
        return Member(name, server, options, process)

    async def _until_ready(self, member: Member) -> None:
        if member.process is not None:
            await wait_until_healthy(
                member.server, member.process, self.dialect.health_path, member.name,
                self._limits.start_timeout,
            )  # fmt: skip
            return
        try:
            await member.server.get(self.dialect.health_path, timeout=_HEALTH_TIMEOUT)
        except (ServerUnreachable, ServerRefused) as error:
            raise EngineError(
                f"rollout.server_url={member.server.url}: no {self.dialect.name} server answers "
                f"there ({error}); start it first, or leave the key out"
            ) from error
