"""Files that a run was started with may change, shrink or go: it goes on with what it has read."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from RL2.trainer import loop
from tests.trainer.support import (
    ROOT,
    environ,
    lasting,
    overrides,
    train,
    write_files,
    write_model,
)

LOSS = "def loss(logps, advantages):\n    return -logps * advantages\n"
# The process that is asked first ends, so that another one is started in mid-run.
CRASH = """
import os, pathlib
import inputs_helper
async def step(state, action, extra_info):
    try:
        pathlib.Path(__file__).parents[1].joinpath("crashed").touch(exist_ok=False)
        os._exit(3)
    except FileExistsError:
        pass
    return inputs_helper.judge(action)
"""
HELPER = """
def judge(action):
    good = float(sum(map(ord, action)) % 2)
    return {"next_state": None, "reward": good, "score": good, "done": True}
"""


def truncate(files: Path) -> None:
    for path in [path for path in files.rglob("*") if path.is_file()]:
        path.write_bytes(b"")


def overwrite(files: Path) -> None:
    for model in ("model", "reference"):
        write_model(files / model, std=0.1)
        (files / model / "chat_template.jinja").write_text("{{ 'changed' }}")
        (files / model / "generation_config.json").write_text('{"eos_token_id": 7}')
    rows = (files / "rows.jsonl").read_text()
    (files / "rows.jsonl").write_text(rows.replace("=", "?"))
    for name in ("env.py", "inputs_helper.py"):
        (files / name).write_text((files / name).read_text().replace("% 2", "% 3"))
    (files / "loss.py").write_text(LOSS.replace("-logps", "logps"))


SPOILS = {"truncated": truncate, "overwritten": overwrite, "removed": shutil.rmtree}


def run(files: Path, out: Path, monkeypatch, spoil=None) -> tuple[list[dict], dict[str, bytes]]:
    """Rows of metrics without times, and the files of `final`; `spoil` strikes before step 1."""
    files.mkdir()
    write_files(files)
    write_model(files / "reference", std=0.3)
    (files / "loss.py").write_text(LOSS)
    (files / "env.py").write_text(CRASH)
    (files / "inputs_helper.py").write_text(HELPER)
    monkeypatch.syspath_prepend(str(files))
    monkeypatch.chdir(files)
    train_ = loop.Trainer.train

    def train_on_spoilt(self):
        if spoil is not None:
            spoil(files)
        train_(self)

    monkeypatch.setattr(loop.Trainer, "train", train_on_spoilt)
    rows = train(
        files, "spo", out, actor__loss__import_path=f"{files}/loss.py:loss", actor__kl__coef=0.1,
        actor__kl__type="loss", ref_actor__model_name=files / "reference", trainer__max_steps=2,
        rollout__env_workers=2,
    )  # fmt: skip
    final = {path.name: path.read_bytes() for path in (out / "final").iterdir()}
    return [lasting(row) for row in rows], final


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        return run(folder / "files", folder / "out", patch)


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_run_needs_its_files_no_more(tmp_path, monkeypatch, undisturbed, spoil):
    rows, final = run(tmp_path / "files", tmp_path / "out", monkeypatch, SPOILS[spoil])
    assert rows == undisturbed[0]
    assert final.keys() == undisturbed[1].keys()
    assert [name for name in final if final[name] != undisturbed[1][name]] == []


IMPORTS = """
import sys
from RL2.trainer import loop
from tests.trainer.support import composed
from RL2.trainer.main import launch
train = loop.Trainer.train
def counted(self):
    before = {*sys.modules}
    train(self)
    print("imported:", sorted({*sys.modules} - before))
loop.Trainer.train = counted
launch(composed(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.slow
def test_nothing_is_imported_in_mid_run(tmp_path):
    """What is edited or uninstalled until the end must not cost the model."""
    lines = overrides(
        write_files(tmp_path), "spo", tmp_path / "out", actor__lora__rank=2, trainer__max_steps=1
    )
    (tmp_path / "run.py").write_text(IMPORTS)
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py", "spo", *lines], env=environ(), capture_output=True,
        text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert "imported: []" in done.stdout, done.stdout + done.stderr
