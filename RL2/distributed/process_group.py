"""The default process group: gloo for CPU tensors, and nccl for CUDA."""

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
# 10 to 30 minutes would end the run. A dead rank is noticed sooner: torchrun ends all others on its
# machine, and ranks on other machines miss their signs of life (`alive`).
_TIMEOUT = timedelta(days=1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(
    device: str, rank_timeout: float | None = None, facts: Facts | None = None
) -> Iterator[torch.device]:
    """Initialise the default group for the duration of a run and yield this rank's device.

    With `torchrun` the group spans all its processes; with plain `python -m` it is a group of one,
    so that both commands run the same code.

    Args:
        device: `cpu` or `cuda`. With `cuda` every rank uses the GPU of its local rank, and
            collectives on CPU tensors still use gloo.
        rank_timeout: seconds without a sign of life from another rank after which this process
            ends; None: never.
        facts: what this rank was started with.

    Raises:
        ConfigError, TrainingError: the ranks do not find each other or were started with different
            facts, or a rank is lost in the body.
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
    """`init_process_group`; TrainingError if the ranks have met but cannot connect."""
    try:
        dist.init_process_group(backends, **group)
    except RuntimeError as error:
        if lost_connection(error, group["rank"], host) is not None:
            raise
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TrainingError(
            f"rank {group['rank']} on {host}: the ranks have met, but cannot be connected "
            f"({'; '.join(dict.fromkeys((said[0], said[-1])))}); check GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME, and that no two ranks share a GPU"
        ) from error


def second_group() -> dist.ProcessGroup | None:
    """Another gloo group over all ranks (a collective); None for a single rank.

    Collectives of one group must be called in the same order on every rank, so a second thread
    needs a group of its own.
    """
    return dist.new_group(backend="gloo", timeout=_TIMEOUT) if world_size() > 1 else None
