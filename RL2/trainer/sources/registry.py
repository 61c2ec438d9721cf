"""Sources by name, by where they stand: a command line is checked with the names alone."""

SOURCES: dict[str, str] = {
    "rollouts": "RL2.trainer.sources.rollouts:RolloutSource",
    "rows": "RL2.trainer.sources.rows:RowSource",
}
