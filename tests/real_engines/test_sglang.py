"""What is SGLang's own, against a real server: its launcher, its weights, its faults.

    bash tests/run.sh tests/real_engines/test_sglang.py

This is SGLang on CPU with a stand-in for its kernels (`sglang_stand_in/`). It cannot show CUDA
kernels and graphs, nccl, tensor parallelism, several attention backends, or that memory is
released by `sleep`; on the CPU releasing and resuming are accepted and change nothing.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from RL2.engines.protocol import SamplingParams
from RL2.engines.servers.addresses import free_port
from RL2.engines.servers.http import Server, ServerRefused
from RL2.engines.servers.process import ServerOptions, ServerProcess
from RL2.engines.servers.sglang import SGLang
from RL2.engines.servers.weights import HostWeights
from RL2.runtime.errors import EngineError
from RL2.runtime.event_loop import EventLoopThread
from tests.real_engines.support import (
    CONTEXT,
    STAND_IN,
    TOLERANCE,
    TRAPS,
    engine_python,
    in_the_middle,
    make_engine_model,
    served_by,
    side_of_abort,
    side_of_update,
)
from tests.rollout.support import reference_logps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DIALECT = SGLang()
PROMPTS = [[40 + i, 50, 60 + 2 * i] for i in range(4)]


@dataclass
class Served:
    """A server of ours, and the two models that its weights come from."""

    process: ServerProcess
    server: Server
    loop: EventLoopThread
    models: list[torch.nn.Module]
    key: str
    version: int = 0

    def run(self, coroutine):
        return self.loop.run(coroutine)

    def load(self, which: int, weights: HostWeights, method: str = "tensor") -> None:
        self.version += 1
        weights.fill(self.models[which].named_parameters(), self.version)
        self.run(self.deliver(weights, method))

    async def deliver(self, weights: HostWeights, method: str) -> None:
        await DIALECT.pause(self.server)
        try:
            await DIALECT.load_weights(self.server, weights, method)
        finally:
            await DIALECT.resume(self.server)

    def mismatch(self, weights: HostWeights) -> str | None:
        return self.run(DIALECT.mismatch(self.server, weights))

    async def one(self, prompt, sampling, seed=0):
        path, body = DIALECT.request(prompt, sampling, seed, secrets.token_hex(8))
        reply = await self.server.post(path, body, timeout=120)
        return DIALECT.completion(reply, sampling, -1)

    def ask(self, prompts, sampling):
        async def all_of_them():
            return await asyncio.gather(*(self.one(p, sampling) for p in prompts))

        return self.run(all_of_them())

    def error(self, which, prompts, completions, temperature) -> float:
        """Largest distance of the served log-probabilities to those of a model."""
        worst = 0.0
        for prompt, completion in zip(prompts, completions, strict=True):
            ids, model = completion.token_ids, self.models[which]
            expected = reference_logps(model, prompt, ids, temperature)
            worst = max(worst, (torch.tensor(completion.logps) - expected).abs().max().item())
        return worst


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def served(request, tmp_path_factory):
    python = engine_python("sglang")
    root: Path = tmp_path_factory.mktemp("sglang")
    folders = [
        make_engine_model(root / f"model{seed}", tied=request.param, seed=seed, **TRAPS)
        for seed in (0, 1)
    ]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    key, port = secrets.token_hex(16), free_port()
    options = ServerOptions(folders[0], dtype="float32", python=python)
    path = DIALECT.environment(options, key)["PYTHONPATH"] + os.pathsep + str(STAND_IN)
    with served_by(
        DIALECT, options, root / "server.log", port, key, PYTHONPATH=path, OMP_NUM_THREADS="1"
    ) as (process, server, loop):
        yield Served(process, server, loop, models, key)


@pytest.fixture
def weights():
    weights = HostWeights(torch.float32)
    yield weights
    weights.close()


# ---------------------------------------------------------------------- the launcher


@pytest.mark.parametrize(
    "path",
    ["/generate", "/update_weights_from_disk", "/update_weights_from_tensor", "/abort_request",
     "/begin_weight_update", "/weights_checker", "/pause_generation", "/flush_cache",
     "/init_weights_update_group", "/release_memory_occupation", "/get_weights_by_name"],
)  # fmt: skip
def test_nothing_is_done_without_the_key(served, path):
    async def knock(headers):
        stranger = Server(served.server.url, headers)
        try:
            await stranger.post(path, {})
        finally:
            await stranger.close()

    for headers in ({}, DIALECT.headers("wrong")):
        with pytest.raises(ServerRefused) as refused:
            served.run(knock(headers))
        assert refused.value.status == 401


def test_the_key_is_not_in_the_log_and_not_in_any_command_line(served):
    assert served.key not in served.process.log.read_text(errors="replace")
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert served.key.encode() not in line.read_bytes()
        except OSError:
            continue


def test_nothing_listens_beyond_loopback(served):
    """Sockets of all processes below ours."""
    inodes, below = set(), {served.process.pid}
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    for pid in below:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(link))
            except OSError:
                continue
    addresses = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                addresses.append(fields[1].split(":")[0])
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert addresses and set(addresses) <= loopback


def test_the_whole_context_can_be_used(served):
    assert served.run(DIALECT.context_length(served.server)) == CONTEXT
    for length in (1, CONTEXT - 1, CONTEXT - 8):
        prompt = [50 + i % 90 for i in range(length)]
        most = CONTEXT - length
        (completion,) = served.ask([prompt], SamplingParams(temperature=1.0, max_new_tokens=most))
        # `completion` itself refuses one that was cut short.
        assert completion.finish_reason == "stop" or len(completion.token_ids) == most


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (0.7, 1.0), (0.7, 0.8), (1.0, 0.8)])
def test_logps_are_tempered_and_before_top_p(served, weights, temperature, top_p):
    served.load(0, weights)
    sampling = SamplingParams(temperature=temperature, max_new_tokens=40, top_p=top_p)
    completions = served.ask(PROMPTS, sampling)
    assert served.error(0, PROMPTS, completions, temperature) < TOLERANCE


def test_seeds_count_whatever_runs_beside_them(served):
    sampling = SamplingParams(temperature=1.0, max_new_tokens=20)

    async def samples(seeds):
        return await asyncio.gather(*(served.one([50, 51], sampling, seed) for seed in seeds))

    together = served.run(samples(range(12)))
    alone = [served.run(samples([seed]))[0] for seed in range(12)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert len({tuple(c.token_ids) for c in together}) == 12


def test_waking_twice_and_sleeping_over_open_requests(served):
    sampling = SamplingParams(temperature=1.0, max_new_tokens=300)

    async def night():
        asked = [asyncio.create_task(served.one(p, sampling)) for p in PROMPTS]
        await asyncio.sleep(0.3)
        await DIALECT.sleep(served.server)
        for _ in range(2):
            await DIALECT.wake(served.server)
        return await asyncio.gather(*asked)

    assert all(c.finish_reason in ("stop", "length") for c in served.run(night()))


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("method", DIALECT.weight_methods)
def test_weights_arrive(served, weights, method):
    sampling = SamplingParams(temperature=0.7, max_new_tokens=30)
    for which in (1, 0):
        served.load(1 - which, weights, "disk")
        before = served.version
        weights.fill(served.models[which].named_parameters(), before)
        assert served.mismatch(weights).endswith(" differs")
        served.load(which, weights, method)
        assert served.mismatch(weights) is None
        completions = served.ask(PROMPTS, sampling)
        assert served.error(which, PROMPTS, completions, 0.7) < TOLERANCE
        assert served.error(1 - which, PROMPTS, completions, 0.7) > 0.1
        assert {v for c in completions for v in c.weight_versions} == {before + 1}


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight",
     "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"],
)  # fmt: skip
def test_one_value_that_differs_is_named(served, weights, name):
    served.load(0, weights)
    assert served.mismatch(weights) is None
    values = dict(weights)[name].view(-1)
    values[-7] = torch.nextafter(values[-7], torch.tensor(9.0))  # the last bit of one value
    weights._checksums = None
    assert served.mismatch(weights) == f"{name} differs"


def test_a_tensor_that_the_server_passes_over_is_named(served, weights):
    """SGLang warns in its log of a name that it does not know, and goes on."""
    served.load(0, weights)
    odd = HostWeights(torch.float32)
    try:
        odd.fill([(n.replace("mlp.up_proj", "mlp.upper"), t) for n, t in weights], weights.version)
        served.run(served.deliver(odd, "tensor"))
        unknown = "model.layers.0.mlp.up_proj.weight is in the server and was not published"
        assert served.mismatch(odd) == unknown
    finally:
        odd.close()


def test_a_version_that_differs_is_told(served, weights):
    served.load(0, weights)
    weights.version += 1
    assert f"version {served.version}" in served.mismatch(weights)


@pytest.mark.parametrize("method", ["tensor", "distributed"])
def test_a_failed_update_is_an_error_and_the_next_one_works(served, weights, method):
    served.load(0, weights)
    odd = HostWeights(torch.float32)
    try:
        odd.fill([(n, t.T.contiguous() if "up_proj" in n else t) for n, t in weights], 99)
        with pytest.raises(EngineError, match="HTTP 400"):
            served.run(served.deliver(odd, method))
    finally:
        odd.close()
    assert served.process.status is None
    served.load(1, weights, method)
    assert served.mismatch(weights) is None


def test_an_update_in_the_middle_of_responses(served, weights):
    """What is written before and after is each model's own, the context seen anew."""
    sampling = SamplingParams(temperature=1.0, max_new_tokens=400)

    async def responses(delay):
        asked = [asyncio.create_task(served.one([50 + i, 60], sampling, i)) for i in range(32)]
        await asyncio.sleep(delay)
        await DIALECT.pause(served.server)
        weights.fill(served.models[1].named_parameters(), served.version + 1)
        await DIALECT.load_weights(served.server, weights, "tensor")
        await DIALECT.resume(served.server)
        return await asyncio.gather(*asked)

    def attempt(delay):
        served.load(0, weights)
        before = served.version
        completions = served.run(responses(delay))
        served.version = before + 1
        for i, completion in enumerate(completions):
            split = completion.weight_versions.count(before)
            assert completion.weight_versions == sorted(completion.weight_versions)
            logps = torch.tensor(completion.logps)
            for which, part in ((0, slice(0, split)), (1, slice(split, None))):
                expected = reference_logps(
                    served.models[which], [50 + i, 60], completion.token_ids, 1.0
                )
                if len(expected[part]):
                    assert (logps[part] - expected[part]).abs().max() < TOLERANCE
        return side_of_update((c.weight_versions for c in completions), before)

    in_the_middle(attempt)


