"""Signals ask once; the second one is as if nobody listened."""

import faulthandler
import os
import signal
import subprocess
import sys
import threading

import pytest

from RL2.runtime.stop import NUMBERS, OTHERS, StopRequest, _may_be_launcher, stop_signals


@pytest.fixture(autouse=True)
def listening(monkeypatch):
    """As a shell starts a command in the foreground; those in the background ignore some."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = {number: signal.getsignal(number) for number in NUMBERS}
    for number in NUMBERS:
        is_int = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_int else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    return {number: signal.getsignal(number) for number in NUMBERS}


def test_all_that_end_a_process_without_a_fault_of_its_own():
    names = {signal.Signals(number).name for number in NUMBERS}
    assert {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"} <= names


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: signal.Signals(number).name)
def test_a_signal_fills_the_request_and_calls_back(number):
    before = handlers()
    called = []
    with stop_signals() as request:
        assert request.number is None
        request.call(lambda: called.append("first"))
        os.kill(os.getpid(), number)
        assert request.number == number and called == ["first"]
        request.call(lambda: called.append("late"))  # who asks later is called at once
        assert called == ["first", "late"]
    assert handlers() == before


def test_timers_and_the_like_where_nobody_uses_them(monkeypatch):
    """Of a library they are, which has its own handler."""
    monkeypatch.setattr(faulthandler, "is_enabled", lambda: False)  # pytest's, of SIGABRT
    before = {number: signal.getsignal(number) for number in OTHERS}  # and its SIGALRM
    names = {"SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGABRT", "SIGSTKFLT", "SIGRTMIN"}
    assert {getattr(signal, name) for name in names if hasattr(signal, name)} <= {*OTHERS}
    own = []
    try:
        for number in OTHERS:
            signal.signal(number, signal.SIG_DFL)
            with stop_signals() as request:
                os.kill(os.getpid(), number)
                assert request.number == number
            assert signal.getsignal(number) == signal.SIG_DFL
            signal.signal(number, lambda number, _: own.append(number))
            with stop_signals() as request:
                os.kill(os.getpid(), number)
                assert request.number is None
        assert own == [*OTHERS]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_abort_of_our_own_is_none_of_them():
    """In C, where it goes on to end the process when the handler returns."""
    code = "from RL2.runtime.stop import stop_signals\nimport os\nwith stop_signals(): os.abort()"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONFAULTHANDLER": ""})
    assert done.returncode == -signal.SIGABRT


def test_the_same_signal_again_interrupts():
    with pytest.raises(KeyboardInterrupt), stop_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_what_comes_several_times_for_one_reason_is_one_request():
    """A terminal that closes says so to its session and to its jobs, a limit every second, and
    systemd sends SIGTERM and SIGHUP."""
    called = []
    with stop_signals() as request:
        request.call(lambda: called.append(1))
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGXCPU):
            os.kill(os.getpid(), number)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGXCPU)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert request.number == signal.SIGHUP and called == [1]


def test_torchrun_passes_on_what_has_come_already(monkeypatch):
    """A scheduler's SIGTERM goes to all processes of a job, and torchrun's to its own."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with stop_signals() as request:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert request.number == signal.SIGTERM


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: signal.Signals(number).name)
def test_what_is_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with stop_signals() as request:
        os.kill(os.getpid(), number)
        assert request.number is None
    assert signal.getsignal(number) == signal.SIG_IGN


def test_handlers_are_given_back_after_an_error():
    before = handlers()
    with pytest.raises(ValueError), stop_signals():
        raise ValueError
    assert handlers() == before


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
    code = "import os; from RL2.runtime.stop import _may_be_launcher as f; print(f(os.getppid()))"
    told = subprocess.run(
        ["sh", "-c", '"$0" -c "$1"; exit', sys.executable, code],
        env=os.environ | {variable: "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.strip() == expected
