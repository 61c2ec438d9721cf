"""The trainer's side of a process group with a server, for sending weights.

The trainer is rank 0, the server's ranks follow; torch's default group is not touched. torch has no
public function for a group of processes without a common default group; servers use the inner part
of `init_process_group`. This module combines the same parts, so that it listens only on the address
that is given.
"""

from __future__ import annotations

import socket
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from RL2.engines.servers.addresses import address_towards, free_port
from RL2.runtime.errors import EngineError

# The device that a backend registers first; a part of the group's keys in the store.
_DEVICE = {"gloo": "cpu", "nccl": "cuda"}


class WeightGroup:
    """Process group of the trainer (rank 0) and one server (ranks 1 to world_size - 1).

    Hosts the store at address:port and blocks until the others have joined: create it in a thread.
    They join as `init_process_group` would with tcp://address:port, `name` and their rank.

    Args:
        address: address of this machine, as the server sees it; 127.0.0.1 for a local server.
        port: a free port. world_size: 1 + ranks of the server. name: a unique name of the group.
        backend: "gloo" or "nccl". nccl needs a different GPU for each rank (here the current one),
            and joins only at the first broadcast.
        timeout: seconds for joining and for each broadcast.

    Raises EngineError when the port is taken and when the others have not joined in time.
    """

    def __init__(
        self,
        address: str,
        port: int,
        world_size: int,
        name: str,
        backend: str,
        timeout: float = 120.0,
    ):
        if backend not in _DEVICE:
            raise EngineError(f"weight group: backend={backend}: use one of {', '.join(_DEVICE)}")
        self._what = f"weight group {name} ({backend}, {address}:{port})"
        self._backend = backend
        limit = timedelta(seconds=timeout)
        try:
            store = _store(address, port, world_size, limit)
            keys = store
            for prefix in (name, f"{name}/", f"{_DEVICE[backend]}/"):
                keys = dist.PrefixStore(prefix, keys)
            if backend == "gloo":
                options = dist.ProcessGroupGloo._Options()
                options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
                options._timeout = limit
                group = dist.ProcessGroupGloo(keys, 0, world_size, options)
            else:
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = limit
                group = dist.ProcessGroupNCCL(keys, 0, world_size, options)
        except (OSError, RuntimeError) as error:
            raise EngineError(
                f"{self._what}: the {world_size - 1} others did not join in {timeout:g} s: {error}"
            ) from error
        self._store, self._group = store, group

    def broadcast(self, tensor: Tensor) -> None:
        """Send a contiguous tensor to all ranks; returns when it may be overwritten.

        With nccl it is copied to the current GPU first. Raises EngineError when the others do not
        receive it in time, or are gone; the group cannot be used afterwards.
        """
        if self._group is None:
            raise EngineError(f"{self._what}: broadcast after close")
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            if self._backend == "nccl":
                tensor = tensor.cuda()
            self._group.broadcast([tensor.detach()], options).wait()
            if self._backend == "nccl":
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            raise EngineError(f"{self._what}: broadcast failed: {error}") from error

    def close(self) -> None:
        """Leave the group and close its ports. May be called during a broadcast, and twice."""
        group, self._group = self._group, None
        if group is not None and self._backend == "nccl":
            group.abort()  # does not wait for ranks that are gone
        self._store = None


def group_with(url: str, n_ranks: int, device: str) -> dict[str, Any]:
    """Arguments for a new `WeightGroup` with a server that has `n_ranks` ranks on `device`."""
    return {
        "address": address_towards(url),
        "port": free_port(),
        "world_size": 1 + n_ranks,
        "name": f"rl2-{uuid.uuid4().hex}",
        "backend": "nccl" if device == "cuda" else "gloo",
    }


def _store(address: str, port: int, world_size: int, limit: timedelta) -> dist.TCPStore:
    """A key-value store that listens on this address only; torch's own listens on all."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
        return dist.TCPStore(
            address, port, world_size, is_master=True, timeout=limit, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
