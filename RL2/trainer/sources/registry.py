"""Sources by name, not imported: checking a command line needs only the names."""

SOURCES: dict[str, str] = {
    "rollouts": "RL2.trainer.sources.rollouts:RolloutSource",
    "rows": "RL2.trainer.sources.rows:RowSource",
    "pairs": "RL2.trainer.sources.pairs:PairSource",
    "scored_pairs": "RL2.trainer.sources.pairs:ScoredPairSource",
    "labels": "RL2.trainer.sources.pairs:LabelSource",
}
