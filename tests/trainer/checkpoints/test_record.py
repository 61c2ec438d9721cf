"""What a run was started with lies in its folder, can be started again, and has no secrets."""

import json
import subprocess

import torch
from omegaconf import OmegaConf

from RL2.config import validate
from RL2.trainer.checkpoints import record
from tests.trainer.support import command, composed, overrides, rows_of, write_files, write_rows

SECRET = "canary0123456789"


def test_config_and_start_are_kept_and_what_was_before_stays(tmp_path, monkeypatch):
    files = write_files(tmp_path / "files")
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    lines = overrides(files, "spo", tmp_path / "run", trainer__project=f"my {SECRET}")
    config = composed("spo", [*lines, "actor.loss.options.api_key=plain-but-secret"])
    record.write(tmp_path, config, 2, 0)
    config.actor.lr = 2e-5
    record.write(tmp_path, config, 1, 20)
    config.actor.lr = 3e-5
    record.write(tmp_path, config, 1, 40)

    text = (tmp_path / "config.yaml").read_text()
    assert SECRET not in text and "plain-but-secret" not in text and "project: my ***" in text
    saved = OmegaConf.load(tmp_path / "config.yaml")
    assert saved.actor.lr == 3e-5 and saved.rollout.model_name == str(files / "model")
    assert saved.actor.loss.name == "max_target_kl" and saved.actor.loss.detach_target is False
    assert "${" not in text
    validate(saved, 1)
    assert OmegaConf.load(tmp_path / "earlier/1/config.yaml").actor.lr == 1e-3
    assert OmegaConf.load(tmp_path / "earlier/2/config.yaml").actor.lr == 2e-5
    starts = [
        json.loads((tmp_path / path / "run.json").read_text())
        for path in ("earlier/1", "earlier/2", ".")
    ]
    assert [start["resumed_after_step"] for start in starts] == [0, 20, 40]
    assert [start["processes"] for start in starts] == [2, 1, 1]
    assert starts[0]["versions"]["torch"] == torch.__version__
    assert "pytest" in starts[0]["command"]
    assert not list(tmp_path.glob("*.tmp"))


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip


def test_the_commit_and_whether_files_differ(tmp_path):
    assert record.commit(tmp_path) is None  # in no repository
    git(tmp_path, "init", "-q")
    assert record.commit(tmp_path) is None  # nothing was committed
    (tmp_path / "loss.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = record.commit(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "loss.py").write_text("x = 2\n")
    assert record.commit(tmp_path) == clean | {"dirty": True}
    (tmp_path / "site-packages").mkdir()  # installed inside of somebody's repository
    assert record.commit(tmp_path / "site-packages") is None


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.commit(tmp_path) is None


def test_a_run_repeats_from_its_own_config(tmp_path):
    """Bit for bit, by the command that stands in the file's first line."""
    files = write_files(tmp_path / "files")
    write_rows(files / "rows.jsonl", 8)
    done = command("sft", overrides(files, "sft", tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    first_line = (tmp_path / "run/config.yaml").read_text().partition("\n")[0]
    assert "python -m RL2.trainer.sft --config-dir <this folder> --config-name config" in first_line
    again = command(
        "sft", [f"trainer.save_dir={tmp_path / 'again'}"],
        flags=("--config-dir", str(tmp_path / "run"), "--config-name", "config"), cwd=tmp_path,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    losses = [[row["actor/loss"] for row in rows_of(tmp_path / run)] for run in ("run", "again")]
    assert losses[0] == losses[1]
    start = json.loads((tmp_path / "again/run.json").read_text())
    assert "--config-name config" in start["command"] and "RL2.trainer.sft" in start["command"]
    assert not (tmp_path / "outputs").exists()
