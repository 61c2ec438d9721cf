"""Building blocks that know nothing about algorithms or processes.

`token_stats`: per-token numbers of a language-model head. `packing`: rows into micro-batches.
"""

from RL2.ops.packing import plan_packs
from RL2.ops.token_stats import (
    STATISTICS,
    TokenStats,
    VocabularyShard,
    linear_token_loss,
    linear_token_stats,
    token_stats,
)

__all__ = [
    "STATISTICS",
    "TokenStats",
    "VocabularyShard",
    "linear_token_loss",
    "linear_token_stats",
    "plan_packs",
    "token_stats",
]
