"""Signals ask once; the second one is as if nobody listened."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from RL2.trainer.stop import StopRequest, _may_be_launcher, stop_signals

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_fills_the_request_and_calls_back(number):
    before = {each: signal.getsignal(each) for each in SIGNALS}
    called = []
    with stop_signals() as request:
        assert request.number is None
        request.call(lambda: called.append("first"))
        os.kill(os.getpid(), number)
        assert request.number == number and called == ["first"]
        request.call(lambda: called.append("late"))  # who asks later is called at once
        assert called == ["first", "late"]
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def test_the_second_signal_interrupts():
    with pytest.raises(KeyboardInterrupt), stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_given_back_after_an_error():
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with pytest.raises(ValueError), stop_signals():
        raise ValueError
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def test_another_thread_gets_a_request_that_stays_empty():
    requests = []

    def body():
        with stop_signals() as request:
            requests.append(request)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert isinstance(requests[0], StopRequest) and requests[0].number is None


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs /proc (Linux)")
@pytest.mark.parametrize(
    ("variable", "expected"), [("TORCHELASTIC_RUN_ID", "True"), ("X", "False")]
)
def test_a_launcher_is_python_or_a_script_that_it_runs(variable, expected):
    """Not what adopts a process whose launcher was killed before it could look."""
    assert _may_be_launcher(os.getpid()) and not _may_be_launcher(2**22 + 1)
    code = "import os; from RL2.trainer.stop import _may_be_launcher as f; print(f(os.getppid()))"
    told = subprocess.run(
        ["sh", "-c", '"$0" -c "$1"; exit', sys.executable, code],
        env=os.environ | {variable: "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.strip() == expected
