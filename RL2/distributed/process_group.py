"""The default process group: gloo for CPU tensors, nccl beside it where there is CUDA."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

# A sweep starts one run after the other in the same processes, and torchrun's store remembers the
# keys of all of them.
_RUNS = itertools.count()

# How long a rank waits for another in a collective. Ranks that do not drive an engine wait in one
# for as long as the others generate, which takes hours for long answers of large models; torch's
# 10 to 30 minutes would end the run. A rank that dies does not cost this time: torchrun then ends
# all others.
_TIMEOUT = timedelta(days=1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Initialise the default group for the life of a run and yield this rank's device.

    Started by `torchrun` the group spans all its processes; started by plain `python -m` it is a
    group of one, so that both commands run the same code.

    Args:
        device: `cpu` or `cuda`. With `cuda` every rank owns the GPU of its local rank and
            collectives on CPU tensors still go through gloo.
    """
    store, own_rank, n_ranks = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, own_rank, n_ranks = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"run{next(_RUNS)}", store)
    group = {"store": store, "rank": own_rank, "world_size": n_ranks, "timeout": _TIMEOUT}
    if device == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(own)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=own, **group)
    else:
        own = torch.device("cpu")
        dist.init_process_group("gloo", **group)
    try:
        yield own
    finally:
        dist.destroy_process_group()


def second_group() -> dist.ProcessGroup | None:
    """A gloo group over all ranks beside the default one (a collective); None for a single rank.

    Collectives of one group must come in the same order on every rank, so a thread that works
    beside the main one needs a group of its own.
    """
    return dist.new_group(backend="gloo", timeout=_TIMEOUT) if world_size() > 1 else None
