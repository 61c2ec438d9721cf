"""What a step learns from: rollouts of the policy, rows of a data set, or a source of your own.

    from RL2.trainer.sources.rows import RowSource

    class Backwards(RowSource):
        def batch(self, items):
            return super().batch(items[::-1])

lies in a file of its own and trains with `trainer.source=my_source.py:Backwards` of `sft`.
`RL2.trainer.sources.source` says what a source has to have.
"""
