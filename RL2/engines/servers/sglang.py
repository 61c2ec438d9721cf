"""Requests to an SGLang server, and how its answers are read (`dialect.Dialect`).

Nothing of SGLang is imported: its servers run in a separate environment, started by the module
`server_side/rl2_sglang.py`. External servers must be started with it, too:

    RL2_SERVER_KEY=<key> PYTHONPATH=<RL2>/engines/server_side python -m rl2_sglang --model-path ...

Written for SGLang 0.5.23.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from RL2.engines.protocol import Completion, MalformedReply, SamplingParams
from RL2.engines.servers.addresses import HOST
from RL2.engines.servers.comparison import Part, first_difference
from RL2.engines.servers.http import Server, ServerRefused, bearer
from RL2.engines.servers.process import SERVER_SIDE, ServerOptions, variables_of
from RL2.engines.servers.replies import completion_of
from RL2.engines.servers.weight_group import WeightGroup, group_with
from RL2.engines.servers.weights import HostWeights, checksum
from RL2.runtime.errors import EngineError

T = TypeVar("T")

KEY_VARIABLE = "RL2_SERVER_KEY"
_BUCKET_BYTES = 512 * 2**20
_UPDATE_TIMEOUT = 600.0  # seconds for one request of a weight update, or for waking up
_JOIN_TIMEOUT = 120.0
_CPU_TOKENS = 32768  # of the key-value cache; SGLang would take most of the machine's memory
# A fused parameter and its parts, in order.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class SGLang:
    """The dialect of SGLang (see `dialect.Dialect` for the methods).

    Weights: for "tensor" the server maps the file of `HostWeights` (in shared memory, if possible)
    and loads it bucket by bucket; for "disk" it loads the folder like any model; both need a server
    on this machine. "distributed" uses a process group with the server (gloo, or nccl, which needs
    other GPUs than the trainer's).

    A pause retracts running requests: their key-value cache is computed again when they go on, so
    that the new weights apply to the whole context.
    """

    name = "sglang"
    health_path = "/health"
    weight_methods = ("tensor", "disk", "distributed")

    # ------------------------------------------------------------------ the process

    def command(self, options: ServerOptions, port: int) -> list[str]:
        arguments = {
            "model-path": options.model_name,
            "dtype": options.dtype,
            "host": HOST,
            "port": port,
            "device": options.device,
            "tp-size": options.tp_size,
            "random-seed": options.seed,
            "context-length": options.context_length,
            "weight-version": 0,
            "log-level-http": "warning",
            # The backend that uses seeds.
            "sampling-backend": "pytorch",
            "mem-fraction-static": options.gpu_memory_utilization,
            "revision": options.revision,
            "load-format": None if options.allow_pickle else "safetensors",
        }
        if options.device == "cpu":
            arguments["max-total-tokens"] = max(_CPU_TOKENS, 2 * (options.context_length or 0))
        command = [options.python, "-m", "rl2_sglang"]
        for name, value in arguments.items():
            if value is not None:
                command += [f"--{name}", str(value)]
        if options.device == "cpu":
            command.append("--sleep-on-idle")
        if options.trust_remote_code:
            command.append("--trust-remote-code")
        if options.sleep:
            # With a copy of the weights, which is restored when the server wakes up.
            command += ["--enable-memory-saver", "--enable-weights-cpu-backup"]
        return command + list(options.extra_args)

    def environment(self, options: ServerOptions, key: str) -> dict[str, str]:
        variables = variables_of(options) | {
            KEY_VARIABLE: key,
            # The health check must not generate a completion, which would wait for a pause to end.
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
            # Only the client closes connections: a server that closes one while a request is on
            # its way looks like a dead server.
            "SGLANG_TIMEOUT_KEEP_ALIVE": "86400",
            # A server's process groups, also the one with us, stay on this machine.
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        }
        if options.device == "cpu":
            # Compiling one small function would need a C++ compiler.
            variables |= {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
        return variables

    def headers(self, key: str) -> dict[str, str]:
        return bearer(key)

    async def context_length(self, server: Server) -> int | None:
        # SGLang's longest prompt is one token shorter; prompt and completion together may have a
        # few tokens more. So this limit is safe for both.
        return _field(await server.get("/server_info"), "max_req_input_len", int)

    # ------------------------------------------------------------------ completions

    def request(
        self, token_ids: list[int], sampling: SamplingParams, seed: int, request_id: str
    ) -> tuple[str, dict[str, Any]]:
        parameters = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_token_ids),
            "sampling_seed": (seed + 2**63) % 2**64 - 2**63,
            # Only the tokens are used; the text for an environment is decoded from them.
            "no_stop_trim": True,
            "skip_special_tokens": False,
            # Override the checkpoint's own sampling settings.
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
        }
        return "/generate", {
            "rid": request_id,
            "input_ids": token_ids,
            "sampling_params": parameters,
            "return_logprob": True,
        }

    def completion(self, reply: Any, sampling: SamplingParams, version: int) -> Completion:
        meta = _field(reply, "meta_info", dict)
        finish, token_ids = _field(meta, "finish_reason", dict), _field(reply, "output_ids", list)
        reason, entries = finish.get("type"), meta.get("output_token_logprobs") or []
        if reason == "abort" and finish.get("status_code") is not None:
            raise MalformedReply(f"sglang: aborted: {finish!r:.200}")
        if reason == "length" and len(token_ids) != sampling.max_new_tokens:
            raise MalformedReply(
                f"sglang: {len(token_ids)} tokens, finish_reason='length', not "
                f"{sampling.max_new_tokens}"
            )
        try:  # each is [log-probability, token id, text]
            logps = [(entry[1], entry[0]) for entry in entries]
        except (IndexError, KeyError, TypeError) as error:
            raise MalformedReply(f"sglang: log-probabilities: {entries!r:.200}") from error
        spans = meta.get("weight_versions") or []
        if not spans and token_ids:  # there may be none if no update came in between
            spans = [{"version": meta.get("weight_version"), "start": 0, "end": len(token_ids)}]
        return completion_of("sglang", token_ids, logps, reason, spans, version)

    # ------------------------------------------------------------------ control

    async def abort(self, server: Server) -> None:
        await server.post("/abort_request", {"abort_all": True})

    async def pause(self, server: Server) -> None:
        await server.post("/pause_generation", {"mode": "retract"})
        # The call above returns at once. This one waits for the scheduler, which handles both in
        # order.
        await server.get("/server_info")

    async def resume(self, server: Server) -> None:
        await server.post("/continue_generation", {})

    async def sleep(self, server: Server) -> None:
        # SGLang asserts that the running batch is empty, and pausing empties it. A sleeping server
        # stays paused.
        await self.pause(server)
        await server.post("/release_memory_occupation", {}, timeout=_UPDATE_TIMEOUT)

    async def wake(self, server: Server) -> None:
        await server.post("/resume_memory_occupation", {}, timeout=_UPDATE_TIMEOUT)
        await self.resume(server)

    # ------------------------------------------------------------------ weights

    async def load_weights(self, server: Server, weights: HostWeights, method: str) -> None:
        version = str(weights.version)
        if method == "disk":
            body = {"model_path": str(weights.folder), "load_format": "auto"}
            body |= {"weight_version": version, "flush_cache": True}
            await server.post("/update_weights_from_disk", body, timeout=_UPDATE_TIMEOUT)
            return
        if method not in self.weight_methods:
            raise EngineError(f"rollout.weight_sync={method}: sglang has {self.weight_methods}")
        info = await server.get("/server_info")
        ranks = _field(info, "tp_size", int)
        if method == "tensor":
            async with _weight_update(server):
                path = weights.folder / "model.safetensors"
                for bucket, last in _buckets(weights, version):
                    await _send_by_memory(server, bucket, ranks, path, last)
            return
        async with _group(server, ranks, _field(info, "device", str)) as (group, name):
            async with _weight_update(server):
                for bucket, last in _buckets(weights, version):
                    await _send_by_group(server, bucket, group, {"group_name": name} | last)

    async def mismatch(self, server: Server, weights: HostWeights) -> str | None:
        try:
            reply = await server.post(
                "/weights_checker", {"action": "rl2_checksums"}, timeout=_UPDATE_TIMEOUT
            )
        except ServerRefused as error:
            raise EngineError(
                f"{server.url}: does not report checksums ({error.text:.200}); start it "
                f"with `python -m rl2_sglang`, which is in {SERVER_SIDE}"
            ) from error
        ranks = [_field(rank, "checksums", dict) for rank in _field(reply, "ranks", list)]
        problem = await asyncio.to_thread(difference, ranks, weights)
        if problem is not None:
            return problem
        version = _field(await server.get("/model_info"), "weight_version", str)
        if version != str(weights.version):
            return f"the server has version {version}, but {weights.version} was published"
        return None


# ---------------------------------------------------------------------- replies


def _field(reply: Any, name: str, kind: type[T]) -> T:
    value = reply.get(name) if isinstance(reply, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise MalformedReply(f"sglang: {name} of type {kind.__name__} is not in {reply!r:.200}")
    return value


# ---------------------------------------------------------------------- comparing weights


def difference(ranks: list[dict[str, str]], weights: HostWeights) -> str | None:
    """The first parameter of the server's ranks that differs from `weights`, and how; or None.

    ranks: for each rank `name -> "checksum numel dtype"`, fused parameters in pieces (see
    `rl2_sglang.checksums`).
    """
    ours = dict(weights)
    held: list[Part] = []
    dtypes: dict[str, torch.dtype] = {}
    for rank in ranks:
        for server_name, line in rank.items():
            try:
                value, numel, dtype = line.split()
                name = _trainer_name(server_name, ours)
                held.append(((name,), int(numel), int(value)))
                dtypes[name] = getattr(torch, dtype)
            except (AttributeError, ValueError) as error:
                raise MalformedReply(f"sglang: checksum of {server_name}: {line!r:.100}") from error
    expected = weights.checksums() | {
        name: checksum(ours[name].to(dtype))  # cast on arrival
        for name, dtype in dtypes.items()
        if name in ours and dtype != ours[name].dtype
    }
    return first_difference(held, expected, {name: one.numel() for name, one in ours.items()})


def _trainer_name(name: str, ours: dict[str, Tensor]) -> str:
    """The checkpoint's name of the parameter (or numbered piece) that the server calls `name`."""
    base, _, piece = name.partition("#")
    module, _, kind = base.rpartition(".")
    prefix, _, leaf = module.rpartition(".")
    if base not in ours and piece and leaf in _FUSED and int(piece) < len(_FUSED[leaf]):
        return ".".join(filter(None, [prefix, _FUSED[leaf][int(piece)], kind]))
    return base


# ---------------------------------------------------------------------- sending weights


@asynccontextmanager
async def _weight_update(server: Server) -> AsyncIterator[None]:
    """The session that SGLang requires for tensors. Always closed, as it would block the next."""
    try:
        await server.post("/begin_weight_update", {}, timeout=_UPDATE_TIMEOUT)
    except ServerRefused:
        # A session that failed may still be open.
        await server.post("/end_weight_update", {}, timeout=_UPDATE_TIMEOUT)
        await server.post("/begin_weight_update", {}, timeout=_UPDATE_TIMEOUT)
    try:
        yield
    except BaseException:
        with suppress(EngineError):
            await server.post("/end_weight_update", {}, timeout=_UPDATE_TIMEOUT)
        raise
    await server.post("/end_weight_update", {}, timeout=_UPDATE_TIMEOUT)


def _buckets(
    weights: HostWeights, version: str
) -> Iterable[tuple[list[tuple[str, Tensor]], dict[str, Any]]]:
    """Buckets, and more fields for each request: the last sets the version and drops caches."""
    buckets = list(weights.buckets(_BUCKET_BYTES))
    for index, bucket in enumerate(buckets):
        last = index == len(buckets) - 1
        yield bucket, {"flush_cache": last, **({"weight_version": version} if last else {})}


async def _send_by_memory(
    server: Server,
    bucket: list[tuple[str, Tensor]],
    ranks: int,
    path: Path,
    more: dict[str, Any],
) -> None:
    """Send names of tensors in a file that the server maps, and copies into its parameters.

    SGLang itself would take tensors of torch.multiprocessing, which need a helper process as long
    as the server uses the memory.
    """
    place = json.dumps({"path": str(path), "names": [name for name, _ in bucket]})
    payload = base64.b64encode(place.encode()).decode()
    await server.post(
        "/update_weights_from_tensor",
        {"serialized_named_tensors": [payload] * ranks, **more},
        timeout=_UPDATE_TIMEOUT,
    )


@asynccontextmanager
async def _group(server: Server, ranks: int, device: str) -> AsyncIterator[tuple[WeightGroup, str]]:
    """A process group with the server's ranks, and its name on the server."""
    plan = group_with(server.url, ranks, device)
    join = {
        "master_address": plan["address"], "master_port": plan["port"], "rank_offset": 1,
        "world_size": plan["world_size"], "group_name": plan["name"], "backend": plan["backend"],
    }  # fmt: skip
    group = await _concurrently(
        server.post("/init_weights_update_group", join, timeout=_JOIN_TIMEOUT),
        asyncio.to_thread(WeightGroup, **plan, timeout=_JOIN_TIMEOUT),
    )
    try:
        yield group, plan["name"]
        await server.post("/destroy_weights_update_group", {"group_name": plan["name"]})
    finally:
        group.close()


async def _send_by_group(
    server: Server, bucket: list[tuple[str, Tensor]], group: WeightGroup, more: dict[str, Any]
) -> None:
    body = {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }

    def broadcast() -> None:
        for _, tensor in bucket:
            group.broadcast(tensor)

    await _concurrently(
        server.post("/update_weights_from_distributed", body | more, timeout=_UPDATE_TIMEOUT),
        asyncio.to_thread(broadcast),
    )


async def _concurrently(request: Coroutine[Any, Any, Any], ours: Coroutine[Any, Any, T]) -> T:
    """Run both concurrently; returns the result of `ours`, or raises the first error at once."""
    tasks = [asyncio.ensure_future(request), asyncio.ensure_future(ours)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
            # A thread cannot be cancelled: it ends by its own timeout, and its error is ignored.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return tasks[1].result()
