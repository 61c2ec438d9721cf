"""Models of values, a critic and a reward model: what is updated, and the definition in float64."""

import math
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace

import torch
from omegaconf import OmegaConf
from transformers import AutoModelForSequenceClassification

from RL2.algorithms import resolve_advantage, resolve_loss
from RL2.algorithms.algorithm import Algorithm, resolve_value_loss
from RL2.distributed import rank
from RL2.workers import Critic, Learner
from tests.invariance import reference
from tests.invariance.cases import MODELS, make_batch
from tests.invariance.spreads import RankResult, Spread, places, run_updates, spread_config

GAMMA, LAMDA, CLIP = 0.9, 0.8, 0.02
ADVANTAGE = resolve_advantage({"estimator": "gae", "gamma": GAMMA, "lamda": LAMDA})
LOSSES = {
    "critic": resolve_value_loss(OmegaConf.create({"critic": {"clip": CLIP}}), ADVANTAGE),
    "reward model": resolve_loss({"name": "bradley_terry", "center_rewards_coefficient": 0.1}),
}
THREE = {"update_per_rollout": 3}


@dataclass(frozen=True)
class ValueCase:
    """One update. changes: of the config of the learner."""

    learner: str
    level: str
    changes: dict = field(default_factory=dict)
    batch: str = "mixed"


CASES = {
    "token": ValueCase("critic", "token"),
    "sequence": ValueCase("critic", "sequence"),
    "three updates": ValueCase("critic", "token", THREE),
    "clipped gradient": ValueCase("critic", "sequence", {"max_grad_norm": 1e-3}),
    "pairs": ValueCase("reward model", "sequence", batch="pairs"),
    "three updates of pairs": ValueCase("reward model", "token", THREE, "pairs"),
}


def make_value_model(name: str, folder) -> str:
    torch.manual_seed(0)
    config = type(MODELS[name])(**MODELS[name].to_dict() | {"num_labels": 1})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return str(folder)


@cache
def plain_value_model(model: str):
    return AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float64)


def make_rollout(model: str, name: str) -> dict:
    """A batch before the critic looks at it; each action has a reward."""
    generator = torch.Generator().manual_seed(1)
    batch = make_batch(model, name)
    rewards = torch.randn(batch["rewards"].shape, generator=generator) * batch["action_mask"]
    return batch | {"rewards": rewards.double()}


# ---------------------------------------------------------------- on the ranks


def run_values(model: str, spread: Spread, rollouts: dict) -> tuple:
    """On a rank: the batches, with old values and what is made of them, and the results of the
    critic's and the reward model's updates."""
    config, device = spread_config(model, spread), torch.device("cpu")
    critic = Critic(config, device, "critic", LOSSES["critic"])
    algorithm = Algorithm(None, ADVANTAGE, value_loss=LOSSES["critic"], gamma=GAMMA)
    batches = {}
    for name, rollout in rollouts.items():
        batch = critic.annotate(rollout if rank() == 0 else None, {"old_values": "values"})
        batches[name] = algorithm.advantages(batch)
    learners = {
        "critic": critic,
        "reward model": Learner(config, device, "actor", LOSSES["reward model"]),
    }
    updates = {}
    for kind, learner in learners.items():
        tasks = {
            name: SimpleNamespace(
                changes=case.changes | {"avg_level": case.level}, batch=batches[case.batch]
            )
            for name, case in CASES.items()
            if case.learner == kind
        }
        updates |= run_updates(learner, spread, tasks, lambda _, kind=kind: LOSSES[kind])
    of_gae = ("old_values", "advantages", "returns")
    found = {
        name: batch and [batch[key].numpy() for key in of_gae] for name, batch in batches.items()
    }
    return RankResult(places(dict(critic.hf_model.named_parameters())), updates, [], {}), found


# ---------------------------------------------------------------- the definition


def values_of(hf, batch, row):
    """Of a row's tokens, each from those before it."""
    length = int(batch["lengths"][row])
    hidden = hf.model(batch["states"][row : row + 1, :length]).last_hidden_state[0]
    return (hidden @ hf.score.weight.T)[:, 0]


def naive_gae(hf, batch) -> dict:
    """The batch with old values, and sample by sample with returns and advantages."""
    mask, shape = batch["action_mask"], batch["action_mask"].shape
    values, returns, advantages = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        for row, length in enumerate(batch["lengths"].tolist()):
            values[row, :length] = values_of(hf, batch, row)
    values = values * mask
    for sample in batch["sample_ids"].unique().tolist():
        places = [
            place for place in mask.nonzero().tolist() if batch["sample_ids"][place[0]] == sample
        ]
        v = [values[row, t].item() for row, t in places] + [0.0]
        r = [batch["rewards"][row, t].item() for row, t in places]
        errors = [r[i] + GAMMA * v[i + 1] - v[i] for i in range(len(r))]
        for i, (row, t) in enumerate(places):
            terms = [(GAMMA * LAMDA) ** (j - i) * errors[j] for j in range(i, len(r))]
            advantages[row, t] = sum(terms)
            returns[row, t] = sum(terms) + v[i]
    own = advantages[mask]
    deviation = math.sqrt(((own - own.mean()) ** 2).sum().item() / (len(own) - 1))
    advantages = (advantages - own.mean()) / deviation * mask
    return batch | {"old_values": values, "returns": returns, "advantages": advantages}


def batch_loss(hf, loss, config, batch):
    """Loss and metrics of one optimizer batch."""
    n_all, total, sums, all_tokens, rows = int(batch["action_mask"].sum()), 0.0, {}, [], []
    for row, length in enumerate(batch["lengths"].tolist()):
        mask = batch["action_mask"][row, :length]
        names = ("old_values", "returns")
        tokens = {name: batch[name][row, :length][mask] for name in names}
        tokens["values"] = values_of(hf, batch, row)[mask]
        all_tokens.append(tokens)
        rows += len(tokens["values"]) * [row]
        if loss.segments:
            continue
        v, old, target = (tokens[name] for name in ("values", "old_values", "returns"))
        limited = torch.where(
            v > old + CLIP, old + CLIP, torch.where(v < old - CLIP, old - CLIP, v)
        )
        errors, clipped = (v - target) ** 2, (limited - target) ** 2
        counts = clipped > errors
        weight = reference.row_weight(batch, row, config.avg_level)
        total = total + torch.where(counts, clipped, errors).sum() * weight
        sums["critic/clip_ratio"] = sums.get("critic/clip_ratio", 0.0) + counts.sum().item() / n_all
    if loss.segments:
        whole = {name: torch.cat([one[name] for one in all_tokens]) for name in all_tokens[0]}
        return reference.segment_loss(loss, config, batch, whole, rows)
    return total, sums


def expected_update(model: str, case: ValueCase, batch: dict, eps: float):
    """What `reference.update` gives, with the critic's explained variance."""
    changes = case.changes | {"avg_level": case.level}
    config = spread_config(model, Spread(), **changes)
    name = "critic" if case.learner == "critic" else "actor"
    metrics, gradients, weights = reference.update(
        plain_value_model(model), config, LOSSES[case.learner], batch, eps, name, batch_loss
    )
    if name == "critic":
        returns, values = (batch[key][batch["action_mask"]] for key in ("returns", "old_values"))
        left = torch.var(returns - values, correction=0) / torch.var(returns, correction=0)
        metrics["critic/explained_variance"] = 1 - left.item()
    return metrics, gradients, weights
