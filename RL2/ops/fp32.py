"""Fast fp32 matrix products on CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def fast_fp32(device: torch.device) -> Iterator[None]:
    """On CPU, fp32 products through oneDNN where that keeps all of fp32.

    torch multiplies fp32 matrices with MKL, which reaches half of oneDNN's speed on AMD's CPUs
    (`benchmarks/RESULTS.md`). The switch to oneDNN also allows it to round operands to bf16, which
    it only does on CPUs with AMX; there nothing is switched.
    """
    if device.type != "cpu" or not _onednn_keeps_fp32():
        yield
        return
    with _onednn():
        yield


@contextmanager
def _onednn() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def _onednn_keeps_fp32() -> bool:
    """Multiplies numbers that bf16 does not have by the identity."""
    if not torch.backends.mkldnn.is_available():
        return False
    numbers = 1 + torch.arange(256 * 256, dtype=torch.float32).view(256, 256) / 2**20
    with _onednn():
        return torch.equal(numbers @ torch.eye(256), numbers)
