"""How an update is spread: over ranks, and over micro-batches; and the run of many of them."""

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from unittest import mock

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from RL2.algorithms import resolve_loss
from RL2.distributed import rank
from RL2.models.loading import local_part
from RL2.workers import Actor, Learner, ShardedModel
from tests.invariance.cases import LONGEST, TEMPERATURE
from tests.workers.test_actor import actor_config

TOP_K = 3
LARGE = 64  # tokens of a micro-batch that holds several rows
# AdamW's step is about lr * sign(gradient), which rounding can turn round where the gradient is
# next to nothing; this much in its denominator makes it a smooth function of the gradient.
EPS = 1e-1


@dataclass(frozen=True)
class Spread:
    """
    Attributes:
        n_ranks: processes.
        changes: of the config of the actor, of sizes above all.
        alone: every row is a micro-batch of its own.
    """

    n_ranks: int = 1
    changes: dict = field(default_factory=dict)
    alone: bool = False
    max_length: int = LARGE


SHORT = LONGEST // 2
SPREADS = {
    "alone": Spread(alone=True),  # what the others are compared with
    "packed": Spread(),
    "small": Spread(max_length=LONGEST),
    "checkpointing": Spread(
        changes={"gradient_checkpointing": True, "offload_activations": True}, max_length=1000
    ),
    "fsdp2": Spread(2),
    "ddp2": Spread(2, {"ddp_size": 2}, max_length=LONGEST),
    "tp2": Spread(2, {"tp_size": 2}),
    "sp2": Spread(2, {"sp_size": 2}, max_length=SHORT),  # no row fits into a slice
    "fsdp3": Spread(3),
    "tp3": Spread(3, {"tp_size": 3}),
    "sp3": Spread(3, {"sp_size": 3}),
    "fsdp4": Spread(4),
    "ddp2-fsdp2": Spread(4, {"ddp_size": 2}, max_length=LONGEST),
    "ddp4": Spread(4, {"ddp_size": 4}),
    "tp2-fsdp2": Spread(4, {"tp_size": 2}),
    "tp2-ddp2": Spread(4, {"tp_size": 2, "ddp_size": 2}),
    "tp4": Spread(4, {"tp_size": 4}),
    "sp2-fsdp4": Spread(4, {"sp_size": 2}),
    "sp2-ddp2": Spread(4, {"sp_size": 2, "ddp_size": 2}, max_length=LONGEST),
    "sp4": Spread(4, {"sp_size": 4}, max_length=SHORT),
    "tp2-sp2": Spread(4, {"tp_size": 2, "sp_size": 2}),
    "tp2-sp2-ddp2": Spread(4, {"tp_size": 2, "sp_size": 2, "ddp_size": 2}, max_length=LONGEST),
}


def each_row_alone(lengths, max_length, multiple_of=1, quadratic=0.0, units=None):
    """Or the rows of each unit."""
    units = range(len(lengths)) if units is None else units
    bins = [[row for row, of in enumerate(units) if of == unit] for unit in dict.fromkeys(units)]
    return bins + [[] for _ in range(-len(bins) % multiple_of)]


def spread_config(model, spread, **changes):
    lengths = ("max_length_per_device", "max_inference_length_per_device")
    config = {"temperature": TEMPERATURE, "max_grad_norm": 5.0, "lr": 1e-2}
    config |= dict.fromkeys(lengths, spread.max_length) | spread.changes | changes
    return actor_config(model, **config)


@dataclass(frozen=True)
class Update:
    """What an update left on a rank. Tensors of the model are flat numpy arrays, in the order of
    the names: pipes take those without sharing memory.

    Attributes:
        gradients: of each optimizer step, clipped; this rank's parts.
        weights: this rank's parts, afterwards.
    """

    metrics: dict[str, float]
    gradients: list[np.ndarray]
    weights: np.ndarray


@dataclass(frozen=True)
class RankResult:
    """
    Attributes:
        where: the places of this rank's parts in the flat array of the whole model.
        logps: `[B, T]` by batch, before and after the updates, on rank 0.
        tops: `[B, T, K]` by batch, as a teacher gives them, on rank 0.
    """

    where: np.ndarray
    updates: dict[str, Update]
    logps: list[dict[str, np.ndarray | None]]
    tops: dict[str, tuple[np.ndarray, ...] | None]


