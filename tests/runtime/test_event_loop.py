import asyncio
import threading
import time
from concurrent.futures import CancelledError

import pytest

from RL2.runtime.event_loop import EventLoopThread, in_thread


@pytest.fixture
def loop():
    loop = EventLoopThread()
    yield loop
    loop.close()


def test_it_runs_beside_the_thread_that_started_it(loop):
    async def name():
        return threading.current_thread().name

    assert loop.run(name()) == "rollout-loop" != threading.current_thread().name
    ticks = []

    async def tick():
        while True:
            ticks.append(1)
            await asyncio.sleep(0.001)

    future = loop.start(tick())
    time.sleep(0.1)  # this thread does not wait for the loop
    assert len(ticks) > 3 and not future.done()


def test_errors_come_back(loop):
    async def fail():
        raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        loop.run(fail())


def test_an_interrupt_of_who_waits_cancels_the_coroutine(loop, monkeypatch):
    ended = threading.Event()
    begun = threading.Event()

    async def work():
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    def interrupted(future, timeout=None):
        begun.wait(5)
        raise KeyboardInterrupt

    start = loop.start

    def start_interrupted(coroutine):
        future = start(coroutine)
        future.result = lambda timeout=None: interrupted(future)
        return future

    monkeypatch.setattr(loop, "start", start_interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run(work())
    assert ended.wait(5)


def test_close_cancels_what_runs_and_ends_the_thread():
    loop = EventLoopThread()
    cleaned = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)  # cleaning up may take a moment
            cleaned.append(True)

    async def background():
        asyncio.create_task(work())  # nobody waits for this one

    waiting = loop.start(work())
    loop.run(background())
    thread = loop._thread
    loop.close()
    loop.close()
    assert cleaned == [True, True] and not thread.is_alive()
    with pytest.raises(CancelledError):
        waiting.result(0)


def test_in_thread_gives_results_and_errors():
    assert in_thread(lambda: 3, "three").result(5) == 3
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda: 1 / 0, "none").result(5)
