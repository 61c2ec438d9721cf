"""Which trackers a run logs to, beside `metrics.jsonl`."""

from omegaconf import DictConfig


def trackers_of(trainer: DictConfig) -> list[str]:
    """Names in `SINKS`, each once. `trainer.use_wandb` decides where `trainer.trackers` is null,
    and is as good as true where both are."""
    given = trainer.get("trackers")
    if given is None:
        return [] if trainer.get("use_wandb") is False else ["wandb"]
    return [name for name in dict.fromkeys(given) if name != "jsonl"]
