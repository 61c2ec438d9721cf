"""Ranks that live in threads of one process, on a real store."""

import contextlib
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from RL2.distributed.alive import lost_connection, watching, whereabouts
from RL2.distributed.rendezvous import Rank
from RL2.runtime.errors import TrainingError

LIMIT = 1.0
RANKS = [Rank("ant"), Rank("bee"), Rank("cat")]


@pytest.fixture
def store():
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )


class Several:
    """`watching` on several ranks; `reasons` of those that would have ended."""

    def __init__(self, store, ranks=RANKS):
        self.reasons = {}
        self._stacks = [contextlib.ExitStack() for _ in ranks]
        for rank in range(len(ranks)):
            store.set(f"alive/{rank}", "0")
        for rank, stack in enumerate(self._stacks):
            watch = watching(
                store.clone(), rank, ranks, LIMIT, end=lambda text, r=rank: self._end(r, text)
            )
            stack.enter_context(watch)

    def _end(self, rank, text):
        self.reasons[rank] = text

    def leave(self, rank):
        """As a process that is done."""
        self._stacks[rank].close()

    def vanish(self, rank):
        """As one that is not there any more."""
        with contextlib.suppress(ValueError):
            with self._stacks[rank]:
                raise ValueError

    def wait(self, ranks, seconds=30):
        end = time.monotonic() + seconds
        while not self.reasons.keys() >= set(ranks):
            assert time.monotonic() < end, self.reasons
            time.sleep(0.05)


def test_who_lives_may_be_busy_for_long_and_leave(store):
    several = Several(store)
    time.sleep(2 * LIMIT)
    several.leave(1)
    time.sleep(2 * LIMIT)
    several.leave(0)
    several.leave(2)
    assert several.reasons == {}


@pytest.mark.parametrize("gone", [0, 1])
def test_all_others_name_who_is_silent(store, gone):
    several = Several(store)
    several.vanish(gone)
    left = {0, 1, 2} - {gone}
    several.wait(left)
    for rank in left:
        text = several.reasons[rank]
        assert f"no sign of life from rank {gone} on {RANKS[gone].host} for 1 s" in text
        assert f"rank {rank} on {RANKS[rank].host} was " in text and "\n" not in text
        several.leave(rank)


def test_where_the_main_thread_is():
    told = []
    thread = threading.Thread(target=lambda: told.append(whereabouts()))
    thread.start()
    thread.join()
    assert told == ["starting"]


@pytest.mark.parametrize(
    "text",
    [
        "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [1.2]",
        "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv",
    ],
)
def test_what_gloo_says_of_a_peer_that_is_gone(text):
    lost = lost_connection(_raised(RuntimeError(text)), 1, "bee")
    assert isinstance(lost, TrainingError) and "\n" not in str(lost)
    assert str(lost).startswith(
        "rank 1 on bee lost another rank while it was starting (RuntimeError"
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/x.cc:1] op.preamble.length <= op.nbytes. 12 vs 4"),  # ours to mend
        RuntimeError("Connection reset by peer"),  # of an environment
        TrainingError("gloo: Connection closed by peer"),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert lost_connection(_raised(error), 0, "ant") is None


def _raised(error):
    try:
        raise error
    except RuntimeError as caught:
        return caught
