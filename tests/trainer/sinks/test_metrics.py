"""Sinks: wandb is really run, offline; it may never ask, hang or crash."""

import math
import os
import shutil
import signal
import time

import pytest
from omegaconf import OmegaConf

from RL2.runtime.process_tree import descendants
from RL2.trainer.sinks.metrics import Clock, Metrics, Timers, hours
from RL2.trainer.sinks.wandb_process import new_rows
from tests.trainer.support import command, environ, overrides, rows_of, train, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def wandb_run(files, tmp_path, **env):
    """An sft run of one step that logs to wandb, with no account in reach."""
    home = tmp_path / "home"
    home.mkdir()
    start = time.monotonic()
    done = command(
        "sft",
        overrides(files, "sft", tmp_path / "run", trainer__use_wandb="true", trainer__max_steps=1),
        env=environ(HOME=str(home), WANDB_CONFIG_DIR=str(home), **env), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 120
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1]
    offline = list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(offline) == 1 and offline[0].stat().st_size > 0
    assert not (tmp_path / "wandb").exists()  # all of it lies in the run's folder
    return [line for line in done.stderr.splitlines() if line.startswith("wandb:")], offline[
        0
    ].read_bytes()


def test_without_a_key_wandb_logs_offline_and_says_so_once(files, tmp_path):
    lines, logged = wandb_run(files, tmp_path)
    assert len(lines) == 1
    assert "no API key" in lines[0] and "offline" in lines[0] and "use_wandb=false" in lines[0]
    assert b"actor/loss" in logged and b"actor/grad_norm" in logged


def test_an_unreachable_server_means_offline_and_one_line(files, tmp_path):
    lines, logged = wandb_run(
        files, tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_INIT_TIMEOUT="3",
    )  # fmt: skip
    assert len(lines) == 1 and "offline" in lines[0]
    assert b"actor/loss" in logged


