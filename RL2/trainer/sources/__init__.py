"""What a step learns from: rollouts of the policy, rows of a data set, or a source of your own.

    from RL2.trainer.sources import RowSource

    class Backwards(RowSource):
        def batch(self, items):
            return super().batch(items[::-1])

lies in a file of its own and trains with `trainer.source=my_source.py:Backwards` of `sft`.
"""

from RL2.trainer.sources.registry import SOURCES, open_source, resolve_source
from RL2.trainer.sources.rollouts import RolloutSource
from RL2.trainer.sources.rows import RowSource
from RL2.trainer.sources.source import Result, Source
from RL2.trainer.sources.stream import PromptStream

__all__ = [
    "SOURCES", "PromptStream", "Result", "RolloutSource", "RowSource", "Source", "open_source",
    "resolve_source",
]  # fmt: skip
