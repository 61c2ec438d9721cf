import math

import pytest
import torch

from RL2.engines.transformers.noise import exponential_noise


def test_noise_is_exponential_and_independent():
    seeds = torch.arange(200) * 3 + torch.iinfo(torch.int64).min  # any 64 bits are a seed
    noise = torch.stack([exponential_noise(seeds, position, 500) for position in range(20)])
    assert noise.isfinite().all() and (noise > 0).all()
    assert noise.mean().item() == pytest.approx(1, abs=0.005)
    assert noise.var().item() == pytest.approx(1, rel=0.01)
    # The smallest decide who wins: as many as there should be, and hardly any two alike.
    small = noise[noise < 0.001]
    assert len(small) / noise.numel() == pytest.approx(0.001, rel=0.15)
    assert len(small.unique()) > 0.99 * len(small)
    centred = (noise - noise.mean()) / noise.std()
    for axis in range(3):
        for lag in (1, 2):
            a = centred.narrow(axis, 0, centred.shape[axis] - lag)
            b = centred.narrow(axis, lag, centred.shape[axis] - lag)
            assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())
