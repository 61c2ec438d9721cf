"""The default process group: gloo for CPU tensors, nccl beside it where there is CUDA."""

import contextlib
import itertools
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

# A sweep starts one run after the other in the same processes, and torchrun's store remembers the
# keys of all of them.
_RUNS = itertools.count()


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
    group = {"store": store, "rank": own_rank, "world_size": n_ranks}
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
