"""The optimizer batches of a step: passes over a batch, and its parts in each of them."""

import hashlib

import torch
from torch import Tensor

from RL2.algorithms.segments import kept_together
from RL2.distributed.comm import Batch


def split_batch(
    batch: Batch,
    n_parts: int,
    segments: tuple[str, ...] = (),
    generator: torch.Generator | None = None,
) -> list[Batch]:
    """Cut a batch into `n_parts` optimizer batches, never through a multi-turn sample, nor through
    a group or pair if those are among `segments`; in an order drawn from the generator, if any."""
    unit = kept_together(batch, segments)
    n_units = int(unit.max()) + 1
    shuffled = generator is not None
    units = torch.randperm(n_units, generator=generator) if shuffled else torch.arange(n_units)
    parts = [
        _slice(torch.isin(unit, some).nonzero().squeeze(-1)) for some in units.tensor_split(n_parts)
    ]
    return [{name: field[rows] for name, field in batch.items()} for rows in parts]


def order_of(seed: int, step: int, epoch: int) -> torch.Generator:
    """What decides the order of a pass over the batch of a step: nothing but these numbers, so that
    a resumed run has the same."""
    digest = hashlib.sha256(f"{seed} {step} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def _slice(rows: Tensor) -> Tensor | slice:
    """Rows that follow each other as a slice, which copies nothing."""
    if not len(rows):
        return slice(0, 0)
    ends = slice(int(rows[0]), int(rows[-1]) + 1)
    return ends if ends.stop - ends.start == len(rows) else rows
