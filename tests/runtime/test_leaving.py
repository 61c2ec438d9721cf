"""How a trainer's process ends where nothing is being trained: real processes and signals."""

import signal
import subprocess
import sys
import time

import pytest

from tests.trainer.support import environ

PROGRAM = """
import sys, threading, time
from RL2.runtime import leaving

leaving._PATIENCE = 0.3
{}
with leaving.end_in_time():
    {}
"""


def run(start, end):
    text = PROGRAM.format(start, end)
    command = [sys.executable, "-c", text]
    return subprocess.run(command, env=environ(), capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize("end, status", [("pass", 0), ("sys.exit(3)", 3), ("sys.exit()", 0)])
def test_a_strangers_thread_does_not_keep_the_process(end, status):
    done = run("threading.Thread(target=time.sleep, args=(1000,), name='mine').start()", end)
    assert done.returncode == status
    assert done.stderr.startswith("threads that do not end (mine): the run has ended without them")


def test_threads_that_end_are_waited_for():
    """And so is what comes behind them."""
    start = "import atexit; atexit.register(lambda: (time.sleep(0.6), print('done')))"
    done = run(f"{start}; threading.Thread(target=time.sleep, args=(0.1,)).start()", "sys.exit(1)")
    assert (done.returncode, done.stdout, done.stderr) == (1, "done\n", "")


def test_errors_are_not_hidden():
    done = run("threading.Thread(target=time.sleep, args=(1000,)).start()", "1 / 0")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_a_trainer_is_imported(ignored):
    """Before it has imported anything that takes time."""
    text = (
        "import runpy, signal, sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'omegaconf':\n"
        "            print('here', flush=True)\n"
        "            time.sleep(2)\n"
        "            sys.exit(5)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "runpy.run_module('RL2.trainer.spo', run_name='__main__')\n"
    )
    handler = "SIG_IGN" if ignored else "default_int_handler"
    text = f"import signal\nsignal.signal(2, signal.{handler})\n{text}"
    with subprocess.Popen(
        [sys.executable, "-c", text], env=environ(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "here\n"
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    if ignored:
        assert process.returncode == 5
        return
    assert process.returncode == -signal.SIGINT and time.monotonic() - start < 2
    assert said == "Interrupted: no step was under way, nothing was saved\n"
