"""The engine over servers, with scripted servers: real processes, real HTTP, faults on demand."""

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from RL2.engines.protocol import Completion, MalformedReply, SamplingParams
from RL2.engines.servers import pool
from RL2.engines.servers.addresses import free_port
from RL2.engines.servers.engine import ServerEngine, weight_method
from RL2.engines.servers.http import Server, ServerRefused, ServerUnreachable
from RL2.engines.servers.pool import Limits
from RL2.engines.servers.process import ServerOptions
from RL2.engines.servers.weights import HostWeights
from RL2.runtime.errors import EngineError

SCRIPTED = str(Path(__file__).with_name("scripted_server.py"))
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=4)


class ScriptedDialect:
    """What `scripted_server.py` speaks."""

    name = "scripted"
    health_path = "/health"
    weight_methods = ("disk",)

    def command(self, options, port):
        return [options.python, SCRIPTED, str(port), options.model_name]

    def environment(self, options, key):
        return {"SCRIPTED_KEY": key}

    def headers(self, key):
        return {"key": key}

    async def context_length(self, server):
        return 64

    def request(self, token_ids, sampling, seed, request_id):
        return "/generate", {
            "token_ids": token_ids, "seed": seed, "max_new_tokens": sampling.max_new_tokens,
        }  # fmt: skip

    def completion(self, reply, sampling, version):
        try:
            tokens, logps, finish = reply["tokens"], reply["logps"], reply["finish"]
        except (TypeError, KeyError) as error:
            raise MalformedReply(f"no {error}") from error
        if len(tokens) != len(logps):
            raise MalformedReply("counts differ")
        return Completion(tokens, logps, finish, [version] * len(tokens))

    async def abort(self, server):
        await server.post("/abort")

    async def pause(self, server):
        await server.post("/pause")

    async def resume(self, server):
        await server.post("/resume")

    async def sleep(self, server):
        await server.post("/sleep")

    async def wake(self, server):
        await server.post("/wake")

    async def load_weights(self, server, weights, method):
        value = dict(weights)["w"].item()
        await server.post("/load", {"weights": value, "version": weights.version})

    async def mismatch(self, server, weights):
        held = await server.get("/held")
        expected = dict(weights)["w"].item()
        return None if held["weights"] == expected else f"w is {held['weights']}, not {expected}"


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(pool, "_WATCH_EVERY", 0.1)
    monkeypatch.setattr(pool, "_LOST_FOR", 2.0)


@pytest.fixture
def run(tmp_path):
    """run(async function of the engine, number of servers, limits) -> what it returned"""

    def run(function, n_servers=1, limits=None, **options):
        folders = [tmp_path / str(i) for i in range(n_servers)]
        for folder in folders:
            folder.mkdir(exist_ok=True)

        async def play():
            engine = ServerEngine(
                ScriptedDialect(),
                HostWeights(),
                servers=[ServerOptions(model_name=str(folder)) for folder in folders],
                key="secret", log_dir=tmp_path / "logs",
                limits=limits or Limits(request_timeout=20, start_timeout=30), **options,
            )  # fmt: skip
            try:
                await engine.start()
                return await function(engine, *folders)
            finally:
                await engine.close()

        return asyncio.run(play())

    return run


def weights(value):
    return [("w", torch.tensor(float(value)))]


def ask(engine, seed, prompt=(1, 2)):
    return engine.generate(list(prompt), SAMPLING, seed=seed)


def expected(seed, prompt=(1, 2)):
    return [(sum(prompt) + seed + i) % 97 for i in range(4)]


def asked(*folders):
    """How often each seed was asked for."""
    lines = [line for f in folders for line in (f / "requests").read_text().splitlines()]
    return Counter(int(line.split()[1]) for line in lines)


def pids(engine):
    """Process ids of the servers themselves."""
    found = []
    for member in engine._pool.members:
        children = Path(f"/proc/{member.process.pid}/task/{member.process.pid}/children")
        found += [int(pid) for pid in children.read_text().split()]
    return found


def test_requests_are_spread_and_answered(run):
    async def play(engine, *folders):
        answers = await asyncio.gather(*(ask(engine, seed) for seed in range(64)))
        assert [a.token_ids for a in answers] == [expected(seed) for seed in range(64)]
        assert all(a.finish_reason == "length" and a.weight_versions == [0] * 4 for a in answers)
        shares = [len((f / "requests").read_text().splitlines()) for f in folders]
        assert min(shares) >= 24
        assert await engine.healthy()

    run(play, n_servers=2)


def test_the_key_is_asked_for(run):
    async def play(engine, folder):
        stranger = Server(engine._pool.members[0].server.url)
        with pytest.raises(ServerRefused, match="401"):
            await stranger.get("/held")
        await stranger.close()
        command = Path(f"/proc/{pids(engine)[0]}/cmdline").read_text()
        assert "secret" not in command

    run(play)


