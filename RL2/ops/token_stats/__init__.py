"""Token statistics of a linear head: the numbers every token loss is written on.

`linear_token_stats` and `linear_token_loss`: from hidden states and the head's weight.
`token_stats`: from logits. `naive` says what each statistic is.

    stats     names, container, argument checks
    naive     full logits and autograd: the oracle
    state     six numbers per token: how they merge, what follows from them
    kernels   the element-wise part on one tile, eager and compiled
    triton_kernels   the same on CUDA
    products  the matrix products
    tiled     sweeps over the tiles, the backward pass, gradients in the forward pass
    linear    the entries, and which implementation answers
"""

from RL2.ops.token_stats.linear import (
    IMPLEMENTATIONS,
    has_compiler,
    linear_token_loss,
    linear_token_stats,
)
from RL2.ops.token_stats.naive import token_stats
from RL2.ops.token_stats.stats import (
    NEG_INF,
    STATISTICS,
    LossFunction,
    TokenStats,
    VocabularyShard,
    loss_of,
)

__all__ = [
    "IMPLEMENTATIONS",
    "LossFunction",
    "NEG_INF",
    "STATISTICS",
    "TokenStats",
    "VocabularyShard",
    "has_compiler",
    "linear_token_loss",
    "linear_token_stats",
    "loss_of",
    "token_stats",
]