# ---------------------------------------------------------------------- requests


def test_an_abort_returns_what_was_written(served, weights):
    served.load(0, weights)
    sampling = SamplingParams(temperature=1.0, max_new_tokens=500)

    async def aborted(delay):
        asked = [asyncio.create_task(served.one([50 + i, 60], sampling, i)) for i in range(32)]
        await asyncio.sleep(delay)
        await DIALECT.abort(served.server)
        done, late = await asyncio.wait(asked, timeout=10)
        assert not late
        return [task.result() for task in done]

    def attempt(delay):
        completions = served.run(aborted(delay))
        assert all(len(c.logps) == len(c.token_ids) for c in completions)
        return side_of_abort(completions)

    in_the_middle(attempt)


def test_a_pause_holds_requests_and_an_abort_ends_them_meanwhile(served):
    sampling = SamplingParams(temperature=1.0, max_new_tokens=500)

    async def paused(delay):
        asked = [asyncio.create_task(served.one([50 + i, 60], sampling, i)) for i in range(16)]
        await asyncio.sleep(delay)
        await DIALECT.pause(served.server)
        await asyncio.sleep(1.0)  # answers that were on their way
        held = {task for task in asked if not task.done()}
        await asyncio.sleep(1.0)
        still_held = not any(task.done() for task in held)
        await DIALECT.abort(served.server)
        if held:
            await asyncio.wait(held, timeout=10)
        ended = all(task.done() for task in held)
        await DIALECT.resume(served.server)
        return held, still_held, ended

    def attempt(delay):
        held, still_held, ended = served.run(paused(delay))
        assert still_held and ended
        return 0 if held else 1

    in_the_middle(attempt)
