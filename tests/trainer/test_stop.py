"""Signals ask once; the second one is as if nobody listened."""

import os
import signal
import threading

import pytest

from RL2.trainer.stop import StopRequest, stop_signals

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
