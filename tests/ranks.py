"""Run a function on n gloo ranks, each a process of its own that serves all tests."""

import atexit
import gc
import os
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import psutil
import torch
import torch.multiprocessing as mp

from RL2.distributed import process_group
from RL2.engines.servers.addresses import free_port

# gloo keeps a thread for each group that there ever was, which never sleeps for long.
_MOST_THREADS = 50
_POOLS: dict[int, list[tuple[mp.Process, Connection]]] = {}


def _serve(rank: int, n_ranks: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(n_ranks), LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(n_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    gc.freeze()  # what is imported
    with process_group("cpu"):
        while (task := pipe.recv()) is not None:
            function, args = task
            try:
                good, answer = True, function(*args)
            except BaseException as error:  # the test shall see it, whatever it is
                good, answer = False, f"{type(error).__name__}: {error}"
            pipe.send((good, answer, len(psutil.Process().threads())))


def forking() -> ForkServerContext:
    """Its processes come from a server that has done the imports, which take seconds."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["RL2.trainer.loop"])
    return context


def _start(n_ranks: int) -> list[tuple[mp.Process, Connection]]:
    context, port = forking(), free_port()
    pool = []
    for rank in range(n_ranks):
        own, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, n_ranks, port, theirs), daemon=True)
        process.start()
        pool.append((process, own))
    return pool


def _stop(*which: int) -> None:
    """End the pools of so many ranks, or all."""
    for n_ranks in which or [*_POOLS]:
        for process, _ in _POOLS.pop(n_ranks):
            process.kill()


atexit.register(_stop)


def run_on_ranks(
    n_ranks: int, function: Callable, *args: Any, new: bool = False
) -> list[Any]:  # fmt: skip
    """Results of `function(*args)` by rank; a group of one runs in this process, if not `new`:
    then all ranks are processes that have done nothing before.

    The function must be importable (module level). An exception on any rank is a RuntimeError
    here, and the ranks, whose collectives may be out of step then, are replaced.
    """
    if new and n_ranks in _POOLS:
        _stop(n_ranks)
    if n_ranks == 1 and not new:
        with process_group("cpu"):
            return [function(*args)]
    if n_ranks not in _POOLS:
        _POOLS[n_ranks] = _start(n_ranks)
    pool = _POOLS[n_ranks]
    for _, pipe in pool:
        pipe.send((function, args))
    # In the order in which they come: the ranks that wait for one that failed never answer.
    answers, waiting = {}, {pipe: rank for rank, (_, pipe) in enumerate(pool)}
    n_threads = {}
    while waiting:
        for pipe in connection.wait([*waiting], timeout=0.5):
            rank = waiting.pop(pipe)
            try:
                good, answers[rank], n_threads[rank] = pipe.recv()
            except EOFError:
                pool[rank][0].join()
                good, answers[rank] = False, f"died with exit code {pool[rank][0].exitcode}"
            if not good:
                _stop()
                raise RuntimeError(f"rank {rank}: {answers[rank]}")
    if max(n_threads.values()) > _MOST_THREADS:
        _stop(n_ranks)
    return [answers[rank] for rank in range(n_ranks)]
