"""vLLM servers: their command line, requests to them, and how their answers are read.

vLLM runs in a separate environment and is never imported here. Our part of the server is
`server_side/rl2_vllm.py` (weights, checksums, log-probabilities before top-p) and
`server_side/rl2_vllm_http.py` (requires the key on all endpoints). An external server needs both
as well: see `VLLM.command` and `VLLM.environment`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from RL2.engines.protocol import Completion, MalformedReply, SamplingParams
from RL2.engines.servers.addresses import HOST
from RL2.engines.servers.comparison import first_difference
from RL2.engines.servers.http import Server, bearer
from RL2.engines.servers.process import ServerOptions, variables_of
from RL2.engines.servers.replies import completion_of
from RL2.engines.servers.weight_group import WeightGroup, group_with
from RL2.engines.servers.weights import HostWeights
from RL2.runtime.errors import ConfigError, EngineError

_WEIGHTS_TIMEOUT = 1800.0  # seconds for one step of a weight update
_GROUP_TIMEOUT = 120.0  # for joining the process group, and for each tensor
_MIN_TEMPERATURE = 0.01  # vLLM silently raises lower ones
_NO_LOGP = -9999.0  # what vLLM writes for a log-probability that is not a number
_CPU_CACHE_BYTES = 2**30
_MOST_SEQUENCES = {"cpu": 256, "cuda": 1024}  # more per step are slower or do not fit


class VLLM:
    """Dialect of vLLM 0.32 (see `dialect.Dialect`).

    Weights: "tensor" maps the file of `HostWeights`, "distributed" uses a process group with the
    trainer, "disk" uses vLLM's own loader on the folder of that file.
    """

    name = "vllm"
    health_path = "/health"
    weight_methods = ("tensor", "distributed", "disk")

    # ------------------------------------------------------------------ start

    def command(self, options: ServerOptions, port: int) -> list[str]:
        """See `Dialect.command`."""
        sequences = min(options.max_in_flight, _MOST_SEQUENCES[options.device])
        command = [
            # Not the `vllm` command: that of the CPU package does not find its own package.
            options.python, "-m", "vllm.entrypoints.openai.api_server",
            "--model", options.model_name, "--host", HOST, "--port", str(port),
            "--dtype", options.dtype, "--seed", str(options.seed),
            "--tensor-parallel-size", str(options.tp_size), "--max-num-seqs", str(sequences),
            "--enable-scale-out",  # for /inference/v1/generate; --tokens-only would ignore `stop`
            "--logprobs-mode", "processed_logprobs",
            "--worker-cls", "rl2_vllm.Worker", "--middleware", "rl2_vllm_http.RequireKey",
            "--disable-uvicorn-access-log", "--uvicorn-log-level", "warning",
        ]  # fmt: skip
        if options.context_length is not None:
            command += ["--max-model-len", str(options.context_length)]
        if options.gpu_memory_utilization is not None:
            command += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
        elif options.device == "cpu":
            command += ["--kv-cache-memory-bytes", str(_CPU_CACHE_BYTES)]
        if options.device == "cpu":
            # A chunked prompt with a seed ends the server: CPU generators have no offset.
            command += ["--enforce-eager", "--no-enable-chunked-prefill"]
            if options.tp_size == 1:
                # One process less: starts in a third of the time, and steps need no queue.
                command += ["--distributed-executor-backend", "uni"]
        if options.sleep:
            command += ["--enable-sleep-mode"]
        if options.revision is not None:
            for flag in ("--revision", "--code-revision", "--tokenizer-revision"):
                command += [flag, options.revision]
        if not options.allow_pickle:
            command += ["--load-format", "safetensors"]
        if options.trust_remote_code:
            command += ["--trust-remote-code"]
        return command + list(options.extra_args)

    def environment(self, options: ServerOptions, key: str) -> dict[str, str]:
        """See `Dialect.environment`."""
        variables = variables_of(options) | {
            "VLLM_API_KEY": key,
            "VLLM_SERVER_DEV_MODE": "1",  # pause, abort, collective_rpc
            "VLLM_USE_V2_MODEL_RUNNER": "0",  # rl2_vllm.py supports only the sampler of V1
            # Longer than a client keeps a connection: it must not send on one that was just closed.
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DO_NOT_TRACK": "1",
            # All processes of a server are on one machine: they need no other interface.
            "VLLM_HOST_IP": HOST,
            "VLLM_LOOPBACK_IP": HOST,
        }
        if sys.platform == "linux":
            variables |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        if Path(options.model_name).is_dir():
            variables["HF_HUB_OFFLINE"] = "1"
        if options.device == "cpu":
            # Use OMP_NUM_THREADS; vLLM would bind each thread to a core.
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            if options.tp_size == 1:
                variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # allows the backend `uni`
        return variables

    def headers(self, key: str) -> dict[str, str]:
        """See `Dialect.headers`."""
        return bearer(key)

    async def context_length(self, server: Server) -> int | None:
        """See `Dialect.context_length`."""
        reply = await server.get("/v1/models")
        try:
            return int(reply["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise MalformedReply(f"{server.url}/v1/models: {str(reply)[:200]}") from error

    # ------------------------------------------------------------------ completions

    def request(
        self, token_ids: list[int], sampling: SamplingParams, seed: int, request_id: str
    ) -> tuple[str, dict[str, Any]]:
        """See `Dialect.request`. Raises ConfigError for a temperature that vLLM would change."""
        if 0 < sampling.temperature < _MIN_TEMPERATURE:
            raise ConfigError(
                f"temperature={sampling.temperature}: vLLM raises it to {_MIN_TEMPERATURE}; "
                f"use 0 or at least {_MIN_TEMPERATURE}"
            )
        params = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "seed": seed % 2**63,
            "max_tokens": sampling.max_new_tokens,
            "logprobs": 0,  # of the sampled token only
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_token_ids),
            # Stop strings are searched in the text; special tokens must be in it.
            "detokenize": bool(sampling.stop),
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }
        body = {"request_id": request_id, "token_ids": token_ids, "sampling_params": params}
        return "/inference/v1/generate", body

    def completion(self, reply: Any, sampling: SamplingParams, version: int) -> Completion:
        """See `Dialect.completion`."""
        try:
            [choice] = reply["choices"]
            token_ids, reason = choice["token_ids"], choice["finish_reason"]
            content = choice["logprobs"]["content"]
            logps = [(entry["token_id"], entry["logprob"]) for entry in content or []]
            spans = choice["weight_versions"] or [
                {"version": version, "start": 0, "end": len(token_ids)}
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedReply(f"{self.name}: no completion in {str(reply)[:200]}") from error
        spans = spans if token_ids else []
        return completion_of(self.name, token_ids, logps, reason, spans, version, _NO_LOGP)

    # ------------------------------------------------------------------ control

    async def abort(self, server: Server) -> None:
        """See `Dialect.abort`."""
        await server.post("/abort_requests", {})

    async def pause(self, server: Server) -> None:
        """See `Dialect.pause`."""
        await server.post("/pause?mode=keep&clear_cache=false", timeout=_WEIGHTS_TIMEOUT)

    async def resume(self, server: Server) -> None:
        """See `Dialect.resume`."""
        await server.post("/resume")

    async def sleep(self, server: Server) -> None:
        """See `Dialect.sleep`. The weights move to CPU memory, and `wake` restores them."""
        await self.pause(server)
        await self._drop_cache(server)
        await server.post("/sleep?level=1&mode=keep", timeout=_WEIGHTS_TIMEOUT)

    async def wake(self, server: Server) -> None:
        """See `Dialect.wake`."""
        await server.post("/wake_up", timeout=_WEIGHTS_TIMEOUT)

    # ------------------------------------------------------------------ weights

    async def load_weights(self, server: Server, weights: HostWeights, method: str) -> None:
        """See `Dialect.load_weights`.

        Open requests are paused; their key-value cache is computed again.
        """
        if method == "tensor":
            await _call(server, "rl2_load_file", str(weights.folder / "model.safetensors"))
        elif method == "disk":
            await _call(server, "rl2_load_folder", str(weights.folder))
        elif method == "distributed":
            await self._broadcast(server, weights)
        else:
            raise EngineError(
                f"rollout.weight_sync={method}: use one of {', '.join(self.weight_methods)}"
            )
        await self._drop_cache(server)
        await server.post("/update_weight_version", {"new_version": str(weights.version)})

    async def mismatch(self, server: Server, weights: HostWeights) -> str | None:
        """See `Dialect.mismatch`."""
        version = (await server.get("/weight_info"))["weight_version"]
        if version != str(weights.version):
            return f"the server has version {version}, but {weights.version} was published"
        published, workers = await asyncio.gather(
            asyncio.to_thread(weights.checksums), _call(server, "rl2_checksums")
        )
        held = [
            (tuple(names), count, int(value)) for parts in workers for names, count, value in parts
        ]
        return first_difference(held, published, {name: t.numel() for name, t in weights})

    async def _broadcast(self, server: Server, weights: HostWeights) -> None:
        """Send all weights through a process group with this server."""
        [device, *_] = await _call(server, "rl2_device")
        n_ranks = (await server.get("/get_world_size?include_dp=false"))["world_size"]
        plan = group_with(server.url, n_ranks, device) | {"timeout": _GROUP_TIMEOUT}
        tensors = [(name, str(t.dtype).removeprefix("torch."), [*t.shape]) for name, t in weights]
        received, sent = await asyncio.gather(
            _call(server, "rl2_receive", json.dumps(plan | {"tensors": tensors})),
            asyncio.to_thread(_send, plan, weights),
            return_exceptions=True,
        )
        for result in (received, sent):  # if both failed, the server knows the reason
            if isinstance(result, BaseException):
                raise result

    async def _drop_cache(self, server: Server) -> None:
        """Drop the key-value cache, also that of paused requests, which compute it again."""
        reply = await server.post("/reset_prefix_cache?reset_running_requests=true")
        if not reply["success"]:
            raise EngineError(f"{server.url}: the key-value cache could not be dropped")


def _send(plan: dict[str, Any], weights: HostWeights) -> None:
    group = WeightGroup(**plan)
    try:
        for _, tensor in weights:
            group.broadcast(tensor)
    finally:
        group.close()


async def _call(server: Server, method: str, *args: str) -> list[Any]:
    """Call a method of all workers; returns their results."""
    body = {"method": method, "args": list(args)}
    reply = await server.post("/collective_rpc", body, timeout=_WEIGHTS_TIMEOUT)
    return reply["results"]