def test_weights_arrive_with_their_version(run):
    async def play(engine, *folders):
        await engine.update_weights(weights(2.5), 7)
        answers = await asyncio.gather(*(ask(engine, seed) for seed in range(8)))
        assert all(a.logps == [-2.5] * 4 and a.weight_versions == [7] * 4 for a in answers)
        assert engine.weight_version == 7

    run(play, n_servers=2)


def test_weights_that_do_not_arrive_stop_the_run_by_name(run):
    async def play(engine, folder):
        (folder / "deaf").touch()
        with pytest.raises(EngineError, match=r"update 3 by disk did not arrive: w is 0.0, not 1"):
            await engine.update_weights(weights(1), 3)

    run(play)


@pytest.mark.parametrize(
    "reply", ['{"tokens": [1, 2', "[]", "{}", '{"tokens": [1], "logps": [], "finish": "stop"}',
              '{"tokens": [1,2,3,4,5], "logps": [0,0,0,0,0], "finish": "stop"}'],
)  # fmt: skip
def test_a_malformed_reply_is_asked_again_and_then_raised(run, reply):
    async def play(engine, folder):
        (folder / "reply").write_text(json.dumps([reply] * 2))
        assert (await ask(engine, 5)).token_ids == expected(5)
        assert asked(folder)[5] == 3
        (folder / "reply").write_text(json.dumps([reply] * 3))
        with pytest.raises(MalformedReply):
            await ask(engine, 6)

    run(play, limits=Limits(request_timeout=5, retries=2, start_timeout=30))


def test_a_request_has_a_deadline(run):
    async def play(engine, folder):
        (folder / "reply").write_text(json.dumps(["hang"]))
        assert (await ask(engine, 5)).token_ids == expected(5)
        (folder / "reply").write_text(json.dumps(["hang"] * 2))
        with pytest.raises(ServerUnreachable, match="no answer in 0.5 s"):
            await ask(engine, 6)

    run(play, limits=Limits(request_timeout=0.5, retries=1, start_timeout=30))


def test_a_server_that_dies_comes_back_with_the_current_weights(run):
    async def play(engine, *folders):
        await engine.update_weights(weights(1.5), 4)
        (folders[0] / "reply").write_text(json.dumps(["exit"]))
        answers = await asyncio.gather(*(ask(engine, seed) for seed in range(32)))
        assert [a.token_ids for a in answers] == [expected(seed) for seed in range(32)]
        assert all(a.logps == [-1.5] * 4 for a in answers)
        while engine.restarts < 1 or any(m.state != "serving" for m in engine._pool.members):
            await asyncio.sleep(0.05)
        # Both hold the weights now: the new one, too.
        for member in engine._pool.members:
            assert await member.server.get("/held") == {"weights": 1.5, "version": 4}

    run(play, n_servers=2)


def test_a_server_that_starts_anew_reads_the_runs_own_copy(tmp_path):
    """Not the model's folder, whose files may be others by then, or gone."""
    started = []

    class Noting(ScriptedDialect):
        def command(self, options, port):
            started.append(options)
            return super().command(options, port)

    async def play(trusted):
        engine = ServerEngine(
            Noting(), HostWeights(config=GPT2Config()), key="secret", log_dir=tmp_path / "logs",
            servers=[ServerOptions(str(tmp_path), revision="a", trust_remote_code=trusted)],
        )  # fmt: skip
        try:
            await engine.start()
            await engine.update_weights(weights(1.5), 4)
            os.kill(pids(engine)[0], signal.SIGKILL)
            while engine.restarts < 1 or engine._pool.members[0].state != "serving":
                await asyncio.sleep(0.05)
            assert (await ask(engine, 5)).logps == [-1.5] * 4
            return str(engine.weights.folder)
        finally:
            await engine.close()

    folder = asyncio.run(play(False))
    asyncio.run(play(True))  # code that comes with a model lies in its folder alone
    assert [(one.model_name, one.revision) for one in started] == [
        (str(tmp_path), "a"), (folder, None), (str(tmp_path), "a"), (str(tmp_path), "a"),
    ]  # fmt: skip


