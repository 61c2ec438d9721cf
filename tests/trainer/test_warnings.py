"""A run with the defaults, on the pinned versions, warns of nothing."""

import pytest

from tests.trainer.support import command, overrides, write_files

# What tiny runs set though its default matters here.
SET_FOR_SPEED = ("actor.gradient_checkpointing=", "actor.use_liger_kernel=")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["spo", "ppo", "sft"])
def test_a_default_run_prints_no_warning(tmp_path, trainer):
    """Neither python's warnings, as a user sees them, nor lines about keys that were never set."""
    files = write_files(tmp_path)
    changes = {"trainer__max_steps": 2, "trainer__save_freq": 1}
    if trainer != "sft":
        changes |= {
            "test_data__path": files / "rows.jsonl", "test_data__max_examples": 4,
            "trainer__test_freq": 1,
        }  # fmt: skip
    lines = overrides(files, trainer, tmp_path / "run", **changes)
    lines = [line for line in lines if not line.startswith(SET_FOR_SPEED)]
    done = command(trainer, lines, fresh=trainer == "ppo")  # the imports of all are the same
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "deprecated" not in done.stderr, done.stderr
    assert "needs CUDA" not in done.stderr, done.stderr
