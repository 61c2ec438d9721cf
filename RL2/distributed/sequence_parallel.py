"""Sequence parallelism: a pack is cut into slices, and only attention sees the whole pack.

Everything in a decoder except attention works on each token separately. Around attention two
all-to-alls change which dimension is split: from a slice of the tokens with all heads to all tokens
with a part of the heads, and back (Ulysses; Jacobs et al. 2023, arXiv:2309.14509). Attention itself
is the same packed kernel.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from transformers import AttentionInterface, PretrainedConfig

from RL2.ops.attention import register_attention
from RL2.runtime.errors import ConfigError

_PREFIX = "sequence_parallel_"
_TAKES_PACKS = ("sdpa_varlen", "flash_attention_2")


def register_sequence_parallel(attention: str) -> str:
    """Register `attention`, spread over a sequence-parallel group, with transformers.

    Returns:
        Its name. The model's `forward` then needs `sp_group`.

    Raises:
        ConfigError: an attention that does not take packs.
    """
    if attention not in _TAKES_PACKS:
        raise ConfigError(
            f"actor.attn_implementation={attention}: cannot be spread over actor.sp_size ranks; "
            f"use {' or '.join(_TAKES_PACKS)}"
        )
    name = register_attention(attention)
    AttentionInterface.register(_PREFIX + name, ulysses(AttentionInterface()[name]))
    return _PREFIX + name


def check_heads(config: PretrainedConfig, sp_size: int, tp_size: int) -> None:
    """Raise ConfigError unless the heads of a rank can be divided among `sp_size` ranks."""
    heads = config.num_attention_heads
    if heads % (sp_size * tp_size):
        times = f" * actor.tp_size={tp_size}" if tp_size > 1 else ""
        raise ConfigError(
            f"actor.sp_size={sp_size}{times}: must divide num_attention_heads={heads} of the "
            "model; use a divisor of it"
        )


def ulysses(attention: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    """Turn `attention` over whole packs into one over slices of them.

    Args:
        attention: a function with transformers' interface: query `[1, heads, N, d]`, key and value
            `[1, kv_heads, N, d]` to `[1, N, heads, d]`.
    """

    def spread(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        sp_group: dist.ProcessGroup,
        **kwargs,
    ) -> tuple[Tensor, None]:
        size = dist.get_world_size(sp_group)
        repeats = kv_repeats(query.shape[1], key.shape[1], size)
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        query, key, value = (_to_whole_packs(x, size, sp_group) for x in (query, key, value))
        if kwargs.get("s_aux") is not None:  # sinks, one for each head
            kwargs["s_aux"] = kwargs["s_aux"].chunk(size)[dist.get_rank(sp_group)]
        out, _ = attention(module, query, key, value, attention_mask, **kwargs)
        return _to_slices(out, size, sp_group), None

    return spread


def kv_repeats(heads: int, kv_heads: int, size: int) -> int:
    """How often key and value heads are repeated so that `size` ranks get equally many.

    `size` and `kv_heads` must divide `heads`.
    """
    return next(
        repeats
        for repeats in range(1, heads // kv_heads + 1)
        if (heads // kv_heads) % repeats == 0 and kv_heads * repeats % size == 0
    )


class _OfAllSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.which = sizes, dist.get_rank(group)
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return len(ctx.sizes) * gradient.split(ctx.sizes)[ctx.which], None, None


def of_all_slices(own: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of every rank's slice, one after the other, on all ranks of a group (a collective).

    All ranks must continue with the same computation, and each must count 1 / the number of ranks
    of its result. Then the gradient needs no collective: this rank knows what the others would
    send.

    sizes: how many rows each rank has.
    """
    return _OfAllSlices.apply(own, sizes, group) if any(sizes) else own


def _all_to_all(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send the i-th of `parts [size, …]` to rank i; return what came from rank i as the i-th."""
    flat = all_to_all_single_autograd(parts.contiguous(), None, None, group)
    return flat.view(parts.shape)


def _to_whole_packs(x: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """`[1, heads, n, d]` of a slice to `[1, heads / size, n * size, d]`."""
    _, heads, n, d = x.shape
    received = _all_to_all(x.view(size, heads // size, n, d), group)  # [slice, heads, n, d]
    return received.transpose(0, 1).reshape(1, heads // size, size * n, d)


def _to_slices(x: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """`[1, n * size, heads / size, d]` to `[1, n, heads, d]` of the own slice."""
    _, n, heads, d = x.shape
    received = _all_to_all(x.view(size, n // size, heads, d), group)  # [heads, n, heads, d]
    return received.transpose(0, 1).reshape(1, n // size, size * heads, d)
