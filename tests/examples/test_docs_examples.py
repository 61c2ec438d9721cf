"""The loss and the environment of the docs, by the commands that they give for them.

Here with a random model and a few rows. With RL2_FAULTS=long as they stand, from the quickstart's
data and warm-up, and what the docs say came of them.
"""

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from RL2.trainer.main import launch
from tests.docs import COMMANDS, PAGES, ROOT, example
from tests.faults.support import LONG
from tests.trainer.support import ENVIRONMENT, composed, environ, rows_of, write_model

BY_NAME = {
    word.partition("=")[2]: (trainer, overrides)
    for trainer, overrides in COMMANDS
    for word in overrides
    if word.startswith("trainer.experiment_name=")
}
PROBLEMS = [
    {"question": f"Ann has {i} apples and {i % 3} pears.", "answer": f"#### {i + i % 3}"}
    for i in range(16)
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkout in which the files of the docs have been written."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "envs", tmp_path / "envs")
    for name in ("my_loss.py", "my_env.py"):
        (tmp_path / name).write_text(example(name), encoding="utf-8")
    return tmp_path


@pytest.fixture
def small(folder):
    """What the quickstart leaves, but small and random."""
    quickstart = folder / "runs" / "quickstart"
    write_model(quickstart / "warmup" / "final")
    (quickstart / "data").mkdir()
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in PROBLEMS)
        (quickstart / "data" / f"{split}.jsonl").write_text(lines)
    (folder / "odd.py").write_text(ENVIRONMENT)
    return folder


def run_shortly(name: str, *changes: str) -> list[dict]:
    trainer, overrides = BY_NAME[name]
    few = ("train_data.prompts_per_rollout=8", "actor.max_length_per_device=1024")
    launch(composed(trainer, [*overrides, *few, "trainer.num_threads=1", *changes]))
    return rows_of(Path("ckpts", trainer, name))


def test_the_loss_trains(small):
    """A random model solves nothing, so that another environment has to reward it."""
    at_step_2 = ("trainer.max_steps=2", "trainer.test_freq=2", "rollout.env_path=odd.py")
    rows = run_shortly("my_loss", *at_step_2)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert 0 < row["actor/disagrees"] < 1 and row["actor/grad_norm"] > 0
    for row in (rows[0], rows[2]):
        assert {"test/score", "test/sampled_score"} <= row.keys()


def test_the_environment_plays(small):
    rows = run_shortly("guess", "trainer.n_epochs=2")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["train/n_turns"] > 1 and 0 <= row["train/score"] < 1
        assert row["rollout/env_errors"] == 0


# ------------------------------------------------------------------------------ as they stand


@pytest.mark.skipif(not LONG, reason="RL2_FAULTS=long")
@pytest.mark.timeout(3600)
def test_the_figures(folder):
    """To the third digit on the machine that gave them; elsewhere rounding leads elsewhere."""
    warm_up(folder)
    for name in ("my_loss", "guess"):
        trainer, overrides = BY_NAME[name]
        run("-m", f"RL2.trainer.{trainer}", *overrides, cwd=folder)

    scores = {row["step"]: row for row in rows_of(Path("ckpts", BY_NAME["my_loss"][0], "my_loss"))}
    row = re.search(r"^\| seed 0 \| ([\d.]+) \| ([\d.]+) \(", section("my_loss.py"), re.MULTILINE)
    before, last = map(float, row.groups())
    assert scores[0]["test/score"] == pytest.approx(before, abs=0.03)
    assert scores[40]["test/score"] == pytest.approx(last, abs=0.05)
    # Two standard errors of 1,024 problems, and no harm to what is sampled.
    assert scores[40]["test/score"] > scores[0]["test/score"] + 2 * math.sqrt(0.5 / 1024)
    assert scores[40]["test/sampled_score"] > scores[0]["test/sampled_score"] - 0.05

    guessed = [row["train/score"] for row in rows_of(Path("ckpts/ppo/guess"))]
    assert len(guessed) == 60
    assert statistics.mean(guessed[-10:]) > statistics.mean(guessed[:3]) + 0.1


def section(name: str) -> str:
    """What stands in the docs between the code of this name and the next heading."""
    return PAGES.partition(f'"""{name}')[2].partition("\n## ")[0]


def warm_up(folder) -> None:
    """The first steps of examples/quickstart.sh, without its installation."""
    text = (ROOT / "examples" / "quickstart.sh").read_text(encoding="utf-8")
    steps = text.partition('echo "== 1.')[2].partition("# Sampling is limited")[0]
    (folder / "steps.sh").write_text(
        f'set -euo pipefail\nout=runs/quickstart seed=0\necho "== 1.{steps}'
    )
    shutil.copytree(ROOT / "examples", folder / "examples")
    bin_folder = os.path.dirname(sys.executable)
    path = f"{bin_folder}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "steps.sh"], cwd=folder, env=environ(PATH=path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def run(*arguments: str, cwd) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environ(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
