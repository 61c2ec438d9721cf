"""The default process group: gloo for CPU tensors, nccl beside it where there is CUDA."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from RL2.distributed.alive import lost_connection, watching
from RL2.distributed.rendezvous import WAIT, find_store, meet, next_prefix
from RL2.distributed.same_start import Facts
from RL2.runtime.errors import TrainingError

# How long a rank waits for another in a collective. Ranks that do not drive an engine wait in one
# for as long as the others generate, which takes hours for long answers of large models; torch's
# 10 to 30 minutes would end the run. A rank that dies does not cost this time: torchrun then ends
# all others of its machine, and those of other machines hear nothing of it any more (`alive`).
_TIMEOUT = timedelta(days=1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(
    device: str, rank_timeout: float | None = None, facts: Facts | None = None
) -> Iterator[torch.device]:
    """Initialise the default group for the life of a run and yield this rank's device.

    Started by `torchrun` the group spans all its processes; started by plain `python -m` it is a
    group of one, so that both commands run the same code.

    Args:
        device: `cpu` or `cuda`. With `cuda` every rank owns the GPU of its local rank and
            collectives on CPU tensors still go through gloo.
        rank_timeout: seconds without a sign of life from another rank after which this process
            ends; None is never.
        facts: what this rank was started with.

    Raises:
        ConfigError, TrainingError: the ranks do not find each other or were started with different
            things, or the body has lost one.
    """
    store, own_rank, n_ranks = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store = find_store()
        own_rank, n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own_store, prefix = store, next_prefix()
    store = dist.PrefixStore(prefix, store)
    ranks = meet(store, own_rank, n_ranks, facts)
    group = {"store": store, "rank": own_rank, "world_size": n_ranks}
    group["timeout"] = timedelta(seconds=WAIT)  # for connecting
    with contextlib.ExitStack() as stack:
        if n_ranks > 1 and rank_timeout is not None:
            alive = dist.PrefixStore(prefix, own_store.clone())
            stack.enter_context(watching(alive, own_rank, ranks, rank_timeout))
        try:
            if device == "cuda":
                own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
                torch.cuda.set_device(own)
                _connect("cpu:gloo,cuda:nccl", ranks[own_rank].host, device_id=own, **group)
            else:
                own = torch.device("cpu")
                _connect("gloo", ranks[own_rank].host, **group)
            _set_pg_timeout(_TIMEOUT)
            yield own
        except RuntimeError as error:
            lost = lost_connection(error, own_rank, ranks[own_rank].host)
            if lost is None:
                raise
            raise lost from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _connect(backends: str, host: str, **group: Any) -> None:
    """`init_process_group`; TrainingError where the ranks have met, but do not reach each other."""
    try:
        dist.init_process_group(backends, **group)
    except RuntimeError as error:
        if lost_connection(error, group["rank"], host) is not None:
            raise
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TrainingError(
            f"rank {group['rank']} on {host}: the ranks have met, but cannot be connected "
            f"({'; '.join(dict.fromkeys((said[0], said[-1])))}); look at GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME, and that no two ranks have one GPU"
        ) from error


def second_group() -> dist.ProcessGroup | None:
    """A gloo group over all ranks beside the default one (a collective); None for a single rank.

    Collectives of one group must come in the same order on every rank, so a thread that works
    beside the main one needs a group of its own.
    """
    return dist.new_group(backend="gloo", timeout=_TIMEOUT) if world_size() > 1 else None
