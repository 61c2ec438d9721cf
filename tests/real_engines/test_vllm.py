"""What is vLLM's own, against a real server: its guard, its weights, what it does to requests.

    bash tests/run.sh tests/real_engines/test_vllm.py

It runs on the CPU. Nothing here shows CUDA kernels, NCCL, or that memory is released by `sleep`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from RL2.engines.protocol import SamplingParams
from RL2.engines.servers.addresses import free_port
from RL2.engines.servers.http import Server, ServerRefused
from RL2.engines.servers.process import ServerOptions, ServerProcess
from RL2.engines.servers.vllm import VLLM
from RL2.engines.servers.weights import HostWeights
from RL2.runtime.event_loop import EventLoopThread
from tests.real_engines.support import (
    CONTEXT,
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

DIALECT = VLLM()


@dataclass
class Served:
    """A server of ours and the two models that its weights come from."""

    process: ServerProcess
    server: Server
    loop: EventLoopThread
    models: list[torch.nn.Module]
    folder: str
    key: str
    tied: bool
    version: int = 0

    def run(self, coroutine):
        return self.loop.run(coroutine)

    def load(self, which: int, weights: HostWeights, method: str = "tensor") -> None:
        """Fill `weights` from a model and bring them into the server, as the engine does."""
        self.version += 1
        weights.fill(self.models[which].named_parameters(), self.version)

        async def deliver():
            await DIALECT.pause(self.server)
            await DIALECT.load_weights(self.server, weights, method)
            await DIALECT.resume(self.server)

        self.run(deliver())

    def mismatch(self, weights: HostWeights) -> str | None:
        return self.run(DIALECT.mismatch(self.server, weights))

    def ask(self, prompts, sampling):
        return self.run(self.ask_together(prompts, sampling))

    async def ask_together(self, prompts, sampling):
        return await asyncio.gather(*(self.one(p, sampling, i) for i, p in enumerate(prompts)))

    async def one(self, prompt, sampling, seed):
        path, body = DIALECT.request(prompt, sampling, seed, secrets.token_hex(8))
        return DIALECT.completion(await self.server.post(path, body), sampling, self.version)


def error(completion, model, prompt, sampling, part=slice(None)):
    """Largest difference of log-probabilities, in nats, to those of a forward pass."""
    expected = reference_logps(model, prompt, completion.token_ids, sampling.temperature)
    return (torch.tensor(completion.logps) - expected)[part].abs().max().item()


@pytest.fixture(scope="module", params=["llama-tied", "qwen3-untied"])
def served(request, tmp_path_factory):
    family, tied = request.param.split("-")
    root = tmp_path_factory.mktemp(request.param)
    folders = [
        make_engine_model(root / f"{seed}", family=family, tied=tied == "tied", seed=seed)
        for seed in (0, 1)
    ]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    # Where transformers itself does not read it.
    models[0].generation_config.update(**TRAPS)
    models[0].generation_config.save_pretrained(folders[0])
    options = ServerOptions(
        model_name=folders[0], dtype="float32", context_length=CONTEXT, max_in_flight=64,
        python=engine_python("vllm"),
    )  # fmt: skip
    key, port = secrets.token_hex(16), free_port()
    with served_by(DIALECT, options, root / "vllm.log", port, key) as (process, server, loop):
        yield Served(process, server, loop, models, folders[0], key, tied == "tied")


@pytest.fixture
def weights(served, tmp_path):
    """An empty copy of the weights. Afterwards the server has its first ones back."""
    weights = HostWeights(
        config=served.models[0].config,
        tokenizer=AutoTokenizer.from_pretrained(served.folder),
        folder=tmp_path / "weights",
    )
    yield weights
    served.load(0, weights)
    weights.close()


PROMPTS = [list(range(70 + i, 90 + i)) for i in range(8)]
# Long enough for vLLM to keep its key-value cache for the next request that begins like it.
CACHED = [3 + i % 200 for i in range(400)]


# ------------------------------------------------------------------------ the guard


def test_every_route_but_the_health_check_wants_the_key(served):
    paths = served.run(served.server.get("/openapi.json"))["paths"]
    assert {"/collective_rpc", "/inference/v1/generate", "/pause", "/health"} <= set(paths)

    async def status(path, method):
        bare = Server(served.server.url)
        try:
            await (bare.get(path) if method == "get" else bare.post(path, {}))
        except ServerRefused as refused:
            return refused.status
        finally:
            await bare.close()
        return 200

    answers = {
        (path, method): served.run(status(path, method))
        for path, methods in paths.items()
        for method in methods
    }
    assert answers.pop(("/health", "get")) == 200
    assert len(answers) > 20 and set(answers.values()) == {401}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_listens_on_another_address_and_nobody_reads_the_key(served):
    tree = process_tree(served.process.pid)
    assert len(tree) >= 3  # the guard, the server, its engine
    inodes = {inode for pid in tree for inode in socket_inodes(pid)}
    addresses = [
        address
        for table in ("tcp", "tcp6")
        for address, inode in listening(Path("/proc/net", table))
        if inode in inodes
    ]
    assert addresses
    # 127.0.0.1 and ::1 as /proc/net writes them.
    assert set(addresses) <= {"0100007F", "00000000000000000000000001000000"}
    for pid in tree:
        assert served.key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


def process_tree(root: int) -> list[int]:
    found = [root]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def socket_inodes(pid: int) -> set[str]:
    links = (os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def listening(table: Path) -> list[tuple[str, str]]:
    """(address, inode) of the listening sockets in a table of /proc/net."""
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    return [(row[1].split(":")[0], row[9]) for row in rows if row[3] == "0A"]


# ------------------------------------------------------------------------ requests


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_nothing_of_the_generation_config_slips_in(served, top_p):
    """Top-k 1 would make all samples equal, a penalty would change log-probabilities."""
    sampling = SamplingParams(temperature=1.0, max_new_tokens=24, top_p=top_p)
    completions = served.ask([PROMPTS[0]] * 8, sampling)
    assert len({tuple(c.token_ids) for c in completions}) == 8
    for completion in completions:
        assert error(completion, served.models[0], PROMPTS[0], sampling) < TOLERANCE


def test_more_prompt_tokens_than_fit_into_one_step(served):
    """A prompt that is cut in two while its request has a seed ends vLLM's engine on the CPU."""
    sampling = SamplingParams(temperature=1.0, max_new_tokens=2)
    prompts = [[3 + (i + j) % 200 for j in range(CONTEXT - 2)] for i in range(48)]
    completions = served.ask(prompts, sampling)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert error(completion, served.models[0], prompt, sampling) < TOLERANCE


