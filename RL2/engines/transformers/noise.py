"""Noise for sampling, from hashes: no generator and no state."""

import torch
from torch import Tensor


def signed(value: int, bits: int = 64) -> int:
    """The signed integer with the low `bits` bits of `value`."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


# Constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
# OOPSLA 2014) as int64: torch multiplies int64 modulo 2^64.
_GOLDEN = signed(0x9E3779B97F4A7C15)
_MIX_1 = signed(0xBF58476D1CE4E5B9)
_MIX_2 = signed(0x94D049BB133111EB)
# The same for 32 bits: the finalizer of MurmurHash3 (Appleby).
_GOLDEN_32 = signed(0x9E3779B9, 32)
_MIX_1_32 = signed(0x85EBCA6B, 32)
_MIX_2_32 = signed(0xC2B2AE35, 32)

# Numbers hashed at a time on a CPU, so that they stay in its cache.
_BLOCK = 2**17


def mix64(x: Tensor) -> Tensor:
    """The finalizer of splitmix64, a bijection of int64 that scatters neighbors. Works in place."""
    x.bitwise_xor_((x >> 30).bitwise_and_((1 << 34) - 1)).mul_(_MIX_1)
    x.bitwise_xor_((x >> 27).bitwise_and_((1 << 37) - 1)).mul_(_MIX_2)
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def mix32(x: Tensor, key: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 for int32, with a key between its halves. Works in place."""
    x.bitwise_xor_((x >> 16).bitwise_and_((1 << 16) - 1)).mul_(_MIX_1_32).bitwise_xor_(key)
    x.bitwise_xor_((x >> 13).bitwise_and_((1 << 19) - 1)).mul_(_MIX_2_32)
    return x.bitwise_xor_((x >> 16).bitwise_and_((1 << 16) - 1))


def exponential_noise(seeds: Tensor, position: int, vocab_size: int) -> Tensor:
    """Standard exponential noise that is a pure function of (seed, position, vocabulary index).

    seeds: [B] int64. position: index of the token in its response. Returns [B, vocab_size] fp32,
    all above 0.

    Seed and position are hashed to a key of 64 bits; key and index to a number whose lower 31 bits
    give u in (0, 1). The noise is -log(1 - u) rather than -log(u): floats are densest at 0, so the
    smallest noise values, which win races, are the most precise.
    """
    keys = mix64(mix64(seeds + _GOLDEN) + signed(position * _GOLDEN))[:, None]
    index = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device).mul_(_GOLDEN_32)
    noise = torch.empty(len(seeds), vocab_size, device=seeds.device)
    rows = max(1, _BLOCK // vocab_size) if seeds.device.type == "cpu" else len(seeds)
    for key, out in zip(keys.split(rows), noise.split(rows), strict=True):
        bits = mix32(key.to(torch.int32) + index, (key >> 32).to(torch.int32))
        out.copy_(bits.bitwise_and_((1 << 31) - 1)).add_(0.5).mul_(-(2.0**-31))
        out.clamp_(min=2.0**-24 - 1).log1p_().neg_()
    return noise