def test_killed_again_and_again_nothing_is_lost_or_repeated(run):
    async def play(engine, *folders):
        await engine.update_weights(weights(0.5), 1)
        for folder in folders:
            (folder / "slow").write_text("0.2")
        tasks = []
        for seed in range(200):
            tasks.append(asyncio.create_task(ask(engine, seed)))
            await asyncio.sleep(0.02)
            if seed % 40 == 20:
                os.kill(pids(engine)[seed // 40 % 2], signal.SIGKILL)
        answers = await asyncio.gather(*tasks)
        assert [a.token_ids for a in answers] == [expected(seed) for seed in range(200)]
        assert {tuple(a.logps) for a in answers} == {(-0.5,) * 4}
        assert engine.restarts >= 3

    run(play, n_servers=2)


def test_a_lone_server_is_waited_for(run):
    async def play(engine, folder):
        (folder / "reply").write_text(json.dumps(["exit"] * 2))
        assert (await ask(engine, 9)).token_ids == expected(9)
        assert engine.restarts == 2

    run(play)


def test_with_none_left_it_stops_soon_with_the_log(run):
    async def play(engine, *folders):
        for folder in folders:
            (folder / "no_start").touch()
            (folder / "reply").write_text(json.dumps(["exit"]))
        start = time.monotonic()
        with pytest.raises(EngineError) as caught:
            await asyncio.gather(*(ask(engine, seed) for seed in range(8)))
        assert time.monotonic() - start < 30
        message = str(caught.value)
        assert "no scripted server is left" in message
        for index in range(2):
            assert f"scripted server {index} (127.0.0.1:" in message
        assert "no_start was asked for" in message
        assert not await engine.healthy()

    run(play, n_servers=2)


def test_restarts_are_bounded(run):
    async def play(engine, folder):
        (folder / "reply").write_text(json.dumps(["exit"] * 5))
        with pytest.raises(EngineError, match=r"restarted 2 times already \(rollout.max_restarts"):
            await ask(engine, 1)

    run(play, limits=Limits(request_timeout=5, max_restarts=2, start_timeout=30))


def test_weights_wait_for_a_server_that_is_starting(run):
    async def play(engine, *folders):
        os.kill(pids(engine)[1], signal.SIGKILL)
        await asyncio.sleep(0.3)
        await engine.update_weights(weights(3), 2)
        for member in engine._pool.members:
            assert await member.server.get("/held") == {"weights": 3.0, "version": 2}

    run(play, n_servers=2)


def test_abort_brings_back_what_there_is(run):
    async def play(engine, folder):
        (folder / "slow").write_text("60")
        tasks = [asyncio.create_task(ask(engine, seed)) for seed in range(8)]
        await asyncio.sleep(0.3)
        await engine.abort()
        answers = [task.result() for task in tasks]
        assert [a.finish_reason for a in answers] == ["abort"] * 8
        assert [a.token_ids for a in answers] == [expected(seed)[:1] for seed in range(8)]
        (folder / "slow").unlink()
        assert (await ask(engine, 3)).finish_reason == "length"

    run(play)


def test_abort_reaches_requests_without_a_server(run):
    async def play(engine, folder):
        (folder / "reply").write_text(json.dumps(["exit"]))
        (folder / "no_start").touch()
        task = asyncio.create_task(ask(engine, 1))
        while await engine.healthy():
            await asyncio.sleep(0.02)
        await engine.abort()
        assert await task == Completion([], [], "abort", [])

    run(play)


def test_weights_change_while_paused(run):
    async def play(engine, folder):
        await engine.pause()
        task = asyncio.create_task(ask(engine, 1))
        await asyncio.sleep(0.3)
        await engine.update_weights(weights(2), 5)
        await asyncio.sleep(0.3)
        assert not task.done()
        await engine.resume()
        assert (await task).logps == [-2.0] * 4

    run(play)


def test_servers_sleep_and_wake_as_they_were(run):
    async def states(engine):
        return [await member.server.get("/state") for member in engine._pool.members]

    async def play(engine, *folders):
        await engine.sleep()
        await engine.sleep()
        assert all(state["asleep"] for state in await states(engine))
        # One that dies asleep sleeps when it is back.
        os.kill(pids(engine)[0], signal.SIGKILL)
        while engine.restarts < 1 or not await both_serve(engine):
            await asyncio.sleep(0.05)
        assert all(state["asleep"] for state in await states(engine))
        await engine.pause()
        await engine.wake()
        assert [(s["asleep"], s["paused"]) for s in await states(engine)] == [(False, True)] * 2
        await engine.resume()
        await engine.wake()
        assert (await ask(engine, 1)).token_ids == expected(1)

    async def both_serve(engine):
        return all(member.state == "serving" for member in engine._pool.members)

    run(play, n_servers=2)


def test_an_error_of_a_healthy_server_is_asked_again(run):
    async def play(engine, folder):
        (folder / "reply").write_text(json.dumps(["500"]))
        assert (await ask(engine, 5)).token_ids == expected(5)
        (folder / "reply").write_text(json.dumps(["500"] * 4))
        with pytest.raises(ServerRefused, match="HTTP 500: cannot"):
            await ask(engine, 5)
        assert engine.restarts == 0

    run(play)


def test_a_server_that_lives_but_is_sick_is_replaced(run):
    async def play(engine, folder):
        await engine.update_weights(weights(1), 1)
        (folder / "sick").write_text(str(pids(engine)[0]))
        answers = await asyncio.gather(*(ask(engine, seed) for seed in range(8)))
        assert [a.token_ids for a in answers] == [expected(seed) for seed in range(8)]
        assert {tuple(a.logps) for a in answers} == {(-1.0,) * 4}
        assert engine.metrics() == {"rollout/server_restarts": 1.0}

    run(play)


def test_wrong_requests_are_named(run):
    async def play(engine, folder):
        with pytest.raises(EngineError, match="max_new_tokens=4: with a prompt of 61 tokens"):
            await engine.generate([1] * 61, SAMPLING, seed=0)
        assert (await engine.generate([1] * 60, SAMPLING, seed=0)).finish_reason == "length"
        with pytest.raises(EngineError, match="no tokens"):
            await engine.generate([], SAMPLING, seed=0)
        await engine.close()
        with pytest.raises(EngineError, match="after close"):
            await ask(engine, 0)

    run(play)


def test_an_unknown_way_of_sending_weights_is_named(run):
    async def play(engine, folder):
        raise AssertionError

    with pytest.raises(EngineError, match="rollout.weight_sync=tensor: scripted servers take disk"):
        run(play, weight_sync="tensor")


@pytest.mark.parametrize(
    ("urls", "method"),
    [
        ([], "disk"),
        (["http://127.0.0.1:1", "http://localhost:2"], "disk"),
        (["http://127.0.0.1:1", "http://10.0.0.5:2"], "distributed"),
    ],
)
def test_weights_go_by_a_group_where_a_server_is_elsewhere(urls, method):
    dialect = ScriptedDialect()
    dialect.weight_methods = ("disk", "distributed")
    assert weight_method("auto", dialect, urls) == method
    assert weight_method("disk", dialect, urls) == "disk"


def test_a_server_that_cannot_start_stops_the_run(run, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "no_start").touch()

    async def play(engine, folder):
        raise AssertionError

    with pytest.raises(EngineError, match="(?s)ended with status 1 .*no_start was asked for"):
        run(play)


# ------------------------------------------------------------------------ external servers


def other(folder, port):
    return asyncio.create_subprocess_exec(
        sys.executable, SCRIPTED, str(port), str(folder), env=os.environ | {"SCRIPTED_KEY": "k"}
    )


async def connect(url):
    engine = ServerEngine(
        ScriptedDialect(), HostWeights(), urls=[url], key="k",
        limits=Limits(request_timeout=5, retries=1),
    )  # fmt: skip
    for _ in range(100):
        try:
            await engine._pool.members[0].server.get("/health")
            break
        except ServerUnreachable:
            await asyncio.sleep(0.05)
    await engine.start()
    return engine


def test_external_servers_are_used_and_left_running(tmp_path):
    async def play():
        port = free_port()
        process = await other(tmp_path, port)
        engine = await connect(f"http://127.0.0.1:{port}/")
        await engine.update_weights(weights(1), 1)
        assert (await ask(engine, 1)).logps == [-1.0] * 4
        await engine.close()
        assert process.returncode is None
        process.kill()
        await process.wait()

    asyncio.run(play())


def test_an_external_server_that_was_away_gets_the_weights_again(tmp_path):
    async def play():
        port = free_port()
        process = await other(tmp_path, port)
        engine = await connect(f"http://127.0.0.1:{port}")
        await engine.update_weights(weights(1), 1)
        process.kill()
        await process.wait()
        task = asyncio.create_task(ask(engine, 1))
        await asyncio.sleep(0.5)
        process = await other(tmp_path, port)
        assert (await task).logps == [-1.0] * 4
        await engine.close()
        process.kill()
        await process.wait()

    asyncio.run(play())


def test_an_external_server_that_stays_away_is_named(tmp_path):
    async def play():
        port = free_port()
        process = await other(tmp_path, port)
        engine = await connect(f"http://127.0.0.1:{port}")
        process.kill()
        await process.wait()
        with pytest.raises(EngineError, match=f"(?s)no scripted server is left.*{port}.*for 2 s"):
            await ask(engine, 1)
        await engine.close()

    asyncio.run(play())


def test_an_address_without_a_server_is_an_error():
    async def play():
        engine = ServerEngine(
            ScriptedDialect(), HostWeights(), urls=[f"http://127.0.0.1:{free_port()}"]
        )
        await engine.start()

    with pytest.raises(EngineError, match="rollout.server_url=http://127.0.0.1.* start it first"):
        asyncio.run(play())
