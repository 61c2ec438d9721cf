"""Which trackers a run logs to, besides `metrics.jsonl`."""

from omegaconf import DictConfig


def trackers_of(trainer: DictConfig) -> list[str]:
    """Names in `SINKS`, each once. If `trainer.trackers` is null, `trainer.use_wandb` decides; if
    both are null, the tracker is wandb."""
    given = trainer.get("trackers")
    if given is None:
        return [] if trainer.get("use_wandb") is False else ["wandb"]
    return [name for name in dict.fromkeys(given) if name != "jsonl"]
