"""An event loop in its own thread, which runs while the main thread trains."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_CANCEL_SECONDS = 10.0  # for coroutines to clean up after themselves


class EventLoopThread:
    """An asyncio event loop in a daemon thread: requests, environments and servers live there.

    device: target of the thread's CUDA calls; a new thread would start with device 0.
    """

    def __init__(self, device: torch.device | None = None):
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task] = set()
        self._device = device
        self._thread = threading.Thread(target=self._serve, name="rollout-loop", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the background; any thread can wait for the future."""
        return asyncio.run_coroutine_threadsafe(self._tracked(coroutine), self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and wait for it. Not to be called in the loop's thread.

        An interrupt of the waiting thread (Ctrl-C) cancels the coroutine.
        """
        return self.wait(self.start(coroutine))

    @staticmethod
    def wait(future: Future[T]) -> T:
        """Wait for a future of `start`, as `run` does."""
        try:
            return future.result()
        except BaseException:
            future.cancel()  # no effect if it has ended
            raise

    def cancel(self) -> None:
        """Cancel all coroutines of `run` and `start`, and wait until they have ended."""

        async def cancel_all() -> None:
            tasks = self._tasks - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_CANCEL_SECONDS)

        asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result()

    def close(self) -> None:
        """Cancel everything, stop the loop and join the thread. May be called twice."""
        if self._loop.is_closed():
            return
        self.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _tracked(self, coroutine: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            return await coroutine
        finally:
            self._tasks.discard(task)

    def _serve(self) -> None:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            if left:
                self._loop.run_until_complete(asyncio.wait(left, timeout=_CANCEL_SECONDS))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())


def in_thread(function: Callable[[], T], name: str) -> Future[T]:
    """Call a function in a daemon thread, so that one that hangs does not hold up the exit."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised again by `result`
            future.set_exception(error)

    threading.Thread(target=call, name=name, daemon=True).start()
    return future