def flat(tensors):
    """`{name: tensor}` as one vector, in the order of the names."""
    tensors = [tensors[name].detach() for name in sorted(tensors)]
    tensors = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return torch.cat([x.flatten() for x in tensors]).numpy()


def places(parameters):
    """Of a rank's parts in the flat array of the whole model."""
    result, start = [], 0
    for name in sorted(parameters):
        whole = torch.arange(start, start + parameters[name].numel()).view(parameters[name].shape)
        result.append(whole[local_part(parameters[name])].flatten())
        start += whole.numel()
    return torch.cat(result).numpy()


def run_spread(model: str, spread: Spread, tasks: dict, batches: dict) -> RankResult:
    """On a rank: all tasks one after the other, each from the same weights, by one actor; and the
    log-probabilities of the batches before and after."""
    with ExitStack() as stack:
        if spread.alone:
            stack.enter_context(mock.patch("RL2.distributed.comm.plan_packs", each_row_alone))
        actor = Actor(
            spread_config(model, spread), torch.device("cpu"), resolve_loss({"name": "nll"})
        )
        logps = [compute_logps(actor, batches)]
        loss_of = cache(lambda node: resolve_loss(json.loads(node)))
        updates = run_updates(actor, spread, tasks, lambda task: loss_of(json.dumps(task.loss)))
        logps.append(compute_logps(actor, batches))
        tops = compute_tops(actor, batches)
    return RankResult(places(dict(actor.hf_model.named_parameters())), updates, logps, tops)


def run_updates(learner: Learner, spread: Spread, tasks: dict, loss_of) -> dict[str, Update]:
    """All tasks one after the other, each from the same weights, which are there afterwards too."""
    parameters = dict(learner.hf_model.named_parameters())
    before = {name: p.detach().to_local().clone() for name, p in parameters.items()}

    def reset():
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.to_local().copy_(before[name])

    updates, gradients, model = {}, [], learner.config.model_name
    # Most tasks have theirs in common, and making them takes longer than some updates.
    config_of = cache(lambda changes: spread_config(model, spread, **json.loads(changes)))
    for group in learner.optimizer.param_groups:
        group["eps"] = EPS
    learner.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(flat({name: p.grad for name, p in parameters.items()}))
    )
    learner.prepare_scheduler(10**6)
    for name, task in tasks.items():
        reset()
        learner.optimizer.state.clear()
        gradients.clear()
        learner.config, learner.loss = config_of(json.dumps(task.changes)), loss_of(task)
        try:
            metrics = learner.update(task.batch if rank() == 0 else None, 1)
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
        updates[name] = Update(metrics, [*gradients], flat(parameters))
    reset()
    return updates


def run_two_policies(model: str, batches: dict) -> list[dict[str, np.ndarray | None]]:
    """On a rank of four: log-probabilities by an actor and a frozen policy, in turn, whose ranks
    share the work in different ways."""
    configs = [spread_config(model, SPREADS[name]) for name in ("tp2-sp2", "sp2-ddp2")]
    device = torch.device("cpu")
    actor = Actor(configs[0], device, resolve_loss({"name": "nll"}))
    models = [actor, ShardedModel(configs[1], device)]
    return [compute_logps(one, batches) for one in 2 * models]


def compute_logps(model: ShardedModel, batches: dict) -> dict[str, np.ndarray | None]:
    result = {}
    for name, batch in batches.items():
        filled = model.annotate(batch if rank() == 0 else None, {"ref_logps": "logps"})
        result[name] = filled and filled["ref_logps"].numpy()
    return result


TOP_FIELDS = {
    "teacher_logps": "logps",
    "teacher_top_logps": "top_logps",
    "teacher_top_ids": "top_ids",
}


def compute_tops(model: ShardedModel, batches: dict) -> dict[str, tuple[np.ndarray, ...] | None]:
    """What a teacher adds to a batch: log-probabilities of the actions, and of the likeliest tokens
    with their numbers."""
    result = {}
    for name, batch in batches.items():
        filled = model.annotate(batch if rank() == 0 else None, TOP_FIELDS, TOP_K)
        result[name] = filled and tuple(filled[field].numpy() for field in TOP_FIELDS)
    return result
