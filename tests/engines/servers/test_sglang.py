"""SGLang's dialect without a server: requests, replies, checksums. With one: tests/real_engines."""

import asyncio
import math
import sys

import pytest
import torch

from RL2.engines.protocol import MalformedReply, SamplingParams
from RL2.engines.servers.http import ServerRefused
from RL2.engines.servers.process import SERVER_SIDE, ServerOptions
from RL2.engines.servers.sglang import KEY_VARIABLE, SGLang, difference
from RL2.engines.servers.weights import HostWeights, checksum
from RL2.runtime.errors import EngineError

DIALECT = SGLang()
SAMPLING = SamplingParams(
    temperature=0.7, max_new_tokens=3, stop=("\n",), top_p=0.9, stop_token_ids=(4, 1)
)


def reply(**changes):
    """A good answer of two tokens, as SGLang 0.5.23 writes it."""
    meta = {
        "id": "r",
        "finish_reason": {"type": "stop", "matched": 1},
        "prompt_tokens": 2,
        "weight_version": "4",
        "output_token_logprobs": [[-0.5, 11, None], [-1.25, 1, None]],
        "completion_tokens": 2,
        "weight_versions": [{"version": "4", "start": 0, "end": 2}],
    }
    meta |= {name: value for name, value in changes.items() if name != "output_ids"}
    return {"text": "x", "output_ids": changes.get("output_ids", [11, 1]), "meta_info": meta}


def read(answer, version=9):
    return DIALECT.completion(answer, SAMPLING, version)


# ---------------------------------------------------------------------- command and requests


def test_the_key_is_in_the_environment_and_not_in_the_command():
    options = ServerOptions("a/model", dtype="float32", context_length=64, extra_args=("--x", "1"))
    command = DIALECT.command(options, 1234)
    variables = DIALECT.environment(options, "secret")
    assert variables[KEY_VARIABLE] == "secret"
    assert not any("secret" in word for word in command)
    assert "secret" in DIALECT.headers("secret")["Authorization"]
    text = " ".join(command)
    assert text.startswith(f"{sys.executable} -m rl2_sglang --model-path a/model --dtype float32")
    assert "--host 127.0.0.1 --port 1234" in text and "--context-length 64" in text
    assert command[-2:] == ["--x", "1"]
    assert variables["PYTHONPATH"].split(":")[0] == str(SERVER_SIDE)
    assert (SERVER_SIDE / "rl2_sglang.py").exists()


