"""What an algorithm is: a loss, an advantage, and what both need to be given."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from omegaconf import DictConfig
from torch import Tensor

from RL2.algorithms.advantages import resolve_advantage
from RL2.algorithms.kl import approx_kl
from RL2.algorithms.rewards import in_float32
from RL2.algorithms.segments import check_segments
from RL2.algorithms.token_loss import TokenLoss, resolve_loss
from RL2.runtime.errors import ConfigError

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Penalty:
    """The KL from the reference policy, taken off the `reward` or the `advantage` of each token."""

    coef: float
    where: str
    estimator: str

    def __call__(self, batch: Batch) -> Tensor:
        kl = approx_kl(batch["old_logps"], batch["ref_logps"], self.estimator)
        return self.coef * kl * batch["action_mask"]


@dataclass(frozen=True)
class Algorithm:
    """What is learned from a batch, as the config says it.

    Attributes:
        loss: what the actor minimises.
        advantage: `(rewards, action_mask, sample_ids, group_ids) -> advantages`, all of a batch;
            None where batches bring their advantages.
        needs: fields that providers compute between the collection of a batch and its advantages.
        penalty: None where there is none, or where the KL is a part of the loss.
    """

    loss: TokenLoss
    advantage: Callable[..., Tensor] | None = None
    needs: tuple[str, ...] = ()
    penalty: Penalty | None = None

    def advantages(self, batch: Batch | None) -> Batch | None:
        """The batch with `advantages [B, T]`. They and the rewards, which are in float64 until
        then, are float32. None, what a rank without a batch has, stays None."""
        if batch is None or self.advantage is None:
            return batch
        mask, rewards = batch["action_mask"], batch["rewards"]
        penalty = None if self.penalty is None else self.penalty(batch)
        if penalty is not None and self.penalty.where == "reward":
            rewards = rewards - penalty
        advantages = self.advantage(rewards, mask, batch["sample_ids"], batch["group_ids"])
        advantages = in_float32(advantages)
        if penalty is not None and self.penalty.where == "advantage":
            advantages = advantages - penalty
        return batch | {"rewards": batch["rewards"].float(), "advantages": advantages}


def resolve_algorithm(config: DictConfig, brought: Collection[str]) -> Algorithm:
    """The algorithm of a run.

    brought: the fields that its source brings; what a loss asks for beside them is computed.

    Raises:
        ConfigError: of a loss or an estimator that there is not, or that this run cannot give what
            it names; of a key that would have no effect.
    """
    loss = resolve_loss(config.actor.loss)
    check_loss(config, loss, brought)
    advantage = None
    if "advantages" not in brought:
        if "adv" not in config:
            raise ConfigError(
                f"trainer.source={config.trainer.source}: brings no advantages, and this trainer "
                "has no adv that makes some; name them in its brings, and put them in its batches"
            )
        advantage = resolve_advantage(config.adv)
    needs = tuple(name for name in required_fields(config, loss) if name not in brought)
    return Algorithm(loss, advantage, needs, resolve_penalty(config))


def resolve_penalty(config: DictConfig) -> Penalty | None:
    """What `actor.kl` takes off rewards or advantages."""
    kl = config.actor.get("kl")
    if kl is None or kl.coef == 0 or kl.type not in ("reward", "advantage"):
        return None
    return Penalty(kl.coef, str(kl.type), kl.reward_estimator)


def required_fields(config: DictConfig, loss: TokenLoss) -> tuple[str, ...]:
    """Log-probabilities that must be computed between rollout and update.

    `old_logps` are needed only where the policy moves away from the one that sampled (several
    optimizer steps a rollout, in a loss or importance weights that look back) or where the KL
    enters rewards or advantages; with one step they are the update's own, without a second forward.
    """
    actor = config.actor
    looks_back = "old_logps" in loss.fields or actor.get("tis_coef", 0.0) > 0
    old = actor.get("update_per_rollout", 1) > 1 and looks_back
    old |= resolve_penalty(config) is not None
    ref = "kl" in actor and actor.kl.coef > 0 or "ref_logps" in loss.fields
    return ("old_logps",) * old + ("ref_logps",) * ref


def check_loss(config: DictConfig, loss: TokenLoss, brought: Collection[str]) -> None:
    """ConfigError where this run cannot give the loss what it names, or would ignore a key."""
    actor = config.actor
    if loss.draws and actor.get("tp_size", 1) > 1:
        raise ConfigError(
            f"actor.tp_size={actor.tp_size}: the loss {loss.name} draws random numbers, and "
            "ranks that share their tokens would draw others; use actor.tp_size=1, or a "
            "torch.Generator with a seed"
        )
    there = {"old_logps", "ref_logps", *brought} | ({"advantages"} if "adv" in config else set())
    if missing := sorted(set(loss.fields) - there):
        raise ConfigError(
            f"actor.loss: {loss.name} needs {', '.join(missing)}, which "
            f"trainer.source={config.trainer.source} does not bring; use a loss over token "
            "statistics, or a trainer with rollouts"
        )
    check_segments(config, loss, brought)
    kl = actor.get("kl")
    blind = actor.avg_level == "correct" and not loss.uses_advantages
    if blind and kl is not None and kl.coef > 0 and kl.type != "loss":
        raise ConfigError(
            f"actor.kl.type={kl.type}: has no effect with actor.avg_level=correct and the loss "
            f"{loss.name}, which do not read the advantages; use actor.kl.type=loss"
        )
