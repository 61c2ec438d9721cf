"""examples/gsm8k_cpu.sh from its arguments to the picture, at a size that takes seconds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"


@pytest.fixture
def script(tmp_path) -> Path:
    """The script beside an `_install.sh` that takes the Python of this test and installs nothing.

    (`tests/run.sh` calls the real one before all tests.)
    """
    folder = tmp_path / "examples"
    folder.mkdir()
    for name in ("gsm8k_cpu.sh", "_functions.sh"):
        shutil.copy(ROOT / "examples" / name, folder)
    interpreter = Path(sys.executable).parent
    (folder / "_install.sh").write_text(
        f'cd "{ROOT}"\nexport PATH="{interpreter}:$PATH" PYTHONPATH="{ROOT}"\n'
    )
    return folder / "gsm8k_cpu.sh"


def bash(script: Path, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True,
    )  # fmt: skip


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason=f"needs the real GSM8K in {GSM8K}")
def test_real_text_from_one_file_to_the_picture(script, tmp_path):
    rows = GSM8K.read_text().splitlines()[:40]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    out = tmp_path / "out"
    done = bash(
        script, "rows.jsonl",
        "train_data.prompts_per_rollout=8", "rollout.train_sampling_params.max_new_tokens=8",
        "trainer.max_steps=2", "trainer.test_freq=2", "trainer.num_threads=1",
        cwd=tmp_path, OUT=str(out), MODEL="--vocab 400 --width 32 --layers 1",
        SFT="data.batch_size=12 trainer.num_threads=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    sft, spo = (read(out / run / "metrics.jsonl") for run in ("sft", "spo"))
    assert len(sft) == 3 and sft[-1]["actor/loss"] < sft[0]["actor/loss"]
    # Not a word of sense and so no correct sample: both steps are passed over, nothing breaks.
    assert [row["step"] for row in spo] == [0, 1, 2]
    assert [row["actor/skipped"] for row in spo[1:]] == [1.0, 1.0]
    assert [row["test/score"] for row in (spo[0], spo[2])] == [0.0, 0.0]

    questions = [json.loads(row)["question"] for row in rows]
    tested = read(out / "spo" / "rollouts" / "step000000_test.jsonl")
    trained = read(out / "spo" / "rollouts" / "step000001_train.jsonl")
    assert len(tested) == 4 and len(trained) == 8  # the last tenth of 40 rows is held out
    for sample, at in [(s, questions[36:]) for s in tested] + [(s, questions) for s in trained]:
        assert sum(question in sample["prompt"] for question in at) == 1
    for sample in trained:
        assert not any(question in sample["prompt"] for question in questions[36:])

    before = AutoModelForCausalLM.from_pretrained(out / "sft" / "final").state_dict()
    after = AutoModelForCausalLM.from_pretrained(out / "spo" / "final").state_dict()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    assert (out / "spo.png").stat().st_size > 10_000
    assert "test before" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl is not a file, split@name:config or key=value"),
        (["train@owner/name:main"], "train@owner/name:main: name the test split as well"),
        (["a@b/c", "d@b/c", "e@b/c"], "3 data sets, of which the third is e@b/c"),
    ],
)
def test_bad_arguments_stop_before_anything_runs(script, tmp_path, arguments, message):
    done = bash(script, *arguments, cwd=tmp_path, OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert message in done.stderr and "usage: bash examples/gsm8k_cpu.sh" in done.stderr
    assert not (tmp_path / "out").exists()
