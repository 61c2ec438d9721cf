"""What vLLM servers are asked and how their answers are read; real servers: tests/real_engines."""

import asyncio
import copy
import importlib.util
import sys
from pathlib import Path

import pytest

from RL2.engines.protocol import MalformedReply, SamplingParams
from RL2.engines.servers.process import ServerOptions
from RL2.engines.servers.vllm import VLLM
from RL2.runtime.errors import ConfigError

DIALECT = VLLM()
KEY = "a key that nobody may read"


def options(**changes):
    return ServerOptions(**({"model_name": "some/model", "python": "python-of-vllm"} | changes))


def pairs(command):
    """Flags of a command line with the argument that follows each."""
    return {a: b for a, b in zip(command, [*command[1:], ""], strict=True) if a.startswith("--")}


# ------------------------------------------------------------------------ start


def test_the_command_binds_to_loopback_and_holds_no_secret():
    command = DIALECT.command(options(), 31000)
    flags = pairs(command)
    assert command[0] == "python-of-vllm"
    assert (flags["--host"], flags["--port"]) == ("127.0.0.1", "31000")
    assert not any(KEY in part for part in command)
    assert DIALECT.environment(options(), KEY)["VLLM_API_KEY"] == KEY


@pytest.mark.parametrize(
    ("changes", "flag", "value"),
    [
        ({"model_name": "some/model"}, "--model", "some/model"),
        ({"dtype": "bfloat16"}, "--dtype", "bfloat16"),
        ({"tp_size": 2}, "--tensor-parallel-size", "2"),
        ({"context_length": 77}, "--max-model-len", "77"),
        ({"gpu_memory_utilization": 0.4}, "--gpu-memory-utilization", "0.4"),
        ({"max_in_flight": 8}, "--max-num-seqs", "8"),
        ({"max_in_flight": 10**6}, "--max-num-seqs", "256"),
        ({"max_in_flight": 10**6, "device": "cuda"}, "--max-num-seqs", "1024"),
        ({"seed": 5}, "--seed", "5"),
    ],
)
def test_options_reach_the_command(changes, flag, value):
    assert pairs(DIALECT.command(options(**changes), 1))[flag] == value


def test_flags_that_depend():
    cpu = DIALECT.command(options(), 1)
    cuda = DIALECT.command(options(device="cuda", sleep=True, trust_remote_code=True), 1)
    for flag in ("--enforce-eager", "--kv-cache-memory-bytes", "--no-enable-chunked-prefill"):
        assert flag in cpu and flag not in cuda
    for flag in ("--enable-sleep-mode", "--trust-remote-code"):
        assert flag in cuda and flag not in cpu
    # The process that is saved can drive one worker only.
    assert "--distributed-executor-backend" in cpu
    assert "--distributed-executor-backend" not in DIALECT.command(options(tp_size=2), 1)
    # The user's own come last, where the parser lets them win.
    assert DIALECT.command(options(extra_args=("--seed", "9")), 1)[-2:] == ["--seed", "9"]


