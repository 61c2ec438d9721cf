"""Attention over slices of a pack equals attention over the pack."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig

from RL2.distributed import rank, world_size
from RL2.distributed.sequence_parallel import check_heads, register_sequence_parallel, ulysses
from RL2.ops.attention import register_attention, sdpa_varlen
from RL2.runtime.errors import ConfigError
from tests.ranks import run_on_ranks

LENGTHS = [7, 1, 10, 6]


def attend(attention, tensors, **kwargs):
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    out, _ = attention(
        torch.nn.Module(), *tensors, None, cu_seq_lens_q=offsets, max_length_q=max(LENGTHS),
        **kwargs,
    )  # fmt: skip
    return out


def whole_tensors(heads, kv_heads):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, n, sum(LENGTHS), 4, generator=generator, dtype=torch.float64)
        for n in (heads, kv_heads, kv_heads)
    ]


def output_and_gradients(heads, kv_heads):
    """This rank's slices of what `ulysses` gives."""
    n = sum(LENGTHS) // world_size()
    own = slice(rank() * n, (rank() + 1) * n)
    slices = [x[:, :, own].clone().requires_grad_() for x in whole_tensors(heads, kv_heads)]
    out = attend(ulysses(sdpa_varlen), slices, sp_group=dist.group.WORLD)
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in slices)]


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
@pytest.mark.parametrize("heads, kv_heads", [(12, 12), (12, 4), (12, 2), (12, 1), (24, 6)])
def test_output_and_gradients_are_those_of_the_whole_pack(n_ranks, heads, kv_heads):
    tensors = [x.requires_grad_() for x in whole_tensors(heads, kv_heads)]
    out = attend(sdpa_varlen, tensors)
    out.square().sum().backward()
    by_rank = run_on_ranks(n_ranks, output_and_gradients, heads, kv_heads)
    outs, *gradients = zip(*by_rank, strict=True)
    torch.testing.assert_close(torch.cat(outs, 1), out.detach(), rtol=1e-12, atol=1e-12)
    for parts, x in zip(gradients, tensors, strict=True):
        torch.testing.assert_close(torch.cat(parts, 2), x.grad, rtol=1e-12, atol=1e-12)


def test_refusals():
    register_attention()
    assert register_sequence_parallel("sdpa_varlen") == "sequence_parallel_varlen"
    with pytest.raises(ConfigError, match="actor.attn_implementation=eager: cannot be spread"):
        register_sequence_parallel("eager")
    config = LlamaConfig(hidden_size=24, num_attention_heads=12)
    check_heads(config, 4, 3)
    with pytest.raises(ConfigError, match="actor.sp_size=8: must divide num_attention_heads=12"):
        check_heads(config, 8, 1)
    with pytest.raises(ConfigError, match=r"actor.sp_size=4 \* actor.tp_size=2: must divide"):
        check_heads(config, 4, 2)
