"""Sources by name, not imported: checking a command line needs only the names."""

SOURCES: dict[str, str] = {
    "rollouts": "RL2.trainer.sources.rollouts:RolloutSource",
    "rows": "RL2.trainer.sources.rows:RowSource",
}
