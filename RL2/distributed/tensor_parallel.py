"""A head whose vocabulary is split over the ranks of a process group (tensor parallelism)."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ProcessGroupShard:
    """This rank's columns of the vocabulary: a `VocabularyShard` for `linear_token_stats`.

    Attributes:
        group: the tensor-parallel group; None is the default group. Its ranks hold consecutive
            parts of the vocabulary in the order of their ranks.
        start: first column of the whole vocabulary that this rank's weight holds.
        columns: how many of the weight's rows are columns of the vocabulary; the others, after
            them, are padding. May be 0.
        widest: the largest `columns` of all ranks.
    """

    group: dist.ProcessGroup | None
    start: int
    columns: int
    widest: int

    def all_gather(self, tensor: Tensor) -> Tensor:
        """`[n_ranks, *tensor.shape]` of equal shapes, in the order of the ranks."""
        parts = tensor.new_empty(dist.get_world_size(self.group), *tensor.shape)
        if tensor.numel():
            # The flat form is the one that every backend takes.
            flat = tensor.contiguous().view(-1)
            dist.all_gather_into_tensor(parts.view(-1), flat, group=self.group)
        return parts

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the ranks, in place; the same bits on all of them."""
        if not tensor.numel():
            return
        whole = tensor.contiguous()
        dist.all_reduce(whole, group=self.group)
        if whole is not tensor:
            tensor.copy_(whole)


def shard_of(vocab_size: int, group: dist.ProcessGroup | None = None) -> ProcessGroupShard:
    """The part of the vocabulary that `torch.chunk`, and a DTensor with `Shard(0)`, give this rank.

    Every part but the last ones has ceil(vocab_size / ranks) columns: the last that is not empty
    may be shorter, and those after it hold none.

    Raises:
        ValueError: a vocabulary without columns, or this rank is not in `group`.
    """
    own = dist.get_rank(group)
    if vocab_size < 1 or own < 0:
        raise ValueError(f"vocab_size={vocab_size} at rank {own} of the group: expected >= 1, >= 0")
    size = -(-vocab_size // dist.get_world_size(group))
    start = min(own * size, vocab_size)
    return ProcessGroupShard(group, start, min(size, vocab_size - start), widest=size)
