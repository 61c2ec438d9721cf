"""Data sets."""

import os

import pytest

from RL2.config import validate


def test_data_path(message, composed, workdir):
    (workdir / "empty.jsonl").touch()
    (workdir / "rows.jsonl").write_text("{}\n")
    (workdir / "rows.txt").write_text("x\n")
    (workdir / "folder.json").mkdir()
    for path in ("missing.jsonl", "train@missing.csv", "./missing", "~/missing.parquet"):
        text = message("spo", f"train_data.path='{path}'")
        assert text.startswith(f"train_data.path={path}: no such file in {workdir}")
    assert message("sft", "data.path=missing.json").startswith("data.path=missing.json")
    assert message("sft", "data.batch_size=0").startswith("data.batch_size=0: must be 1 or more")
    evaluated = "trainer.test_freq=1"
    assert "test_data.path=x.json" in message("spo", "test_data.path=x.json", evaluated)
    assert "is empty" in message("spo", "train_data.path=empty.jsonl")
    assert "is a folder" in message("spo", "train_data.path=folder.json")
    assert "unknown file type" in message("spo", "train_data.path=./rows.txt")
    for path in ("openai/gsm8k", "train", "", "a@b@c", "train@x/y/z"):
        assert "neither a file" in message("spo", f"train_data.path='{path}'")
    for path, use in {
        "openai/gsm8k": "train_data.path='train@openai/gsm8k[:config]'",
        "openai/gsm8k:main": "train_data.path='train@openai/gsm8k:main'",
        "gsm8k": "train_data.path='train@gsm8k[:config]'",
    }.items():
        assert message("spo", f"train_data.path='{path}'").endswith(f"needs its split: {use}")
    assert message("spo", "test_data.path=a/b", "trainer.test_freq=1").endswith(
        "'test@a/b[:config]'"
    )
    for path in ("rows.jsonl", "train@rows.jsonl", "train[:10]@openai/gsm8k:main", "train@gsm8k"):
        validate(composed("spo", f"train_data.path='{path}'"), 1)
    validate(composed("spo", "train_data.path=null"), 1)


def test_paths_that_are_no_files(message, workdir):
    os.mkfifo(workdir / "pipe.jsonl")
    for path in ("pipe.jsonl", "train@pipe.jsonl", "/dev/null"):
        text = message("spo", f"train_data.path='{path}'")
        assert text == f"train_data.path={path}: is a pipe or a device; write the rows to a file"
    assert "no such file" in message("spo", "train_data.path=" + "x" * 300 + ".jsonl")
    assert "no such folder" in message("spo", "actor.model_name=" + "x" * 300)
    for path in ("x" * 300, "~nobody-of-this-name/x.py"):
        assert "no such file" in message("spo", f"rollout.env_path='{path}'")
    text = message("spo", "rollout.engine=vllm", "rollout.server_python=/")
    assert text.startswith("rollout.server_python=/: not an executable file")


@pytest.mark.parametrize("separator", ["\\n", "a\\tb", "\\r\\n"])
def test_a_line_break_that_the_shell_did_not_make(message, separator):
    text = message("sft", f"data.separator='{separator}'")
    assert text.startswith(f"data.separator={separator}: has a backslash and a letter")
    assert text.endswith("""in bash, write one as $'data.separator="\\n"'""")


@pytest.mark.parametrize("separator", ["", " ", "\n", "\n\n### Answer:\n", "\\"])
def test_separators(composed, separator):
    config = composed("sft")
    config.data.separator = separator
    validate(config, 1)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["data.test_ratio=1.0"], "data.test_ratio=1.0: must be 0 or more and below 1"),
        (["data.test_ratio=0.1"], "data.test_ratio=0.1: has no effect without trainer.test_freq"),
        (["data.test_path=rows.jsonl"],
         "data.test_path=rows.jsonl: has no effect without trainer.test_freq"),
        (["trainer.test_freq=2"],
         "trainer.test_freq=2: has no effect without rows to evaluate; set data.test_ratio to"),
        (["trainer.test_freq=2", "data.test_ratio=0.1", "data.test_path=rows.jsonl"],
         "data.test_ratio=0.1: has no effect with data.test_path=rows.jsonl"),
        (["trainer.test_freq=2", "data.test_path=no.jsonl"],
         "data.test_path=no.jsonl: no such file"),
    ],
)  # fmt: skip
def test_held_out_rows(message, workdir, lines, text):
    (workdir / "rows.jsonl").write_text("{}\n")
    assert message("sft", *lines).startswith(text)
