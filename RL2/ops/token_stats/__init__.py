"""Token statistics of a linear head: the numbers from which every token loss is computed.

`linear_token_stats` and `linear_token_loss`: from hidden states and the head's weight.
`token_stats`: from logits. `naive` defines each statistic.

    stats     names, container, argument checks
    naive     full logits and autograd: the reference
    state     six numbers per token: how they merge, and what follows from them
    kernels   the element-wise part on one tile, eager and compiled
    triton_kernels, triton_fused   the same on CUDA, and the forward pass as one kernel
    products  the matrix products
    tiling    how a head is cut into tiles, and the logits of a tile
    sweep     the values: one pass over the tiles
    gradients from gradients of the statistics to those of hidden states, weight and bias
    recompute   statistics whose backward pass computes the logits again
    in_forward  a loss whose gradients are formed in the forward pass
    linear    the entries, and the choice of the implementation
"""

from RL2.ops.token_stats.linear import (
    IMPLEMENTATIONS,
    has_compiler,
    linear_token_loss,
    linear_token_stats,
)
from RL2.ops.token_stats.naive import token_stats
from RL2.ops.token_stats.stats import (
    CONSTANT,
    NEG_INF,
    SEVERAL,
    STATISTICS,
    LossFunction,
    TokenStats,
    VocabularyShard,
    loss_of,
)

__all__ = [
    "CONSTANT",
    "IMPLEMENTATIONS",
    "LossFunction",
    "NEG_INF",
    "SEVERAL",
    "STATISTICS",
    "TokenStats",
    "VocabularyShard",
    "has_compiler",
    "linear_token_loss",
    "linear_token_stats",
    "loss_of",
    "token_stats",
]
