"""How a process says what went wrong, and ends."""

import runpy

import pytest

from RL2.runtime.errors import ConfigError
from RL2.trainer.failing import exit_of_others, fail


def test_the_exit_of_others_is_no_end_of_a_run(tmp_path):
    (tmp_path / "theirs.py").write_text("def f():\n    exit(0)\n")
    theirs = runpy.run_path(str(tmp_path / "theirs.py"))["f"]
    with pytest.raises(SystemExit) as caught:
        theirs()
    said = str(exit_of_others(caught.value))
    assert said.startswith(f"exit(0) was called at {tmp_path}/theirs.py:2 in the midst of the run")
    with pytest.raises(SystemExit) as caught:
        fail(ConfigError("x"))
    assert exit_of_others(caught.value) is None and caught.value.code == 1
