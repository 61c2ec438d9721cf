"""Stands in for SGLang's package of compiled kernels, which has no CPU build on the registry.

On a CPU without AMX instructions the server falls back to plain torch everywhere but in two
places: it calls `assign_req_to_token_pool_cpu`, and `murmur_hash32_cpu` for requests with a seed.
Both are here. Other kernels can be imported, as SGLang's modules do when they load, but a call of
one is an error that names it.
"""

from collections.abc import Callable
from typing import NoReturn

import torch


def assign_req_to_token_pool_cpu(
    rows: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    slots: torch.Tensor,
    table_width: int,
) -> None:
    """Write each request's next cache slots into its row of the table, in place.

    rows: [B] row of a request. table: [requests, table_width] int32, cache slot of each position.
    starts, ends: [B] positions start..end-1 of a request are written.
    slots: [sum of end - start] the slots, request after request.
    """
    done = 0
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[row, start:end] = slots[done : done + end - start]
        done += end - start


@torch.library.custom_op("sgl_kernel::murmur_hash32_cpu", mutates_args=())
def murmur_hash32_cpu(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3 (32 bits, public domain) of (seed, position, column).

    seed, positions: [N], the seed of 64 bits. col_indices: [M]. Returns [N, M] uint32.
    """
    seed, positions = seed.view(torch.int64)[:, None], positions.to(torch.int64)[:, None]
    hashed = torch.zeros_like(seed)
    for block in (seed & _LOW, (seed >> 32) & _LOW, positions & _LOW, col_indices.long()[None]):
        block = _rotate(block * 0xCC9E2D51 & _LOW, 15) * 0x1B873593 & _LOW
        hashed = (_rotate(hashed ^ block, 13) * 5 + 0xE6546B64) & _LOW
    hashed = hashed ^ 16  # the length in bytes
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        hashed = (hashed ^ (hashed >> shift)) * factor & _LOW
    return hashed.to(torch.uint32)


_LOW = 0xFFFFFFFF


def _rotate(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Rotate 32-bit numbers, held in 64 bits, to the left."""
    return (x << bits | x >> (32 - bits)) & _LOW


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """A function that cannot be called, for every other kernel."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: the stand-in for CPUs has no such kernel")

    return missing
