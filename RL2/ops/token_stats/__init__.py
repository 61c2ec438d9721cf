"""Token statistics of a linear head: the numbers every token loss is written on.

`linear_token_stats`: from hidden states and the head's weight. `token_stats`: from logits.
"""

from RL2.ops.token_stats.naive import naive_token_stats as linear_token_stats
from RL2.ops.token_stats.naive import token_stats
from RL2.ops.token_stats.stats import NEG_INF, STATISTICS, TokenStats

__all__ = ["NEG_INF", "STATISTICS", "TokenStats", "linear_token_stats", "token_stats"]
