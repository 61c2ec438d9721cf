"""Sources by name, by where they stand: the command line asks for names, and torch takes seconds."""

SOURCES: dict[str, str] = {
    "rollouts": "RL2.trainer.sources.rollouts:RolloutSource",
    "rows": "RL2.trainer.sources.rows:RowSource",
}