def test_use_wandb_false_leaves_no_trace(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(files, "sft", tmp_path / "run", trainer__max_steps=1)
    assert not list(tmp_path.rglob("*wandb*"))


def test_timers_sum_what_runs_twice_and_start_anew():
    timers = Timers()
    for _ in range(2):
        with timers("phase"):
            time.sleep(0.01)
    assert timers.pop()["timing/phase"] >= 0.02
    assert timers.pop() == {}


def sink_config(folder):
    trainer = {"save_dir": str(folder), "use_wandb": True, "project": "p", "experiment_name": "e"}
    return OmegaConf.create({"trainer": trainer})


def test_a_run_of_wandb_goes_on_under_its_id(tmp_path, monkeypatch):
    """The id is known at once; later rows, and not those that were sent, follow."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = Metrics(sink_config(tmp_path), 0, None)
    first.log(1, 3, {"actor/first": 1.0})
    first.close()
    second = Metrics(sink_config(tmp_path), 1, first.run_id)
    second.log(2, 3, {"actor/second": 1.0})
    second.close()
    assert second.run_id == first.run_id
    logged = sorted(tmp_path.glob(f"wandb/offline-run-*-{first.run_id}/run-{first.run_id}.wandb"))
    one, other = (path.read_bytes() for path in logged)
    assert b"actor/first" in one and b"actor/second" not in one
    assert b"actor/second" in other and b"actor/first" not in other


def test_half_a_row_is_read_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    with path.open("rb") as file:
        assert [*new_rows(file)] == [{"step": 1}]
        with path.open("ab") as growing:
            growing.write(b'ep": 2}\n{"step": 3}\n')
        assert [*new_rows(file)] == [{"step": 2}, {"step": 3}]
        assert [*new_rows(file)] == []


def test_rows_that_were_damaged_are_dropped_and_named(tmp_path, caplog):
    """Those beyond the resumed step come again."""
    good = ['{"step": 1, "a": 1.5}', '{"step": 2, "a": NaN}']
    bad = [b"5", b"{}", b'{"step": "2"}', b"\x00\xff\xfe", b'{"step": 2, "a": 1', b"[]", b"null"]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([good[0].encode(), *bad, good[1].encode(), b'{"step": 3}', b""]))
    trainer = {"save_dir": str(tmp_path), "use_wandb": False}
    Metrics(OmegaConf.create({"trainer": trainer}), 2, None).close()
    assert path.read_text().splitlines() == good
    assert sum("no step's was dropped" in line for line in caplog.messages) == len(bad)


def test_what_json_has_no_number_for_is_left_out_and_named_once(tmp_path, caplog):
    """Readers of strict JSON, such as jq, would end at the first NaN."""
    trainer = {"save_dir": str(tmp_path), "use_wandb": False}
    metrics = Metrics(OmegaConf.create({"trainer": trainer}), 0, None)
    caplog.set_level("INFO")
    for step, kl in enumerate((math.inf, 0.5, math.nan), start=1):
        metrics.log(step, 3, {"actor/kl": kl, "actor/loss": -math.inf, "actor/lr": 1.0})
    metrics.close()
    first, second, third = rows_of(tmp_path)
    assert first == {"step": 1, "actor/lr": 1.0} and third == {"step": 3, "actor/lr": 1.0}
    assert second == {"step": 2, "actor/kl": 0.5, "actor/lr": 1.0}
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [line.partition(",")[0] for line in warnings] == [
        "actor/kl is inf in step 1", "actor/loss is -inf in step 1",
    ]  # fmt: skip
    assert "actor/loss -inf" in caplog.text  # the line of the step has it


def test_a_sink_that_reads_nothing_is_not_waited_for(tmp_path, caplog):
    """More pokes than a pipe holds; then it is killed, which is said once."""
    metrics = Metrics(sink_config(tmp_path), 0, None)
    guard = metrics.wandb._process.pid
    stopped = [guard, *descendants(guard)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    for _ in range(100_000):
        metrics.wandb.poke()
    for pid in reversed(stopped):
        os.kill(pid, signal.SIGKILL)
    metrics.wandb._process.wait()
    for step in (1, 2):
        metrics.log(step, 2, {})
    metrics.close()
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "status -9" in line and str(tmp_path / "metrics.jsonl") in line


def test_time_gone_and_left(monkeypatch):
    """What is left is told by the steps since the start, without the evaluation before them."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(0)
    now[0] += 600
    assert clock.tick(0, 10) == "elapsed 0:10:00"
    now[0] += 60
    assert clock.tick(1, 10) == "elapsed 0:11:00  left 0:09:00"
    now[0] += 30
    assert clock.tick(2, 10) == "elapsed 0:11:30  left 0:06:00"
    assert clock.tick(10, 10) == "elapsed 0:11:30"
    resumed = Clock(20)
    now[0] += 10
    assert resumed.tick(21, 1021) == "elapsed 0:00:10  left 2:46:40"
    assert hours(100 * 3600 + 62) == "100:01:02"


@pytest.mark.parametrize("loss", ["deleted", "moved", "replaced"])
def test_rows_survive_what_somebody_does_with_the_folder(tmp_path, caplog, loss):
    run = tmp_path / "run"
    config = OmegaConf.create({"trainer": {"save_dir": str(run), "use_wandb": False}})
    metrics = Metrics(config, 0, None)
    metrics.log(1, 3, {"x": 1.0})
    if loss == "deleted":
        shutil.rmtree(run)
    elif loss == "moved":
        run.rename(tmp_path / "elsewhere")
    else:  # as editors save
        (run / "edited").write_text((run / "metrics.jsonl").read_text())
        (run / "edited").replace(run / "metrics.jsonl")
    for step in (2, 3):
        metrics.log(step, 3, {"x": 1.0})
    metrics.close()
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3]
    told = [line for line in caplog.messages if "was deleted, moved or replaced" in line]
    assert len(told) == 1 and str(run / "metrics.jsonl") in told[0]
