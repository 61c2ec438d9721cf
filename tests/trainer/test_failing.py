"""How a process says what went wrong, and ends."""

import runpy

import pytest

from RL2.runtime.errors import ConfigError
from RL2.trainer.failing import fail, report_errors, unexpected_exit


@pytest.fixture
def theirs(tmp_path):
    (tmp_path / "theirs.py").write_text("def f():\n    exit(0)\n")
    return runpy.run_path(str(tmp_path / "theirs.py"))["f"]


def test_the_exit_of_others_is_no_end_of_a_run(tmp_path, theirs):
    with pytest.raises(SystemExit) as caught:
        theirs()
    said = str(unexpected_exit(caught.value))
    assert said.startswith(f"exit(0) was called at {tmp_path}/theirs.py:2 during the run")
    with pytest.raises(SystemExit) as caught:
        fail(ConfigError("x"))
    assert unexpected_exit(caught.value) is None and caught.value.code == 1


def said(error_or_function, capfd, early):
    """Exit status and what stands on stderr."""
    with pytest.raises(SystemExit) as caught, report_errors(early):
        if isinstance(error_or_function, Exception):
            raise error_or_function
        error_or_function()
    return caught.value.code, capfd.readouterr().err


@pytest.mark.parametrize("early", [False, True])
def test_what_a_body_raises_is_said_once(theirs, capfd, early):
    code, text = said(ConfigError("a.b=\n3: must be 2"), capfd, early)
    assert code == 1 and text.startswith("ConfigError: a.b=") and text.count("\n") == 1
    code, text = said(KeyError("slip"), capfd, early)
    assert code == 1 and text.startswith("Traceback") and text.endswith("KeyError: 'slip'\n")
    code, text = said(theirs, capfd, early)
    assert code == 1 and text.startswith("TrainingError: exit(0) was called at ")


def test_what_was_said_already_is_not_said_again(capfd):
    code, text = said(lambda: fail(ConfigError("x")), capfd, early=False)
    assert (code, text) == (1, "ConfigError: x\n")
