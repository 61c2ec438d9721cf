"""Check that ranks with copies of a weight have the same numbers."""

import socket

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from RL2.distributed import world_size
from RL2.distributed.agreement import of_all
from RL2.models.loading import local_part
from RL2.runtime.errors import ConfigError


def check_copies(model: nn.Module, name: str) -> None:
    """Compare the copies of weights on data-parallel and tensor-parallel ranks (a collective).

    Files are compared earlier, but only samples of large ones. Copies that differ would stay so, as
    all of them get the same updates.

    name: the model's name.

    Raises:
        ConfigError: on all ranks, if a single bit of a weight differs.
    """
    own = {
        (weight, str(local_part(tensor))): _sum_of_bits(tensor)
        for weight, tensor in model.named_parameters()
        if _has_copies(tensor)
    }
    first: dict[tuple[str, str], tuple[int, str, int]] = {}
    for which, (host, parts) in enumerate(of_all((socket.gethostname(), own))):
        for part, bits in parts.items():
            other, other_host, other_bits = first.setdefault(part, (which, host, bits))
            if bits != other_bits:
                raise ConfigError(
                    f"actor.model_name={name}: rank {other} on {other_host} and rank {which} on "
                    f"{host} have read different numbers for {part[0]}; give all ranks the same "
                    "files"
                )


def _has_copies(tensor: Tensor) -> bool:
    if not isinstance(tensor, DTensor) or tensor.device_mesh.size() < world_size():
        return world_size() > 1
    mesh = tensor.device_mesh
    return any(
        placement.is_replicate() and mesh.size(dim) > 1
        for dim, placement in enumerate(tensor.placements)
    )


def _sum_of_bits(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
    # A wider type would take ten times as long. Overflow is the same on all ranks.
    return int(local.detach().contiguous().view(words).sum(dtype=words))