def test_a_path_of_python_is_kept(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/one:/two")
    variables = DIALECT.environment(ServerOptions("m"), "k")
    assert variables["PYTHONPATH"] == f"{SERVER_SIDE}:/one:/two"


def test_options_of_gpus():
    options = ServerOptions(
        "m", device="cuda", gpus=(2, 3), tp_size=2, sleep=True, gpu_memory_utilization=0.5
    )
    text = " ".join(DIALECT.command(options, 1))
    assert "--tp-size 2" in text and "--mem-fraction-static 0.5" in text
    assert "--enable-memory-saver" in text and "--max-total-tokens" not in text
    variables = DIALECT.environment(options, "k")
    assert variables["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "SGLANG_USE_CPU_ENGINE" not in variables
    assert "--enable-memory-saver" not in DIALECT.command(ServerOptions("m"), 1)


def test_a_request():
    path, body = DIALECT.request([5, 6], SAMPLING, 7, "name")
    assert path == "/generate"
    assert body["input_ids"] == [5, 6] and body["rid"] == "name" and body["return_logprob"] is True
    sent = body["sampling_params"]
    assert (sent["temperature"], sent["top_p"], sent["max_new_tokens"]) == (0.7, 0.9, 3)
    assert (sent["stop"], sent["no_stop_trim"], sent["sampling_seed"]) == (["\n"], True, 7)
    assert sent["stop_token_ids"] == [4, 1]
    # What a checkpoint's own settings could bring.
    assert (sent["top_k"], sent["min_p"], sent["repetition_penalty"]) == (-1, 0.0, 1.0)


@pytest.mark.parametrize(
    "seed, sent", [(2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1), (-3, -3)]
)
def test_seeds_of_64_bits_fit(seed, sent):
    assert DIALECT.request([1], SAMPLING, seed, "r")[1]["sampling_params"]["sampling_seed"] == sent


# ---------------------------------------------------------------------- replies


def test_a_completion():
    completion = read(reply())
    assert completion.token_ids == [11, 1]
    assert completion.logps == [-0.5, -1.25]
    assert completion.finish_reason == "stop"
    assert completion.weight_versions == [4, 4]


def test_versions_of_an_update_in_the_middle():
    spans = [{"version": "4", "start": 0, "end": 1}, {"version": "5", "start": 1, "end": 2}]
    assert read(reply(weight_versions=spans)).weight_versions == [4, 5]


def test_a_server_without_a_version_of_its_own():
    assert read(reply(weight_versions=[], weight_version="default")).weight_versions == [9, 9]


def test_an_abort_keeps_what_was_written():
    completion = read(reply(finish_reason={"type": "abort", "message": "Aborted"}))
    assert completion.finish_reason == "abort" and completion.token_ids == [11, 1]
    nothing = reply(
        finish_reason={"type": "abort", "message": "x", "status_code": None},
        output_ids=[], output_token_logprobs=[], weight_versions=[],
    )  # fmt: skip
    assert read(nothing).token_ids == [] and read(nothing).weight_versions == []
    # Where it was running already, its first token not yet written.
    nothing["meta_info"]["weight_versions"] = [{"version": "4", "start": 0, "end": 0}]
    assert read(nothing).token_ids == [] and read(nothing).weight_versions == []


def test_rounding_above_zero_is_zero():
    assert read(reply(output_token_logprobs=[[1e-7, 11], [-0.0, 1]])).logps == [0.0, 0.0]


def test_length_means_all_tokens():
    three = {
        "output_ids": [11, 12, 13],
        "output_token_logprobs": [[-1.0, 11, None], [-1.0, 12, None], [-1.0, 13, None]],
        "weight_versions": [{"version": "4", "start": 0, "end": 3}],
        "finish_reason": {"type": "length", "length": 3},
    }
    assert read(reply(**three)).finish_reason == "length"


BAD = {
    "nothing": None,
    "text": "oops",
    "list": [reply()],
    "no meta": {"output_ids": [1]},
    "no tokens field": {"meta_info": reply()["meta_info"]},
    "tokens null": reply(output_ids=None),
    "token negative": reply(output_ids=[11, -1], output_token_logprobs=[[-1.0, 11], [-1.0, -1]]),
    "token float": reply(output_ids=[11, 1.0]),
    "token bool": reply(output_ids=[11, True]),
    "token text": reply(output_ids=[11, "1"]),
    "empty": reply(output_ids=[], output_token_logprobs=[], weight_versions=[]),
    "one log-probability short": reply(output_token_logprobs=[[-0.5, 11, None]]),
    "one too many": reply(output_token_logprobs=[[-0.5, 11], [-1.0, 1], [-1.0, 1]]),
    "no log-probabilities": reply(output_token_logprobs=None),
    "log-probabilities a mapping": reply(output_token_logprobs={"a": 1, "b": 2}),
    "of another token": reply(output_token_logprobs=[[-0.5, 11, None], [-1.0, 2, None]]),
    "bare numbers": reply(output_token_logprobs=[-0.5, -1.0]),
    "null": reply(output_token_logprobs=[[None, 11, None], [-1.0, 1, None]]),
    "nan": reply(output_token_logprobs=[[math.nan, 11, None], [-1.0, 1, None]]),
    "-inf": reply(output_token_logprobs=[[-math.inf, 11, None], [-1.0, 1, None]]),
    "positive": reply(output_token_logprobs=[[0.5, 11, None], [-1.0, 1, None]]),
    "text for a number": reply(output_token_logprobs=[["-0.5", 11, None], [-1.0, 1, None]]),
    "no finish reason": reply(finish_reason=None),
    "finish reason a text": reply(finish_reason="stop"),
    "unknown finish reason": reply(finish_reason={"type": "tired"}),
    "short for length": reply(finish_reason={"type": "length", "length": 2}),
    "aborted by an error": reply(finish_reason={"type": "abort", "status_code": 500}),
    "version a name": reply(weight_versions=[{"version": "x", "start": 0, "end": 2}]),
    "versions with a gap": reply(weight_versions=[{"version": "4", "start": 1, "end": 2}]),
    "versions too short": reply(weight_versions=[{"version": "4", "start": 0, "end": 1}]),
    "versions too long": reply(weight_versions=[{"version": "4", "start": 0, "end": 3}]),
    "versions a number": reply(weight_versions=4),
    "version missing": reply(weight_versions=[], weight_version=None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_sense_is_malformed(name):
    with pytest.raises(MalformedReply, match="sglang: "):
        read(BAD[name])


# ---------------------------------------------------------------------- checksums


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (6, 4),
        "model.layers.0.self_attn.q_proj.weight": (8, 4),
        "model.layers.0.self_attn.k_proj.weight": (4, 4),
        "model.layers.0.self_attn.v_proj.weight": (4, 4),
        "model.layers.0.mlp.gate_proj.weight": (6, 4),
        "model.layers.0.mlp.up_proj.weight": (6, 4),
        "model.norm.weight": (4,),
    }
    weights = HostWeights(torch.float32, folder=tmp_path / "weights")
    weights.fill([(name, torch.randn(shape)) for name, shape in shapes.items()], 3)
    return weights


def line(*tensors, dtype=torch.float32):
    total = sum(checksum(tensor.to(dtype)) for tensor in tensors) % 2**64
    return f"{total} {sum(t.numel() for t in tensors)} {str(dtype).removeprefix('torch.')}"


def held(weights, dtype=torch.float32):
    """What one rank of a server says that holds everything."""
    ours = dict(weights)
    layer = "model.layers.0."
    pieces = {
        f"{layer}self_attn.qkv_proj.weight#0": "self_attn.q_proj",
        f"{layer}self_attn.qkv_proj.weight#1": "self_attn.k_proj",
        f"{layer}self_attn.qkv_proj.weight#2": "self_attn.v_proj",
        f"{layer}mlp.gate_up_proj.weight#0": "mlp.gate_proj",
        f"{layer}mlp.gate_up_proj.weight#1": "mlp.up_proj",
    }
    told = {name: line(ours[f"{layer}{part}.weight"], dtype=dtype) for name, part in pieces.items()}
    # The embedding is padded to 8 rows.
    padded = torch.cat([ours["model.embed_tokens.weight"], torch.zeros(2, 4)])
    told["model.embed_tokens.weight"] = line(padded, dtype=dtype)
    told["model.norm.weight"] = line(ours["model.norm.weight"], dtype=dtype)
    return told


def test_a_server_that_holds_everything(weights):
    assert difference([held(weights)], weights) is None
    assert difference([held(weights, torch.bfloat16)], weights) is None  # cast on arrival


def test_a_head_of_its_own_that_is_tied(weights):
    told = held(weights)
    told["lm_head.weight"] = told["model.embed_tokens.weight"]
    assert difference([told], weights) is None


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "embed_tokens", "norm"]
)
def test_one_other_value_is_named(weights, name):
    told = held(weights)
    full = next(n for n in dict(weights) if f"{name}." in n)
    dict(weights)[full].view(-1)[0] += 1e-6
    weights._checksums = None
    assert difference([told], weights) == f"{full} differs"


def test_shards_and_replicas_of_two_ranks(weights):
    """Rows of q and the embedding are divided; k, v and the norm are on both ranks."""
    ours = dict(weights)
    whole = held(weights)
    ranks = []
    for half in (0, 1):
        told = dict(whole)
        q = ours["model.layers.0.self_attn.q_proj.weight"].chunk(2)[half]
        told["model.layers.0.self_attn.qkv_proj.weight#0"] = line(q)
        table = torch.cat([ours["model.embed_tokens.weight"], torch.zeros(2, 4)]).chunk(2)[half]
        told["model.embed_tokens.weight"] = line(table)
        ranks.append(told)
    assert difference(ranks, weights) is None
    ranks[1]["model.norm.weight"] = line(ours["model.norm.weight"] + 1)
    assert difference(ranks, weights) == "model.norm.weight differs"


def test_what_is_missing_and_what_is_too_much(weights):
    told = held(weights)
    del told["model.norm.weight"]
    missing = "model.norm.weight was published and is not in the server"
    assert difference([told], weights) == missing
    told = held(weights) | {"model.scale": "1 1 float32"}
    assert "model.scale is in the server and was not published" == difference([told], weights)
    told = held(weights) | {"model.norm.weight": "5 2 float32"}
    few = "model.norm.weight has 2 elements in the server, and 4 were published"
    assert difference([told], weights) == few


@pytest.mark.parametrize("odd", ["", "1 2", "x 4 float32", "1 4 float33"])
def test_odd_checksums_are_malformed(weights, odd):
    with pytest.raises(MalformedReply, match="model.norm.weight"):
        difference([held(weights) | {"model.norm.weight": odd}], weights)


class Refuses:
    url = "http://127.0.0.1:1"

    async def post(self, path, body=None, *, timeout=60.0):
        raise ServerRefused("HTTP 400", 400, "Unsupported action")


def test_a_server_that_was_started_otherwise_is_told_how(weights):
    with pytest.raises(EngineError, match="python -m rl2_sglang"):
        asyncio.run(DIALECT.mismatch(Refuses(), weights))
