"""Canaries: secrets are planted wherever a run could pick them up, and searched for in all of what
it leaves, says, and starts."""

import os
import subprocess
import sys
import time

import pytest

from tests.trainer.support import ENVIRONMENT, command, environ, overrides, write_env, write_files

CANARY = "canary0123456789abcdef0123456789abcdef01"  # as long as a key of wandb's
VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "RL2_SERVER_KEY", "JUDGE_API_KEY")

# An environment whose failures quote its key, and a loss whose option holds one.
LEAKY = f"""
import os
{ENVIRONMENT.replace("step(", "judged(")}

async def step(state, action, extra_info):
    if sum(map(ord, action)) % 3 == 0:
        raise ValueError("refused: " + os.environ["JUDGE_API_KEY"])
    return await judged(state, action + os.environ["JUDGE_API_KEY"], extra_info)
"""
LOSS = """
def loss(logps, advantages, *, api_key=""):
    assert api_key
    return -advantages * logps
"""
YAML = """
defaults: [spo, _self_]
actor: {loss: {options: {api_key: "${oc.env:JUDGE_API_KEY}"}}}
trainer: {project: "my ${oc.env:JUDGE_API_KEY}"}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def descendants(pid):
    """All processes below `pid`."""
    found = []
    for thread in os.scandir(f"/proc/{pid}/task"):
        with open(f"{thread.path}/children") as file:
            for child in map(int, file.read().split()):
                found += [child, *descendants(child)]
    return found


def watched(argv, log, **options):
    """The exit status, what it wrote, and the command lines of all that it started."""
    lines, end = set(), time.monotonic() + 280
    with (
        log.open("w") as file,
        subprocess.Popen(argv, stdout=file, stderr=file, **options) as process,
    ):
        while process.poll() is None and time.monotonic() < end:
            try:
                for pid in descendants(process.pid):
                    with open(f"/proc/{pid}/cmdline") as of_child:
                        lines.add(of_child.read())
            except (FileNotFoundError, ProcessLookupError):
                pass  # one of them ended meanwhile
            time.sleep(0.05)
        process.kill()
    return process.returncode, log.read_text(), lines


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
def test_no_canary_anywhere(files, tmp_path):
    write_env(tmp_path / "leaky.py", LEAKY)
    (tmp_path / "loss.py").write_text(LOSS)
    (tmp_path / "mine.yaml").write_text(YAML)
    # wandb looks at the repository around it.
    remote = f"https://user:{CANARY}@127.0.0.1/x.git"
    for line in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *line], cwd=tmp_path, check=True)
    lines = overrides(
        files, "spo", "out", rollout__env_path="leaky.py", actor__avg_level="sequence",
        actor__loss__import_path="loss.py:loss", rollout__max_env_errors="null",
        trainer__use_wandb="true", trainer__max_steps=2,
    )  # fmt: skip
    flags = ["--config-dir", str(tmp_path), "--config-name", "mine"]
    keys = dict.fromkeys(VARIABLES, CANARY)
    status, text, started = watched(
        [sys.executable, "-m", "RL2.trainer.spo", *flags, *lines], tmp_path / "log", cwd=tmp_path,
        env=environ(WANDB_MODE="offline", WANDB_CONFIG_DIR=str(tmp_path / "home"), **keys),
    )  # fmt: skip
    assert status == 0, text
    assert "refused: ***" in text and CANARY not in text
    assert started and CANARY not in "".join(started)
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = {path.name for path in left}
    assert {"metrics.jsonl", "manifest.json", "trainer.json"} <= names
    assert any(path.suffix == ".wandb" for path in left)
    assert [path for path in left if CANARY.encode() in path.read_bytes()] == []
    dumped = (tmp_path / "out/rollouts/step000001_train.jsonl").read_text()
    assert "refused: ***" in dumped


KEY = "__import__('os').environ['HF_TOKEN']"
# A loss that fails where nobody calls it by name, and not in its trial at the start.
BACKWARD = """
import torch
def fail(gradient):
    if len(gradient) > 3: {}
def f(logps):
    losses = -logps
    losses.register_hook(fail)
    return losses
"""


@pytest.mark.parametrize(
    ("key", "text", "error"),
    [
        ("rollout__env_path", f"raise ValueError({KEY})", "ConfigError: rollout.env_path="),
        # The module itself fails when it is asked for `reset`.
        (
            "rollout__env_path",
            f"async def step(s, a, e): ...\ndef __getattr__(name): raise OSError({KEY})",
            "ConfigError: rollout.env_path=",
        ),
        (
            "actor__loss__import_path",
            f"def f(logps):\n if len(logps) > 3: raise OSError({KEY})\n return -logps",
            "TrainingError: actor.loss.import_path=",
        ),
        # An error that nobody expects.
        (
            "actor__loss__import_path",
            BACKWARD.format(f"raise OSError({KEY})"),
            "Traceback (most recent call last):",
        ),
    ],
)
def test_no_canary_in_what_ends_a_run(files, tmp_path, key, text, error):
    path = write_env(tmp_path / "file.py", text)
    value = f"{path}:f" if "loss" in key else path
    lines = overrides(files, "spo", tmp_path / "out", **{key: value})
    done = command("spo", lines, env=environ(HF_TOKEN=CANARY))
    assert done.returncode == 1
    assert error in done.stderr, done.stderr
    assert "***" in done.stderr and CANARY not in done.stderr + done.stdout
