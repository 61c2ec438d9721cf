"""The critic: how well its values foretold a rollout's returns."""

from RL2.distributed import broadcast
from RL2.distributed.comm import Batch
from RL2.workers.learner import Learner


class Critic(Learner):
    """A model of values, which the advantages of the policy are measured from."""

    def update(self, batch: Batch | None, step: int) -> dict[str, float]:
        metrics = super().update(batch, step)
        explained = broadcast(None if batch is None else explained_variance(batch))
        if not metrics or explained is None:
            return metrics
        return metrics | {f"{self.name}/explained_variance": explained}


def explained_variance(batch: Batch) -> float | None:
    """1 - Var(returns - old_values) / Var(returns) over all action tokens: 1 if they were foretold,
    0 or less if a constant had been as good. None where all returns are equal."""
    mask = batch["action_mask"]
    returns, values = (batch[name][mask].double() for name in ("returns", "old_values"))
    if len(returns) == 0 or (spread := returns.var(correction=0)) == 0:
        return None
    return (1 - (returns - values).var(correction=0) / spread).item()
