"""Sampling of one token for each row of a batch, and detection of the rows that have ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StopStringCriteria, TopPLogitsWarper

from RL2.engines.protocol import SamplingParams
from RL2.engines.transformers.noise import exponential_noise

# Below this many rows a smaller batch is no faster.
_MIN_SHRINK_ROWS = 4


class Sampler(LogitsProcessor):
    """Turns logits [B, V] into scores whose argmax is the sample, and keeps its log-probability.

    A token of probability p arrives at time E / p, where E is exponential noise; token i arrives
    first with probability p_i. Scores are p / E.
    logps: one [B] fp32 tensor for each step, before `top_p` cuts the distribution; no [B, V] tensor
    outlives its step.
    """

    def __init__(self, sampling: SamplingParams, seeds: Tensor, prompt_width: int):
        self.temperature = sampling.temperature
        self.top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self.seeds = seeds
        self.prompt_width = prompt_width
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        if self.temperature not in (0, 1):
            scores = scores / self.temperature
        probabilities = scores.softmax(-1)
        if self.temperature > 0:
            race = probabilities
            if self.top_p is not None:
                race = race.masked_fill(self.top_p(input_ids, scores) == -math.inf, 0.0)
            position = input_ids.shape[1] - self.prompt_width
            scores = race / exponential_noise(self.seeds, position, scores.shape[-1])
        tokens = scores.argmax(-1, keepdim=True)
        self.logps.append(probabilities.gather(-1, tokens).squeeze(-1).log())
        return scores


class RowEnds(StoppingCriteria):
    """Records where rows wrote an end-of-sequence token or a stop string.

    lengths: [B] number of response tokens at the end of a row, 0 while it goes on.
    When at most half of the rows go on, it ends the whole call, so that the caller can continue
    the rest as a smaller batch; likewise when `interrupted()`.
    """

    def __init__(
        self,
        rows: int,
        prompt_width: int,
        eos_ids: Tensor,
        stop_strings: StopStringCriteria | None,
        interrupted: Callable[[], bool],
    ):
        self.interrupted = interrupted
        self.prompt_width = prompt_width
        self.eos_ids = eos_ids
        self.stop_strings = stop_strings
        self.shrink_at = rows // 2 if rows >= _MIN_SHRINK_ROWS else 0
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=eos_ids.device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = torch.isin(input_ids[:, -1], self.eos_ids)
        if self.stop_strings is not None:
            # Only in the response: a stop string must not begin in the prompt.
            ended |= self.stop_strings(input_ids[:, self.prompt_width :], scores)
        length = input_ids.shape[1] - self.prompt_width
        self.lengths.masked_fill_(ended & (self.lengths == 0), length)
        done = self.lengths > 0
        if self.interrupted():
            return torch.ones_like(done)
        return done | ((~done).sum() <= self.shrink_at)
