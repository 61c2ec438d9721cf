"""The command `rl2`, and the names of a sweep's runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from RL2 import __version__
from RL2.trainer.startup.sweep import run_name
from tests.trainer.support import ROOT, command, environ, overrides, write_files


def rl2(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    code = "from RL2.trainer.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd, env=environ(), capture_output=True, text=True,
    )  # fmt: skip


def test_help_and_unknown_trainers():
    for words in ([], ["--help"], ["help"]):
        done = rl2(*words)
        assert done.returncode == 0 and "usage: rl2 <trainer> key=value" in done.stdout
    done = rl2("grpo", "actor.lr=1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "rl2: grpo: unknown trainer; use one of ppo, spo, spo_0p5, sft, dpo, rm\n"


@pytest.mark.parametrize("words", [["--version"], ["version"], ["sft", "--version"]])
def test_the_version_is_that_of_this_library(words):
    done = rl2(*words)
    assert (done.returncode, done.stdout) == (0, f"RL2 {__version__}\n")


def test_help_of_a_trainer():
    done = rl2("help", "sft", "max_steps")
    assert done.returncode == 0 and "\ntrainer.max_steps=" in done.stdout
    assert "trainer.seed" not in done.stdout


def test_a_trainer_gets_the_rest_of_the_command_line(tmp_path):
    done = rl2("sft", "trainer.experiment_name=mine", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "save_dir: ckpts/sft/${trainer.experiment_name}" in done.stdout
    assert "experiment_name: mine" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
@pytest.mark.parametrize("closed", [True, False])
def test_nobody_reads_the_usage(closed):
    code = "from RL2.trainer.cli import main; main()"
    line = '"$0" -c "$1" >&-' if closed else '"$0" -c "$1" >/dev/full'
    done = subprocess.run(
        ["sh", "-c", line, sys.executable, code], cwd=ROOT, env=environ(), stderr=subprocess.PIPE
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_names_of_runs():
    lines = ["actor.lr=1e-4", "trainer.seed=1", "actor.loss.name=nll"]
    assert run_name(lines, {"actor.lr", "trainer.seed"}, 3) == "lr_1e-4-seed_1"
    assert run_name(lines, {"actor.lr", "trainer.experiment_name"}, 3) is None
    assert run_name(["data.path=a/b.json"], {"data.path"}, 3) == "path_a_b.json-3"
    assert run_name(["data.path=" + "a" * 200], {"data.path"}, 3).endswith("a-3")
    assert run_name([], set(), 3) == "3"  # a sweep that a yaml file describes


@pytest.mark.slow
@pytest.mark.parametrize("follows", [True, False])
def test_the_runs_of_a_sweep_do_not_meet(tmp_path, follows):
    files = write_files(tmp_path)
    lines = overrides(files, "sft", tmp_path / "out", trainer__max_steps=1, trainer__seed="1,2")
    if follows:
        lines = [line for line in lines if not line.startswith("trainer.save_dir=")]
    done = command("sft", lines, flags=("--multirun",), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stem = tmp_path / ("ckpts/sft/default" if follows else "out")
    for run in (stem.with_name(f"{stem.name}-seed_{n}") for n in (1, 2)):
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
        assert not (run / "before1").exists()
