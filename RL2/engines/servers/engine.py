"""An engine made of servers: requests spread over them, failures repaired, weights delivered.

What differs between SGLang and vLLM is a `Dialect` (dialect.py). Everything else is here, once:

- A request goes to the server with the fewest open ones. It has a deadline and a bounded number
  of repetitions; a server that died under it does not count, as restarts have a bound of their own.
- A server of ours that ends, or no longer answers, is started again, gets the current weights from
  `HostWeights`, and only then gets requests.
- Weights go to all servers at once, and what has arrived is compared, bit for bit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from RL2.config.models import hub_options
from RL2.engines.protocol import Completion, MalformedReply, SamplingParams, check_request
from RL2.engines.servers.dialect import Dialect
from RL2.engines.servers.server import (
    HOST,
    Server,
    ServerOptions,
    ServerProcess,
    ServerRefused,
    ServerUnreachable,
    free_port,
    wait_until_healthy,
)
from RL2.engines.servers.weights import HostWeights
from RL2.runtime.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

_WATCH_EVERY = 0.5  # seconds between looks at a process of ours
_HEALTH_EVERY = 10.0  # seconds between questions whether it answers
_HEALTH_TIMEOUT = 20.0
_UNHEALTHY = 3  # questions in a row without an answer after which a server counts as dead
_FAILED_STARTS = 2  # in a row, after which a server is given up
_LOST_FOR = 30.0  # seconds in which no server of somebody else's answers, after which we stop
_BACKOFF = (0.2, 5.0)  # seconds before the first repetition, and at most
_ABORT_AGAIN = 0.5  # a request may reach its server after the abort did


@dataclass(frozen=True)
class Limits:
    """Bounds on waiting and repeating.

    request_timeout: seconds for one attempt at a completion. retries: attempts after the first.
    max_restarts: of one server in a run. start_timeout: seconds until a server must answer.
    """

    request_timeout: float = 1800.0
    retries: int = 3
    max_restarts: int = 8
    start_timeout: float = 600.0


@dataclass
class _Member:
    """One server of the engine. process is None where somebody else runs it."""

    name: str
    server: Server
    options: ServerOptions | None = None
    process: ServerProcess | None = None
    state: str = "starting"  # -> serving <-> lost -> gone
    problem: str = ""
    open_requests: int = 0
    restarts: int = 0
    failed_starts: int = 0
    version: int = 0
    since: float = field(default_factory=time.monotonic)


class ServerEngine:
    """Engine over one or more servers (see `engine.Engine`). Use it on one event loop.

    Args:
        dialect: of the servers.
        weights: where this node's copy of the weights is kept; closed with the engine.
        servers: what to start, one entry for each; or
        urls: of servers that somebody else runs.
        key: what clients must send; passed to our servers in their environment.
        log_dir: for the logs of our servers.
        base_port: of our first server, the next ones follow; None takes free ones.
        weight_sync: "auto" or one of the dialect's `weight_methods`.
        limits: on waiting and repeating.

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
        self._key, self._log_dir, self._base_port = key, Path(log_dir), base_port
        self._method = _weight_method(weight_sync, dialect, urls)
        self._members = [
            _Member(f"{dialect.name} server {url}", Server(url, dialect.headers(key)))
            for url in urls
        ]
        for index, options in enumerate(servers):
            self._members.append(self._launch(index, options))
        self._watchers: list[asyncio.Task] = []
        self._changed = asyncio.Condition()
        self._weights_lock = asyncio.Lock()
        self._paused = self._asleep = self._closed = False
        self._aborts = 0
        self._open: set[asyncio.Future] = set()

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Wait until all servers answer. Raises EngineError with the log of one that does not."""
        first = self._members[0]
        try:
            await asyncio.gather(*map(self._until_ready, self._members))
            lengths = await asyncio.gather(
                *(self.dialect.context_length(member.server) for member in self._members)
            )
        except BaseException:
            await self.close()
            raise
        self.context_length = min((n for n in lengths if n is not None), default=None)
        for member in self._members:
            await self._set(member, "serving")
            self._watchers.append(asyncio.create_task(self._watch(member)))
        logger.info(
            "%s: %d server%s ready after %.0f s, weights by %s", self.dialect.name,
            len(self._members), "s" * (len(self._members) > 1), time.monotonic() - first.since,
            self._method,
        )  # fmt: skip

    async def close(self) -> None:
        """Stop our servers and everything they started, and remove the copy of the weights."""
        if self._closed:
            return
        self._closed = True
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(
            *(member.process.stop() for member in self._members if member.process),
            return_exceptions=True,
        )
        for member in self._members:
            await member.server.close()
            await self._set(member, "gone", "closed")
        self.weights.close()

    @property
    def restarts(self) -> int:
        """Of all servers in the run so far."""
        return sum(member.restarts for member in self._members)

    def metrics(self) -> dict[str, float]:
        """See `Engine.metrics`."""
        return {"rollout/server_restarts": float(self.restarts)}

    async def healthy(self) -> bool:
        """Whether a request would find a server."""
        return any(member.state == "serving" for member in self._members)

    # ------------------------------------------------------------------ requests

    async def generate(
        self, token_ids: list[int], sampling: SamplingParams, *, seed: int
    ) -> Completion:
        """Complete `token_ids` on the least busy server. See `Engine.generate`.

        Raises EngineError for a prompt that is empty or does not fit, when a request failed
        `Limits.retries` times, and when no server is left; MalformedReply when the last of these
        attempts brought an answer that makes no sense.
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
                    died = not isinstance(error, MalformedReply) and await self._died(member, error)
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
        self, member: _Member, token_ids: list[int], sampling: SamplingParams, seed: int
    ) -> Completion:
        # A new name for each attempt: a server may still hold the one before.
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

    async def _pick(self, stop: Callable[[], bool]) -> _Member | None:
        """The least busy server; waits while there is none, or a pause. None when `stop`."""
        async with self._changed:
            while not stop():
                serving = [m for m in self._members if m.state == "serving"]
                # A server that is paused would take a request and might not let go of it.
                if serving and not self._paused:
                    return min(serving, key=lambda member: member.open_requests)
                self._check_left()
                await self._changed.wait()
        return None

    async def abort(self) -> None:
        """See `Engine.abort`. Raises EngineError if a request is open a minute later."""
        self._aborts += 1
        waiting = set(self._open)
        async with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + 60.0
        while waiting:
            await self._on_all(self.dialect.abort)
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
        await self._on_all(self.dialect.pause)

    async def resume(self) -> None:
        """See `Engine.resume`."""
        self._paused = False
        await self._on_all(self.dialect.resume)
        async with self._changed:
            self._changed.notify_all()

    async def sleep(self) -> None:
        """See `Engine.sleep`."""
        if not self._asleep:
            self._asleep = True
            await self._on_all(self.dialect.sleep)

    async def wake(self) -> None:
        """See `Engine.wake`."""
        if self._asleep:
            self._asleep = False
            await self._on_all(self.dialect.wake)
            if self._paused:  # waking may start a server that was paused
                await self._on_all(self.dialect.pause)

    async def _on_all(self, action: Callable[[Server], Awaitable[None]]) -> None:
        """Do it on all servers that serve; one that dies over it is its watcher's business."""

        async def one(member: _Member) -> None:
            try:
                await action(member.server)
            except (ServerUnreachable, ServerRefused) as error:
                if not await self._died(member, error):
                    raise

        await asyncio.gather(*(one(m) for m in self._members if m.state == "serving"))

    # ------------------------------------------------------------------ weights

    async def update_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], version: int
    ) -> None:
        """Take a copy, send it to all servers, and compare what arrived.

        A server that dies over it gets the new weights when it is back; this waits for it.
        Raises EngineError naming a parameter that did not arrive, and when no server is left.
        """
        async with self._weights_lock:
            # The iteration may be a collective, which holds up this loop and nobody else.
            self.weights.fill(named_tensors, version)
            self.weight_version = version
            serving = [m for m in self._members if m.state == "serving"]
            await asyncio.gather(*map(self._update, serving))
        async with self._changed:
            while any(m.state in ("starting", "lost") for m in self._members):
                self._check_left()
                await self._changed.wait()
            self._check_left()

    async def _update(self, member: _Member) -> None:
        try:
            await self._deliver(member)
        except (ServerUnreachable, ServerRefused) as error:
            if not await self._died(member, error):
                raise EngineError(
                    f"{member.name}: weight update {self.weights.version} failed: {error}"
                ) from error

    async def _deliver(self, member: _Member) -> None:
        """Weights into one server, stopped meanwhile; it is running again afterwards."""
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

    # ------------------------------------------------------------------ failures

    async def _watch(self, member: _Member) -> None:
        """Notice that a server is gone, and bring it back, for as long as the engine lives."""
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

    async def _answers(self, member: _Member) -> bool:
        try:
            await member.server.get(self.dialect.health_path, timeout=_HEALTH_TIMEOUT)
        except (ServerUnreachable, ServerRefused):
            return False
        except MalformedReply:
            return True
        return True

    async def _died(self, member: _Member, error: ServerUnreachable | ServerRefused) -> bool:
        """Whether that is why it failed; marks the server, so that nobody asks it again."""
        if member.state != "serving":
            return True
        if isinstance(error, ServerRefused) and error.status < 500:
            return False
        if member.process is not None and isinstance(error, ServerUnreachable):
            # Its connections close before it has ended.
            for _ in range(10):
                if member.process.status is not None:
                    await self._lost(member, f"ended with status {member.process.status}")
                    return True
                await asyncio.sleep(0.1)
        if await self._answers(member):
            return False
        await self._lost(member, "does not answer")
        return True

    async def _lost(self, member: _Member, why: str) -> None:
        if member.state != "serving":
            return
        await self._set(member, "lost", why)
        end = f"; {member.process.end_of_log()}" if member.process else ""
        logger.warning("%s %s%s", member.name, why, end)

    async def _try_to_bring_back(self, member: _Member) -> None:
        """Leaves it serving, lost for another attempt, or gone."""
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
            except Exception as error:  # those who wait for this server would wait for ever
                problem = str(error) if isinstance(error, EngineError) else repr(error)
                member.failed_starts += 1 if member.process is not None else _FAILED_STARTS
        if member.failed_starts >= _FAILED_STARTS:
            logger.error("%s is given up: %s", member.name, problem)
            await self._set(member, "gone", problem)
        else:
            logger.warning("%s: %s", member.name, problem)
            await self._set(member, "lost", problem)

    async def _bring_back(self, member: _Member) -> None:
        """A new process, or the patience to wait for somebody else's; then the current weights."""
        if member.process is not None:
            await member.process.stop()
            await member.server.close()
            index = self._members.index(member)
            fresh = self._launch(index, self._as_it_was(member.options))
            member.server, member.process = fresh.server, fresh.process
            member.restarts += 1
            await self._set(member, "starting", member.problem)
            await self._until_ready(member)
        else:
            deadline = time.monotonic() + _LOST_FOR
            while not await self._answers(member):
                if time.monotonic() > deadline:
                    raise EngineError(f"{member.problem} for {_LOST_FOR:g} s")
                await asyncio.sleep(1.0)
        async with self._weights_lock:
            if self.weights.version is not None:
                await self._deliver(member)
            elif self._paused:
                await self.dialect.pause(member.server)
            if self._asleep:
                await self.dialect.sleep(member.server)
            await self._set(member, "serving")
        logger.info("%s is back, weights of version %d", member.name, member.version)

    def _check_left(self) -> None:
        """Raise where no server is left. Call with `_changed` held."""
        if all(member.state == "gone" for member in self._members):
            problems = "\n".join(f"{member.name}: {member.problem}" for member in self._members)
            raise EngineError(f"no {self.dialect.name} server is left\n{problems}")

    def _as_it_was(self, options: ServerOptions) -> ServerOptions:
        """For a server that starts anew: the run's own copy of the model, whatever has become of
        the files by now. Code that comes with a model is not in the copy."""
        own = self.weights.model_folder
        if own is None or options.trust_remote_code:
            return options
        return replace(options, model_name=str(own), revision=None, allow_pickle=False)

    def _launch(self, index: int, options: ServerOptions) -> _Member:
        port = free_port() if self._base_port is None else self._base_port + index
        name = f"{self.dialect.name} server {index} ({HOST}:{port})"
        process = ServerProcess(
            self.dialect.command(options, port),
            self.dialect.environment(options, self._key),
            self._log_dir / f"{self.dialect.name}{index}.log",
        )
        server = Server(f"http://{HOST}:{port}", self.dialect.headers(self._key))
        return _Member(name, server, options, process)

    async def _until_ready(self, member: _Member) -> None:
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

    async def _set(self, member: _Member, state: str, problem: str = "") -> None:
        async with self._changed:
            member.state, member.problem = state, problem
            self._changed.notify_all()