def test_an_abort_reaches_requests_of_a_paused_server(served):
    sampling = SamplingParams(temperature=1.0, max_new_tokens=400)

    async def play(delay):
        open_ones = [asyncio.create_task(served.one(p, sampling, i)) for i, p in enumerate(PROMPTS)]
        await asyncio.sleep(delay)
        await DIALECT.pause(served.server)
        late = asyncio.create_task(served.one(PROMPTS[0], sampling, 99))
        await asyncio.sleep(0.2)
        assert not late.done()
        await DIALECT.abort(served.server)
        completions = await asyncio.wait_for(asyncio.gather(*open_ones, late), 30)
        await DIALECT.resume(served.server)
        return completions

    def attempt(delay):
        *written, never_started = served.run(play(delay))
        assert never_started.finish_reason == "abort" and never_started.token_ids == []
        for prompt, completion in zip(PROMPTS, written, strict=True):
            if completion.token_ids:
                assert error(completion, served.models[0], prompt, sampling) < TOLERANCE
        return side_of_abort(written)

    in_the_middle(attempt)


# ------------------------------------------------------------------------ weights


@pytest.mark.parametrize("method", DIALECT.weight_methods)
def test_weights_arrive(served, weights, method):
    """More than once: a reload starts from what the one before left."""
    sampling = SamplingParams(temperature=1.0, max_new_tokens=24)
    for which in (1, 0, 1):
        served.load(which, weights, method)
        assert served.mismatch(weights) is None
        prompts = [*PROMPTS, CACHED]
        for prompt, completion in zip(prompts, served.ask(prompts, sampling), strict=True):
            assert set(completion.weight_versions) == {served.version}
            assert error(completion, served.models[which], prompt, sampling) < TOLERANCE
            assert error(completion, served.models[1 - which], prompt, sampling) > 1.0


def test_requests_that_were_paused_go_on_with_the_new_weights(served, weights):
    """Their key-value cache too: the new tokens are as likely as a forward pass says."""
    sampling = SamplingParams(temperature=1.0, max_new_tokens=400)
    prompts = PROMPTS * 4

    async def play(delay):
        open_ones = asyncio.ensure_future(served.ask_together(prompts, sampling))
        await asyncio.sleep(delay)
        served.version += 1
        weights.fill(served.models[1].named_parameters(), served.version)
        await DIALECT.pause(served.server)
        await DIALECT.load_weights(served.server, weights, "tensor")
        await DIALECT.resume(served.server)
        return await open_ones

    def attempt(delay):
        served.load(0, weights)
        before = served.version
        completions = served.run(play(delay))
        for prompt, completion in zip(prompts, completions, strict=True):
            versions = completion.weight_versions
            assert versions == sorted(versions) and set(versions) <= {before, served.version}
            split = versions.count(before)
            for which, part in ((0, slice(0, split)), (1, slice(split, None))):
                if versions[part]:
                    model = served.models[which]
                    assert error(completion, model, prompt, sampling, part) < TOLERANCE
        return side_of_update((c.weight_versions for c in completions), before)

    in_the_middle(attempt)


CORRUPTED = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.v_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def test_a_value_that_differs_is_named(served, weights):
    served.load(1, weights)
    tensors = dict(weights)
    names = [name for name in CORRUPTED if name in tensors]
    assert ("lm_head.weight" in names) is not served.tied
    for name in names:
        value = tensors[name].view(-1)[3]
        right = value.clone()
        value += 1e-3
        # Filled with itself: the checksums are those of what the tensors hold now.
        weights.fill([(n, t.clone()) for n, t in weights], served.version)
        assert served.mismatch(weights) == f"{name} differs"
        value.copy_(right)
    weights.fill([(n, t.clone()) for n, t in weights], served.version)
    assert served.mismatch(weights) is None


def test_a_version_that_differs_is_told(served, weights):
    served.load(0, weights)
    weights.fill([(n, t.clone()) for n, t in weights], served.version + 1)
    expected = f"the server has version {served.version}, but {served.version + 1} was published"
    assert served.mismatch(weights) == expected
