"""The run: names, folders, rules."""

import pytest

from RL2.config import validate
from RL2.config.checks.trainer import check_trackers_agree
from RL2.config.trackers import trackers_of
from RL2.runtime.errors import ConfigError


def test_health(message, composed):
    low, high = "trainer.health.min_entropy=2.0", "trainer.health.max_entropy=1.0"
    text = message("spo", low, high)
    assert text.startswith(f"{low}: must be below {high}; ")
    off = [f"trainer.health.{key}=null" for key in composed("spo").trainer.health]
    validate(composed("spo", *(line for line in off if "patience" not in line)), 1)


def test_trackers_and_use_wandb_do_not_contradict(message, composed):
    for trackers, use_wandb, has in (("[wandb]", "false", "has"), ("[mlflow]", "true", "does not")):
        text = message("spo", f"trainer.trackers={trackers}", f"trainer.use_wandb={use_wandb}")
        assert text.startswith(f"trainer.use_wandb={use_wandb}: trainer.trackers=") and has in text
    config = composed("spo")
    for trackers, use_wandb, found in (
        (None, None, ["wandb"]), (None, True, ["wandb"]), (None, False, []), ([], None, []),
        (["mlflow", "jsonl", "mlflow"], False, ["mlflow"]), (["wandb"], True, ["wandb"]),
    ):  # fmt: skip
        config.trainer.trackers, config.trainer.use_wandb = trackers, use_wandb
        check_trackers_agree(config.trainer)
        assert trackers_of(config.trainer) == found


def test_trainer(message, composed, workdir):
    names = [
        "a/b",
        "..",
        "''",
        "'a\\b'",
        "../x",
        "/x",
        ".x",
        "-x",
        "' x'",
        "x" * 256,
        "'" + "é" * 128 + "'",
    ]
    for name in [*names, "'" + "é" * 128 + "'"]:
        assert "names a folder" in message("spo", f"trainer.experiment_name={name}")
    for key, problem in (("experiment_name", "names a folder"), ("save_dir", "cannot be a folder")):
        for control in ('"a\nb"', '"a\0b"', '"a\x1bb"'):  # the command escapes what it shows
            with pytest.raises(ConfigError, match=problem):
                validate(composed("spo", f"trainer.{key}={control}"), 1)
    validate(composed("spo", "trainer.experiment_name=" + "x" * 255), 1)
    for folder in ("''", "' '", "x" * 300, "x/" * 3000):
        text = message("spo", f"trainer.save_dir={folder}")
        assert text.startswith("trainer.save_dir=") and "cannot be a folder" in text
    for project in ("''", "a/b", "x" * 129):
        text = message("spo", f"trainer.project={project}")
        assert "not a name that wandb accepts" in text and "trainer.use_wandb=false" in text
    validate(composed("spo", "trainer.project=a/b", "trainer.use_wandb=false"), 1)
    validate(composed("spo", "trainer.project=a/b", "trainer.trackers=[mlflow]"), 1)
    assert "is a file" in message("sft", "trainer.save_dir=env.py")
    text = message("sft", "trainer.load_ckpt_from=ckpts/nothing")
    assert text.startswith("trainer.load_ckpt_from=ckpts/nothing: no such folder")
    validate(composed("sft", "trainer.load_ckpt_from=latest"), 1)
    (workdir / "step10").mkdir()
    assert "is not a checkpoint" in message("sft", "trainer.load_ckpt_from=step10")
    (workdir / "step10" / "manifest.json").touch()
    validate(composed("sft", "trainer.load_ckpt_from=step10"), 1)