def test_the_environment_of_a_server(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "/own")
    variables = DIALECT.environment(options(model_name=str(tmp_path)), KEY)
    server_side, own = variables["PYTHONPATH"].split(":")
    assert own == "/own"
    assert {"rl2_vllm.py", "rl2_vllm_http.py"} <= {p.name for p in Path(server_side).iterdir()}
    assert variables["HF_HUB_OFFLINE"] == "1"  # a folder needs no hub
    assert "HF_HUB_OFFLINE" not in DIALECT.environment(options(), KEY)
    on_gpus = DIALECT.environment(options(device="cuda", gpus=(2, 3)), KEY)
    assert on_gpus["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "CUDA_VISIBLE_DEVICES" not in variables
    for told in (variables, on_gpus):
        assert told["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_the_key_travels_in_a_header():
    assert DIALECT.headers(KEY) == {"Authorization": f"Bearer {KEY}"}
    assert DIALECT.headers("") == {}


# ------------------------------------------------------------------------ the guard in the server


def guarded(monkeypatch, key=KEY):
    """`RequireKey` around an application that says "in"."""
    path = Path(sys.modules[VLLM.__module__].__file__).parents[1] / "server_side"
    spec = importlib.util.spec_from_file_location("rl2_vllm_http", path / "rl2_vllm_http.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("VLLM_API_KEY", key)

    async def application(scope, receive, send):
        await send({"type": "in"})

    return module.RequireKey(application)


def sent_by(app, scope):
    messages = []

    async def send(message):
        messages.append(message)

    asyncio.run(app(scope, None, send))
    return messages


@pytest.mark.parametrize(
    ("path", "header", "answer"),
    [
        ("/collective_rpc", f"Bearer {KEY}", "in"),
        ("/health", None, "in"),
        ("/collective_rpc", None, 401),
        ("/collective_rpc", KEY, 401),
        ("/collective_rpc", f"Bearer {KEY[:-1]}", 401),
        ("/health/../collective_rpc", None, 401),
        ("/v1/models", None, 401),
    ],
)
def test_no_request_passes_without_the_key(monkeypatch, path, header, answer):
    headers = [] if header is None else [(b"authorization", header.encode())]
    scope = {"type": "http", "path": path, "headers": headers}
    first, *rest = sent_by(guarded(monkeypatch), scope)
    assert (first["type"] if answer == "in" else first["status"]) == answer
    if answer == 401:
        length = dict(first["headers"])[b"content-length"]
        assert int(length) == len(rest[0]["body"])


def test_websockets_are_refused_and_start_up_passes(monkeypatch):
    app = guarded(monkeypatch)
    assert sent_by(app, {"type": "websocket", "path": "/v1/realtime", "headers": []}) == [
        {"type": "websocket.close", "code": 1008}
    ]
    assert sent_by(app, {"type": "lifespan"}) == [{"type": "in"}]


def test_a_server_without_a_key_does_not_start(monkeypatch):
    with pytest.raises(RuntimeError, match="VLLM_API_KEY is not set"):
        guarded(monkeypatch, key="")


# ------------------------------------------------------------------------ requests


def test_a_request_says_all_that_decides_the_tokens():
    sampling = SamplingParams(temperature=0.7, max_new_tokens=9, top_p=0.8)
    path, body = DIALECT.request([5, 6], sampling, 2**63 + 4, "name")
    assert path == "/inference/v1/generate"
    params = body.pop("sampling_params")
    assert body == {"request_id": "name", "token_ids": [5, 6]}
    wanted = {
        "temperature": 0.7, "top_p": 0.8, "top_k": 0, "min_p": 0.0, "seed": 4, "max_tokens": 9,
        "logprobs": 0, "stop": [], "detokenize": False,
    }  # fmt: skip
    assert wanted.items() <= params.items()


def test_stop_strings_are_looked_for_in_all_of_the_text():
    sampling = SamplingParams(temperature=1.0, max_new_tokens=9, stop=("</think>", "\n"))
    params = DIALECT.request([5], sampling, 0, "name")[1]["sampling_params"]
    assert params["stop"] == ["</think>", "\n"]
    assert params["detokenize"] and not params["skip_special_tokens"]


def test_end_tokens_are_sent():
    sampling = SamplingParams(temperature=1.0, max_new_tokens=9, stop_token_ids=(4, 1))
    params = DIALECT.request([5], sampling, 0, "name")[1]["sampling_params"]
    assert params["stop_token_ids"] == [4, 1]


def test_a_temperature_that_vllm_would_change_is_refused():
    with pytest.raises(ConfigError, match=r"temperature=0.005: vLLM raises it to 0.01"):
        DIALECT.request([5], SamplingParams(temperature=0.005, max_new_tokens=1), 0, "name")
    DIALECT.request([5], SamplingParams(temperature=0.0, max_new_tokens=1), 0, "name")


# ------------------------------------------------------------------------ replies

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=8)


def reply(**changes):
    tokens = changes.pop("token_ids", [7, 8, 9])
    logps = changes.pop("logps", [-0.5 - i for i in range(len(tokens))])
    content = [{"token_id": t, "logprob": p} for t, p in zip(tokens, logps, strict=True)]
    choice = {
        "index": 0, "finish_reason": "stop", "stop_reason": None, "token_ids": tokens,
        "logprobs": {"content": content},
        "weight_versions": [{"version": "default", "start": 0, "end": len(tokens)}],
    }  # fmt: skip
    return {"request_id": "x", "choices": [choice | changes]}


def spans(*ends):
    starts = [0, *(end for _, end in ends)]
    return [
        {"version": version, "start": start, "end": end}
        for (version, end), start in zip(ends, starts, strict=False)
    ]


def test_a_completion_is_read():
    got = DIALECT.completion(reply(), SAMPLING, 4)
    assert got.token_ids == [7, 8, 9]
    assert got.logps == [-0.5, -1.5, -2.5]
    assert got.finish_reason == "stop"
    assert got.weight_versions == [4, 4, 4]


@pytest.mark.parametrize(
    ("told", "versions"),
    [
        (spans(("3", 3)), [3, 3, 3]),
        (spans(("3", 1), ("5", 3)), [3, 5, 5]),
        (spans(("default", 2), ("5", 3)), [4, 4, 5]),
        (spans(("3", 0), ("4", 3)), [4, 4, 4]),
        ([], [4, 4, 4]),
        (None, [4, 4, 4]),
    ],
)
def test_each_token_has_the_version_that_the_server_tells(told, versions):
    assert DIALECT.completion(reply(weight_versions=told), SAMPLING, 4).weight_versions == versions


def test_an_aborted_completion_may_be_empty():
    nothing = reply(token_ids=[], finish_reason="abort", weight_versions=None)
    got = DIALECT.completion(nothing, SAMPLING, 4)
    assert (got.token_ids, got.logps, got.weight_versions) == ([], [], [])
    assert got.finish_reason == "abort"


def test_rounding_above_zero_is_zero():
    assert DIALECT.completion(reply(token_ids=[1], logps=[1e-6]), SAMPLING, 0).logps == [0.0]


def without(*path):
    broken = copy.deepcopy(reply())
    node = broken
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return broken


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        "text",
        {},
        {"choices": []},
        {"choices": reply()["choices"] * 2},
        without("choices", 0, "token_ids"),
        without("choices", 0, "finish_reason"),
        without("choices", 0, "logprobs"),
        without("choices", 0, "weight_versions"),
        without("choices", 0, "logprobs", "content"),
        without("choices", 0, "logprobs", "content", 1),
        without("choices", 0, "logprobs", "content", 1, "logprob"),
        without("choices", 0, "logprobs", "content", 1, "token_id"),
        reply(logprobs=None),
        reply(finish_reason="error"),
        reply(finish_reason=None),
        reply(token_ids=[], weight_versions=None),
        reply(token_ids=[7, -1]),
        reply(token_ids=[7, 1.5]),
        reply(token_ids=[7, True]),
        reply(token_ids=[7, "8"]),
        reply(token_ids=[7], logps=[float("nan")]),
        reply(token_ids=[7], logps=[float("-inf")]),
        reply(token_ids=[7], logps=[float("inf")]),
        reply(token_ids=[7], logps=[-9999.0]),  # what vLLM makes of NaN
        reply(token_ids=[7], logps=[0.1]),
        reply(token_ids=[7], logps=[None]),
        reply(token_ids=[7], logps=["-1"]),
        reply(token_ids=[7], logps=[False]),
        reply(weight_versions=spans(("3", 2))),
        reply(weight_versions=spans(("3", 4))),
        reply(weight_versions=[{"version": "3", "start": 0, "end": -1}]),
        reply(weight_versions=spans(("three", 3))),
        reply(weight_versions=spans((None, 3))),
        reply(weight_versions=[{"version": "3", "start": 1, "end": 3}]),
        reply(weight_versions=[{"version": "3", "start": 0}]),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(broken):
    with pytest.raises(MalformedReply):
        DIALECT.completion(broken, SAMPLING, 4)
