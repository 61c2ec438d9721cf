"""What a step learns from: rollouts of the policy, rows of a data set, or a source of your own.

    from RL2.trainer.sources.rows import RowSource

    class Backwards(RowSource):
        def batch(self, items):
            return super().batch(items[::-1])

is a complete file, which `sft` uses with `trainer.source=my_source.py:Backwards`.
`RL2.trainer.sources.source` describes what a source must have.
"""
