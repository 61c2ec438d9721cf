"""A learner's loss on rows that it does not learn from."""

import torch
from torch import Tensor

from RL2.distributed.comm import Batch
from RL2.workers.learner import Learner


def evaluate(learner: Learner, batch: Batch | None) -> dict[str, float]:
    """The loss of `update` on rank 0's batch, and what is measured beside it, averaged over all of
    the batch as in an update, as `test/...` on every rank. Nothing without a batch, or if it has no
    action.

    Weights, gradients and random states stay as they are.

    Raises:
        TrainingError: a loss that breaks `RL2.algorithms.contract`; on every rank.
    """
    if learner.segments:
        learner.check_segments(batch)
    batch, n_actions, fields = learner.shared(batch)
    if not n_actions:
        return {}
    name, sums = f"{learner.name}/", dict[str, Tensor]()
    devices = [learner.device] if learner.device.type == "cuda" else []
    with torch.random.fork_rng(devices), learner.inference():
        for micro_batch in learner.scatter_update(batch, fields):
            loss, metrics = learner.losses(learner.to_device(micro_batch))
            for one, value in (metrics | {f"{name}loss": loss}).items():
                sums[one] = sums.get(one, 0.0) + value
    totals = learner.totals(sums)
    means = {one: total / n_actions for one, total in totals.items()}
    means[f"{name}loss"] = totals[f"{name}loss"]
    return {
        f"test/{one.removeprefix(name)}": value
        for one, value in means.items()
        if one.startswith(name)
    }
