"""wandb is really run, offline; it may never ask, hang or crash."""

import os

import pytest

from RL2.trainer.sinks import metrics
from RL2.trainer.sinks.metrics import Metrics
from tests.trainer.sinks.support import config_of
from tests.trainer.support import train, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def wandb_run(files, tmp_path, monkeypatch, caplog):
    """An sft run of one step that logs to wandb, with no account in reach: its lines, and what it
    has logged."""

    def run(how, **env):
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        home = tmp_path / "home"
        home.mkdir()
        for name, value in {"HOME": str(home), "WANDB_CONFIG_DIR": str(home), **env}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        # It needs 17 s alone, and on a busy machine more than the minute that a run gives it.
        monkeypatch.setattr(metrics, "_FINISH", 240.0)
        rows = train(files, "sft", tmp_path / "run", trainer__max_steps=1, **how)
        assert [row["step"] for row in rows] == [1]
        (offline,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
        assert not (tmp_path / "wandb").exists()  # all of it lies in the run's folder
        lines = [line for line in caplog.messages if line.startswith("wandb:")]
        return lines, offline.read_bytes()

    return run


def test_without_a_key_wandb_logs_offline_and_says_so_once(wandb_run):
    lines, logged = wandb_run({"trainer__use_wandb": "true"})
    assert len(lines) == 1
    assert "no API key" in lines[0] and "offline" in lines[0] and "use_wandb=false" in lines[0]
    assert b"actor/loss" in logged and b"actor/grad_norm" in logged


# A fault that is known: on a busy machine wandb.teardown() waits without a limit for a service that
# still retries, so there is no offline log. A run ends it after a minute and says so.
@pytest.mark.skipif(os.environ.get("RL2_FAULTS") != "long", reason="RL2_FAULTS=long runs it")
def test_an_unreachable_server_means_offline_and_one_line(wandb_run, tmp_path):
    pytest.importorskip("tensorboard", reason="requirements/trackers.txt")
    lines, logged = wandb_run(
        {"trainer__use_wandb": "null", "trainer__trackers": "[wandb,tensorboard]"},
        WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="3",
    )  # fmt: skip
    assert list((tmp_path / "run/tensorboard").glob("events.*"))
    assert len(lines) == 1 and "offline" in lines[0]
    assert b"actor/loss" in logged


def test_use_wandb_false_leaves_no_trace(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(files, "sft", tmp_path / "run", trainer__max_steps=1)
    assert not list(tmp_path.rglob("*wandb*"))


def test_a_run_of_wandb_goes_on_under_its_id(tmp_path, monkeypatch):
    """The id is known at once; later rows, and not those that were sent, follow."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = Metrics(config_of(tmp_path, "wandb"), 0, None)
    first.log(1, 3, {"actor/first": 1.0})
    first.close()
    second = Metrics(config_of(tmp_path, "wandb"), 1, first.run_id)
    second.log(2, 3, {"actor/second": 1.0})
    second.close()
    assert second.run_id == first.run_id
    logged = sorted(tmp_path.glob(f"wandb/offline-run-*-{first.run_id}/run-{first.run_id}.wandb"))
    one, other = (path.read_bytes() for path in logged)
    assert b"actor/first" in one and b"actor/second" not in one
    assert b"actor/second" in other and b"actor/first" not in other
