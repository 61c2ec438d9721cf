"""Whole runs with real servers: the update arrives, kills are survived, nothing is left behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from RL2.distributed import process_group
from RL2.engines.protocol import SamplingParams
from RL2.engines.servers.addresses import free_port
from RL2.engines.servers.process import ServerOptions
from RL2.engines.servers.sglang import SGLang
from RL2.engines.servers.vllm import VLLM
from RL2.runtime.process_tree import descendants
from RL2.trainer.loop import Trainer
from RL2.trainer.main import launch
from tests.real_engines.support import engine_python, engine_run, make_engine_model, served_by
from tests.rollout.support import make_tokenizer, reference_logps
from tests.trainer.support import ENVIRONMENT, ROOT, composed, environ, rows_of

pytestmark = pytest.mark.slow

SERVERS = ("vllm", "sglang")
N_PROMPTS = 16


@pytest.fixture(params=SERVERS)
def setup(request, tmp_path):
    """setup(changes) -> a small run with the servers of one kind."""
    make_engine_model(tmp_path / "model")
    (tmp_path / "env.py").write_text(ENVIRONMENT)
    rows = [{"prompt": f"{i} + {3 * i % 7} = "} for i in range(N_PROMPTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def setup(**changes):
        own = {
            "train_data__path": tmp_path / "rows.jsonl", "train_data__prompts_per_rollout": 8,
            "train_data__responses_per_prompt": 4, "actor__gradient_checkpointing": "false",
            "actor__lr": 1e-2, "actor__warmup_ratio": 0.0, "trainer__num_threads": 1,
            "rollout__train_sampling_params__max_new_tokens": 24,
            "rollout__dynamic_filtering": "false", "trainer__n_epochs": 1,
        }  # fmt: skip
        return engine_run(request.param, str(tmp_path / "model"), tmp_path, **(own | changes))

    return setup


def command_line(run, n_ranks=1):
    """The run as a user starts it."""
    start = [sys.executable, "-m"]
    if n_ranks > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}", "-m"]
    errors = run.save_dir.with_name("stderr")
    return subprocess.Popen(
        [*start, "RL2.trainer.ppo", *run.lines], env=environ() | {"PYTHONPATH": with_root(run)},
        stdout=subprocess.DEVNULL, stderr=errors.open("w"), stdin=subprocess.DEVNULL,
    )  # fmt: skip


def with_root(run):
    return os.pathsep.join(filter(None, [str(ROOT), run.variables.get("PYTHONPATH")]))


def wait_for(condition, seconds, process=None):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        assert process is None or process.poll() is None, "the run is over"
        time.sleep(0.1)


def test_a_step_with_a_large_learning_rate_is_served(setup, tmp_path, monkeypatch):
    run = setup(trainer__max_steps=1)
    for name, value in run.variables.items():
        monkeypatch.setenv(name, value)
    params = SamplingParams(temperature=1.0, max_new_tokens=32)
    prompt = make_tokenizer().encode("3 + 2 = ")
    with process_group("cpu") as device:
        trainer = Trainer(run.config(), device)
        try:
            trainer.train()
            collector = trainer.source.collector
            served = collector.run(collector.engine.generate(prompt, params, seed=5))
            assert served.weight_versions == [1] * len(served.token_ids)
        finally:
            trainer.close()
    (row,) = rows_of(run.save_dir)
    assert row["actor/skipped"] == 0
    assert row["rollout/llm_kl"] < 1e-6
    new = AutoModelForCausalLM.from_pretrained(run.save_dir / "final").eval()
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    logps = torch.tensor(served.logps)
    assert (logps - reference_logps(new, prompt, served.token_ids, 1.0)).abs().max() < 1e-4
    assert (logps - reference_logps(old, prompt, served.token_ids, 1.0)).abs().max() > 0.1


@pytest.mark.long
@pytest.mark.timeout(600)
def test_servers_killed_at_random_lose_and_repeat_nothing(setup, tmp_path):
    run = setup(
        rollout__servers_per_node=2, trainer__n_epochs=6,
        rollout__train_sampling_params__max_new_tokens=64, rollout__max_restarts=20,
    )  # fmt: skip
    process = command_line(run)
    save_dir = run.save_dir
    generator = torch.Generator().manual_seed(0)
    kills = 0
    try:
        wait_for(lambda: (save_dir / "metrics.jsonl").exists(), 200, process)
        shutil.rmtree(tmp_path / "model")  # servers that start anew do without
        while process.poll() is None and kills < 4:
            guards = servers_of(process.pid)
            if len(guards) == 2:  # both are up, or on their way
                victim = guards[int(torch.randint(2, (1,), generator=generator))]
                os.kill(victim, signal.SIGKILL)
                kills += 1
            time.sleep(1.0 + 8 * torch.rand(1, generator=generator).item())
        assert process.wait(timeout=400) == 0, save_dir.with_name("stderr").read_text()
    finally:
        process.kill()
    assert kills >= 2, "the run was over before two kills"
    rows = rows_of(save_dir)
    n_steps = 6 * N_PROMPTS // 8
    assert [row["step"] for row in rows] == list(range(1, n_steps + 1))
    assert rows[-1]["rollout/server_restarts"] >= 1
    for row in rows:
        assert row["train/n_samples"] == 32
        assert row["rollout/llm_kl"] < 1e-6  # what came back holds the current weights
    for step in range(1, n_steps + 1):
        dump = save_dir / "rollouts" / f"step{step:06d}_train.jsonl"
        samples = [json.loads(line) for line in dump.read_text().splitlines()]
        assert Counter(s["group"] for s in samples) == {group: 4 for group in range(8)}


@pytest.mark.long
def test_with_no_server_left_the_run_stops_within_a_minute(setup):
    """Both servers are killed and killed again, faster than they can start."""
    run = setup(rollout__servers_per_node=2, trainer__n_epochs=100, rollout__max_restarts=0)
    process = command_line(run)
    metrics = run.save_dir / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, 200, process)
        for server in servers_of(process.pid):
            os.kill(server, signal.SIGKILL)
        start = time.monotonic()
        assert process.wait(timeout=60) == 1
        assert time.monotonic() - start < 60
    finally:
        process.kill()
    message = run.save_dir.with_name("stderr").read_text()
    name = run.engine
    assert f"EngineError: no {name} server is left" in message
    for index in range(2):
        assert f"{name} server {index} (127.0.0.1:" in message
    assert "rollout.max_restarts" in message
    assert "  | " in message  # the end of a log


@pytest.mark.long
def test_two_ranks_one_drives_two_servers(setup):
    run = setup(rollout__servers_per_node=2, trainer__n_epochs=2)
    process = command_line(run, n_ranks=2)
    try:
        assert process.wait(timeout=280) == 0
    finally:
        process.kill()
    rows = rows_of(run.save_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["train/n_samples"] == 32
        assert row["rollout/llm_kl"] < 1e-6
    logs = sorted(p.name for p in (run.save_dir / "servers").iterdir())
    assert logs == [f"{run.engine}{index}.log" for index in range(2)]


@pytest.mark.long
@pytest.mark.parametrize("way", ["staleness=1", "partial_rollout=true"])
def test_tokens_of_older_weights_are_told_apart(setup, monkeypatch, way):
    key, _, value = way.partition("=")
    run = setup(
        trainer__n_epochs=2, rollout__train_sampling_params__max_new_tokens=200,
        rollout__llm_kl_alarm="null", **{f"rollout__{key}": value},
    )  # fmt: skip
    for name, value in run.variables.items():
        monkeypatch.setenv(name, value)
    launch(composed("ppo", run.lines))
    rows = rows_of(run.save_dir)
    assert [row["train/n_samples"] for row in rows] == [32] * 4
    staleness = [row["rollout/staleness"] for row in rows]
    assert staleness[0] == 0
    if key == "staleness":
        assert staleness[1:] == [1, 1, 1]
    else:
        assert 0 < max(staleness) < 2


def test_an_external_server_gets_the_weights_and_stays(setup, tmp_path, monkeypatch):
    port = free_port()
    run = setup(
        rollout__server_url=f"http://127.0.0.1:{port}", rollout__server_python="null",
        rollout__weight_sync="distributed",
    )  # fmt: skip
    dialect = {"vllm": VLLM, "sglang": SGLang}[run.engine]()
    # It holds another model of that shape when the run starts.
    options = ServerOptions(
        make_engine_model(tmp_path / "other", seed=9), dtype="float32", max_in_flight=64,
        python=engine_python(run.engine),
    )  # fmt: skip
    for name, value in (run.variables | {"RL2_SERVER_KEY": "somebody's"}).items():
        monkeypatch.setenv(name, value)
    key, log = "somebody's", tmp_path / "server.log"
    with served_by(dialect, options, log, port, key) as (process, server, loop):
        launch(composed("ppo", run.lines))
        assert process.status is None
        loop.run(server.get(dialect.health_path))
    rows = rows_of(run.save_dir)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["rollout/llm_kl"] < 1e-6 for row in rows)


def servers_of(trainer: int) -> list[int]:
    """Processes of the servers themselves, which the guards started."""
    commands = {p: command_of(p) for p in children(trainer)}
    guards = [p for p, line in commands.items() if "/guard.py" in line and "--control" not in line]
    return [child for guard in guards for child in children(guard)]


def children(pid: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        found = [Path(f"/proc/{pid}/task/{t}/children").read_text().split() for t in tasks]
    except OSError:
        return []
    return [int(child) for some in found for child in some]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def test_it_listens_on_loopback_and_leaves_nothing_when_it_is_killed(setup):
    run = setup(trainer__n_epochs=100)
    process = command_line(run)
    try:
        metrics = run.save_dir / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, 200, process)
        family = descendants(process.pid)
        assert len(servers_of(process.pid)) == 1
        addresses = listening([process.pid, *family])
        assert addresses
        assert set(addresses) <= {"127.0.0.1", "::1"}, addresses
        key = environment_of(servers_of(process.pid)[0])
        assert not any(secret in command_of(pid) for pid in family for secret in key)
    finally:
        process.kill()
    process.wait()
    wait_for(lambda: not any(running(pid) for pid in family), 30)


def environment_of(pid: int) -> list[str]:
    """Values of a process's variables that hold a key."""
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    keys = [pair.partition("=")[2] for pair in pairs if "KEY" in pair.partition("=")[0]]
    assert any(len(key) > 20 for key in keys), "the server was given no key"
    return [key for key in keys if len(key) > 20]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listening(pids: list[int]) -> list[str]:
    """Addresses on which these processes listen (TCP)."""
    inodes = set()
    for pid in pids:
        try:
            files = [os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir() if f.is_symlink()]
        except OSError:
            continue
        inodes |= {f[8:-1] for f in files if f.startswith("socket:[")}
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                raw = bytes.fromhex(fields[1].partition(":")[0])
                words = [raw[i : i + 4][::-1] for i in range(0, len(raw), 4)]
                found.append(socket.inet_ntop(family, b"".join(words)))
    return found