def server_engine(
    dialect: Dialect, config: DictConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> ServerEngine:
    """The engine of this node, as the config of a run wants it; its servers start at once.

    Each server gets `rollout.tp_size` GPUs of this machine; clients of `rollout.server_url` send
    the key that RL2_SERVER_KEY holds.

    Raises ConfigError for more servers than there are GPUs.
    """
    rollout = config.rollout
    model = AutoConfig.from_pretrained(rollout.model_name, **hub_options(config.actor))
    generation = None
    with suppress(OSError):  # not every model has one
        generation = GenerationConfig.from_pretrained(
            rollout.model_name, revision=config.actor.revision
        )
    # What is compared bit for bit must be in the servers' type.
    dtype = str(model.dtype).removeprefix("torch.") if rollout.dtype == "auto" else rollout.dtype
    urls = rollout.server_url
    urls = [] if urls is None else [urls] if isinstance(urls, str) else list(urls)
    servers = [] if urls else _server_options(config, model, str(dtype), device)
    return ServerEngine(
        dialect,
        HostWeights(
            getattr(torch, str(dtype)), config=model, tokenizer=tokenizer, generation=generation,
            folder=rollout.weights_dir,
        ),
        servers=servers,
        urls=urls,
        key=os.environ.get("RL2_SERVER_KEY", "") if urls else secrets.token_urlsafe(32),
        log_dir=Path(config.trainer.save_dir) / "servers",
        base_port=rollout.base_port,
        weight_sync=str(rollout.weight_sync),
        limits=Limits(
            request_timeout=rollout.request_timeout,
            retries=rollout.request_retries,
            max_restarts=rollout.max_restarts,
            start_timeout=rollout.server_start_timeout,
        ),
    )  # fmt: skip


def _server_options(
    config: DictConfig, model: PretrainedConfig, dtype: str, device: torch.device
) -> list[ServerOptions]:
    rollout, n_ranks = config.rollout, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = rollout.tp_size
    n_servers = rollout.servers_per_node or max(1, n_ranks // size)
    if device.type == "cuda" and n_servers * size > torch.cuda.device_count():
        raise ConfigError(
            f"rollout.servers_per_node={n_servers}: with rollout.tp_size={size} needs "
            f"{n_servers * size} GPUs, and this machine has {torch.cuda.device_count()}"
        )
    # The longest sequence that training takes, or an evaluation writes; a server would else plan
    # for all that the model can read.
    train, test = rollout.train_sampling_params, rollout.test_sampling_params
    prompt = config.actor.max_length_per_device - train.max_new_tokens
    prompt = max(prompt, config.test_data.max_prompt_length or prompt)
    length = max(config.actor.max_length_per_device, prompt + test.max_new_tokens)
    limit = getattr(model.get_text_config(), "max_position_embeddings", None)
    return [
        ServerOptions(
            model_name=rollout.model_name,
            dtype=dtype,
            device=device.type,
            tp_size=size,
            context_length=min(length, limit or length),
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            max_in_flight=rollout.max_in_flight,
            sleep=rollout.sleep,
            trust_remote_code=config.actor.trust_remote_code,
            revision=config.actor.revision,
            allow_pickle=config.actor.allow_pickle,
            seed=config.trainer.seed,
            # Not resolved: the python of a virtual environment is a link to another one.
            python=os.path.abspath(rollout.server_python or sys.executable),
            extra_args=tuple(rollout.server_args),
            gpus=tuple(range(i * size, (i + 1) * size)) if device.type == "cuda" else (),
        )
        for i in range(n_servers)
    ]


def _weight_method(asked: str, dialect: Dialect, urls: Sequence[str]) -> str:
    """`auto` resolved: only servers of this machine can be reached in other ways than a group."""
    if asked == "auto":
        near = all(urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1") for url in urls)
        asked = dialect.weight_methods[0] if near else "distributed"
    if asked not in dialect.weight_methods:
        raise EngineError(
            f"rollout.weight_sync={asked}: {dialect.name} servers take "
            f"{', '.join(dialect.weight_methods)} here"
        )
    return asked
