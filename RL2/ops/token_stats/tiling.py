"""A head's arguments, how they are cut into tiles, and the logits of each tile."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from RL2.ops.fp32 import worthwhile
from RL2.ops.token_stats.kernels import Kernels
from RL2.ops.token_stats.products import logits_dtype, product_into
from RL2.ops.token_stats.stats import VocabularyShard, check_head, statistics_dtype


@dataclass(frozen=True)
class Tiling:
    """How much of `[T, V]` exists at a time.

    columns: width of a tile, in columns of the vocabulary.
    rows: tokens whose tile is multiplied and read at a time; on CPU it then stays in the cache.
    kept: `tiled_token_loss` keeps the logits of as many tokens as fill `[T, kept]`.
    fewest: with fewer such tokens their products are slow, and it recomputes the logits instead.

    The working memory, besides the gradients themselves, is `[T, columns]` numbers if logits are
    recomputed, and `[T, kept]` otherwise.
    """

    columns: int = 4096
    rows: int = 512
    kept: int = 16384
    fewest: int = 256


# Measured on CPU (`benchmarks/RESULTS.md`): tiles of 8 MB in fp32 stay in the cache between the
# product and the kernel. On a GPU launches cost more than memory does: all rows at once.
TILINGS: dict[str, Tiling] = {
    "cpu": Tiling(),
    "cuda": Tiling(columns=8192, rows=2**20, kept=16384, fewest=512),
}


@dataclass(frozen=True)
class TiledHead:
    """One call's arguments: T tokens and the columns that this rank has. onednn: multiply with
    oneDNN; decided by the size of the whole call, for parts of it too. at: `[T, K]` columns of the
    whole vocabulary for `at_logps`, None if that is not wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    actions: Tensor
    scale: float
    entropy: bool
    top_k: int
    kernels: Kernels
    tiling: Tiling
    shard: VocabularyShard | None
    onednn: bool
    at: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return statistics_dtype(self.hidden, self.weight)

    @property
    def start(self) -> int:
        return 0 if self.shard is None else self.shard.start

    @property
    def n_columns(self) -> int:
        return len(self.weight) if self.shard is None else self.shard.columns

    def tiles(self) -> Iterator[slice]:
        width = self.tiling.columns
        for a in range(0, self.n_columns, width):
            yield slice(a, min(a + width, self.n_columns))

    def row_blocks(self) -> Iterator[slice]:
        for a in range(0, len(self.hidden), self.tiling.rows):
            yield slice(a, min(a + self.tiling.rows, len(self.hidden)))

    def take(self, rows: slice | Tensor) -> "TiledHead":
        """The same head for some of the tokens."""
        at = None if self.at is None else self.at[rows]
        return replace(self, hidden=self.hidden[rows], actions=self.actions[rows], at=at)

    def scratch(self, n_rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for `[n_rows, columns]` numbers, flat, so that a narrower tile is contiguous."""
        width = min(self.tiling.columns, self.n_columns)
        return self.hidden.new_empty(n_rows * width, dtype=dtype or self.dtype)

    def operand(self, x: Tensor) -> Tensor:
        """Hidden states or weight in the dtype for `logits`."""
        return x.to(logits_dtype(self.hidden, self.weight, self.dtype))

    def logits(self, out: Tensor, hidden: Tensor, weight: Tensor, tile: slice) -> None:
        """Logits of a tile `[R, n]` from the operands of its rows and columns."""
        product_into(out, hidden, weight.T, self.onednn)
        if self.bias is not None:
            out.add_(self.bias[tile])


def tiled_head(
    hidden, weight, actions, temperature, wanted, bias, top_k, kernels, tiling, shard, at
) -> TiledHead:
    check_head(hidden, weight, actions, temperature, wanted, top_k, shard, at)
    n_columns = len(weight) if shard is None else shard.columns
    return TiledHead(
        hidden=hidden.detach(),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        actions=actions,
        scale=1 / temperature,
        entropy="entropy" in wanted,
        top_k=top_k if {"top_logps", "top_ids"} & {*wanted} else 0,
        kernels=kernels,
        tiling=tiling or TILINGS.get(hidden.device.type, Tiling()),
        shard=shard,
        onednn=worthwhile(hidden.device, hidden.numel() * n_columns),
        at=at.long() if "at_logps" in wanted else None,
    )


def tiles_of_logits(
    head: TiledHead, kept: Sequence[Tensor] | None, fill: bool = False
) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield `(rows, first column in the whole vocabulary, logits [R, n])`, tile by tile.

    Logits are computed into a buffer that the next ones overwrite. With `kept`, a `[T, n]` buffer
    per tile, they are read from there, or with `fill` computed into it.
    """
    scratch = head.scratch(min(head.tiling.rows, len(head.hidden))) if kept is None else None
    compute = kept is None or fill
    operand = head.operand(head.hidden) if compute else None
    for t, tile in enumerate(head.tiles()):
        weight = head.operand(head.weight[tile]) if compute else None
        for rows in head.row_blocks():
            shape = (rows.stop - rows.start, tile.stop - tile.start)
            z = view(scratch, shape) if kept is None else kept[t][rows]
            if compute:
                head.logits(z, operand[rows], weight, tile)
            yield rows, head.start + tile.start, z


def view(flat: Tensor, shape: tuple[int, int]) -> Tensor:
    return flat[: shape[0] * shape[1]].view(shape)
