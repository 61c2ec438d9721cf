"""An algorithm: a loss, an advantage estimator, and the fields that both need."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from RL2.algorithms.advantages.returns import rewards_to_go
from RL2.algorithms.corrections import Corrections
from RL2.algorithms.estimator import Estimator, resolve_advantage
from RL2.algorithms.kl import approx_kl
from RL2.algorithms.losses.values import value
from RL2.algorithms.parameters import GIVEN_BY, OLD_STATISTICS, ROW_FIELDS, TEACHER_FIELDS
from RL2.algorithms.rewards import in_float32
from RL2.algorithms.segments import check_segments
from RL2.algorithms.token_loss import TokenLoss, resolve_loss
from RL2.config.schema.critic import CriticConfig
from RL2.config.schema.keys import keys_of
from RL2.runtime.errors import ConfigError, TrainingError
from RL2.runtime.user_code import Unfit

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Penalty:
    """The KL to the reference policy, subtracted from `reward` or `advantage` of each token."""

    coef: float
    where: str
    estimator: str
    clamp: float | None = None

    def __call__(self, batch: Batch) -> Tensor:
        kl = approx_kl(batch["old_logps"], batch["ref_logps"], self.estimator, self.clamp)
        return self.coef * kl * batch["action_mask"]


@dataclass(frozen=True)
class Algorithm:
    """How a run learns from a batch.

    Attributes:
        loss: what the actor minimises.
        advantage: batch -> advantages; None if batches bring their advantages.
        needs: what is computed after a batch is collected and before its advantages: by the name of
            the provider, the fields with their token statistics. One forward per provider.
        penalty: the KL penalty; None if there is none, or the KL is a part of the loss.
        value_loss: what the critic minimises; None without a critic.
        gamma: discounts the returns that it learns, if the estimator does not give them.
    """

    loss: TokenLoss
    advantage: Estimator | None = None
    needs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    penalty: Penalty | None = None
    value_loss: TokenLoss | None = None
    gamma: float = 1.0

    def advantages(self, batch: Batch | None) -> Batch | None:
        """The batch with `advantages [B, T]`, and with a critic `returns [B, T]`. They and the
        rewards, which were float64, become float32. None, on a rank without a batch, stays None.

        Raises:
            TrainingError: the estimator breaks its contract.
        """
        if batch is None or self.advantage is None:
            return batch
        rewards = batch["rewards"]
        penalty = None if self.penalty is None else self.penalty(batch)
        if penalty is not None and self.penalty.where == "reward":
            rewards = rewards - penalty
        try:
            found = self.advantage(batch | {"rewards": rewards})
        except Unfit as fault:
            raise TrainingError(f"{self.advantage.origin}: {fault}") from fault
        if self.value_loss is not None and "returns" not in found:
            mask, samples = batch["action_mask"], batch["sample_ids"]
            found["returns"] = rewards_to_go(rewards, mask, samples, self.gamma)
        found = {name: in_float32(x) for name, x in found.items()}
        if penalty is not None and self.penalty.where == "advantage":
            found["advantages"] = found["advantages"] - penalty
        several = ("reward_parts", "reward_weights")  # [B, K], which only an estimator reads
        kept = {name: x for name, x in batch.items() if name not in several}
        return kept | {"rewards": batch["rewards"].float(), **found}


def resolve_algorithm(config: DictConfig, brought: Collection[str]) -> Algorithm:
    """The algorithm of a run.

    brought: the fields that its source brings; what a loss names besides them is computed.

    Raises:
        ConfigError: a loss or an estimator that does not exist or names what this run does not
            have, or a key that would have no effect.
    """
    own = [name for name in brought if name not in (*ROW_FIELDS, "pair_ids", "chosen")]
    loss = resolve_loss(config.actor.loss, brought=own)
    estimator = None
    if "advantages" not in brought:
        if "adv" not in config:
            raise ConfigError(
                f"trainer.source={config.trainer.source}: brings no advantages, and this trainer "
                "has no adv that makes some; name them in its brings, and put them in its batches"
            )
        estimator = resolve_advantage(config.adv, own)
        check_estimator(config, estimator, brought)
    value_loss = resolve_value_loss(config, estimator)
    learned = () if value_loss is None else ("old_values", "returns")
    check_loss(config, loss, [*brought, *learned])
    needs = needed_fields(config, loss, estimator, brought)
    check_reference(config, needs)
    check_renewal(config, needs)
    check_teacher(config, loss, estimator, needs)
    check_rewards(config, loss, estimator)
    gamma = 1.0 if value_loss is None else config.adv.gamma
    return Algorithm(loss, estimator, needs, resolve_penalty(config), value_loss, gamma)


def resolve_value_loss(config: DictConfig, estimator: Estimator | None) -> TokenLoss | None:
    """What the critic learns; None if no estimator names its values."""
    if estimator is not None and estimator.has_critic:
        names = ("values", "old_values", "returns")
        return TokenLoss("value", partial(value, clip=config.critic.clip), names, origin="critic")
    if "critic" not in config:
        return None
    where = f"trainer.source={config.trainer.source}" if estimator is None else estimator.origin
    unset = OmegaConf.merge(config, {"critic": OmegaConf.structured(CriticConfig)})
    for name, key in keys_of(CriticConfig, "critic.").items():
        given = OmegaConf.select(config, name)
        if not key.is_group and given != OmegaConf.select(unset, name):
            raise ConfigError(
                f"{name}={given}: has no effect with {where}, which has no critic; leave it out, "
                "or use adv.estimator=gae"
            )
    return None


def resolve_penalty(config: DictConfig) -> Penalty | None:
    """What `actor.kl` subtracts from rewards or advantages."""
    kl = config.actor.get("kl")
    if kl is None or kl.coef == 0 or kl.type not in ("reward", "advantage"):
        return None
    return Penalty(kl.coef, str(kl.type), kl.reward_estimator, kl.get("clamp"))


def needed_fields(
    config: DictConfig,
    loss: TokenLoss,
    estimator: Estimator | None = None,
    brought: Collection[str] = (),
) -> dict[str, dict[str, str]]:
    """`Algorithm.needs`: log-probabilities, and other statistics of the policy before its updates,
    that are named and that no batch brings.

    `old_logps` are needed only if an estimator or the selection of a loss names them, if the policy
    moves away from the one that sampled (several optimizer steps per rollout, with a loss,
    importance weights or a KL that use them), if the KL enters rewards or advantages, or if
    importance weights are those of whole sequences. With one step they are the update's own,
    without a second forward.
    """
    actor, named = config.actor, {*loss.fields}
    tis = Corrections.of(actor)
    updates = actor.get("update_per_rollout", 1) * actor.get("epochs_per_rollout", 1)
    looks_back = (
        "old_logps" in named
        or tis.tis_coef > 0
        or actor.get("max_ratio") is not None
        or (actor.get("kl") or {}).get("unbiased", False)
    )
    made = [one for one in (estimator, loss.selection) if one is not None]
    of_estimator = {field for one in made for field in one.fields.values()}
    before, named = [], named | of_estimator
    if (
        (updates > 1 and looks_back)
        or resolve_penalty(config) is not None
        or "old_logps" in of_estimator
        or (tis.of_sequences and "llm_logps" in brought)
    ):
        before.append("old_logps")
    before += [name for name in OLD_STATISTICS if name in named]
    reference = []
    if "kl" in actor and actor.kl.coef > 0 or "ref_logps" in named:
        reference.append("ref_logps")
    teacher = [name for name in TEACHER_FIELDS if name in {*loss.fields} | of_estimator]
    statistics = OLD_STATISTICS | TEACHER_FIELDS
    providers = (("old_logps", before), ("ref_logps", reference), ("teacher_logps", teacher))
    needs = {
        provider: {name: statistics.get(name, "logps") for name in fields if name not in brought}
        for provider, fields in (*providers, ("mismatch_kl", {"mismatch_kl"} & named))
    }
    if "old_values" in of_estimator:
        needs["old_values"] = {"old_values": "values"}
    return {provider: fields for provider, fields in needs.items() if fields}


def check_renewal(config: DictConfig, needs: Collection[str]) -> None:
    """ConfigError if a reference would be renewed that nothing is compared with."""
    every = config.get("ref_actor", {}).get("renew_every", 0)
    if every and "ref_logps" not in needs:
        raise ConfigError(
            f"ref_actor.renew_every={every}: has no effect, as nothing is compared with the "
            "reference; set actor.kl.coef and actor.kl.type, or leave it out"
        )


def check_teacher(
    config: DictConfig,
    loss: TokenLoss,
    estimator: Estimator | None,
    needs: Mapping[str, Mapping[str, str]],
) -> None:
    """ConfigError if a teacher is needed and not there, or the other way round."""
    node, wanted = config.get("teacher"), needs.get("teacher_logps", {})
    name = None if node is None else node.model_name
    if wanted and name is None:
        of_loss = {*wanted} & {*loss.fields}
        raise ConfigError(
            f"{loss.origin if of_loss else estimator.origin}: needs {', '.join(sorted(wanted))} of "
            "a teacher, and teacher.model_name is null; set it to a model with the actor's "
            "vocabulary"
        )
    if name is not None and not wanted:
        estimated = "" if estimator is None else f" and {estimator.origin}"
        raise ConfigError(
            f"teacher.model_name={name}: has no effect with {loss.origin}{estimated}, which name "
            f"none of {', '.join(TEACHER_FIELDS)}; use another loss or estimator, or leave it out"
        )
    if node is not None and node.top_k is not None and "teacher_top_ids" not in wanted:
        raise ConfigError(
            f"teacher.top_k={node.top_k}: has no effect without a loss such as topk_kl; leave "
            "it out"
        )


def check_rewards(config: DictConfig, loss: TokenLoss, estimator: Estimator | None) -> None:
    """ConfigError if something reads the rewards of a run without any."""
    if "rollout" not in config or config.rollout.env_path is not None:
        return
    for one in (loss, estimator):
        if one is not None and {"rewards", "correct"} & {*one.inputs}:
            raise ConfigError(
                f"rollout.env_path=null: {one.origin} reads rewards, and without an environment "
                "every sample gets 0; give one, such as envs/gsm8k.py"
            )


def check_estimator(config: DictConfig, estimator: Estimator, brought: Collection[str]) -> None:
    """ConfigError if this run cannot give an estimator, or a selection, what it names."""
    there = {"action_mask", "sample_ids", "lengths", *brought}
    there |= {"advantages"} if "adv" in config and estimator.what != "advantages" else set()
    there |= {"old_logps", *OLD_STATISTICS, "ref_logps", *TEACHER_FIELDS}
    there |= {"old_values"} if "critic" in config else set()
    missing = sorted({*estimator.fields.values()} - there)
    for name in missing:
        if name in GIVEN_BY:
            raise ConfigError(f"{estimator.origin}: needs {name}; set {GIVEN_BY[name]} as well")
    if missing:
        raise ConfigError(
            f"{estimator.origin}: needs {', '.join(missing)}, which "
            f"trainer.source={config.trainer.source} does not bring; use another estimator, or a "
            "source that names them in its brings"
        )


# A loss that learns from the answers of a source has this head and names one of these, such as...
_OF_SOURCE = {
    "pairs": ("token_stats", {"pairs", "labels"}, "dpo, dpop, ipo, simpo, orpo or kto"),
    "scored_pairs": ("scalar", {"pairs"}, "bradley_terry"),
    "labels": ("token_stats", {"labels"}, "kto"),
}


def check_answers(config: DictConfig, loss: TokenLoss) -> None:
    """ConfigError if a loss would learn from rejected answers as it does from chosen ones, or at
    the wrong tokens."""
    source = str(config.get("trainer", {}).get("source"))
    if source not in _OF_SOURCE:
        return
    head, names, losses = _OF_SOURCE[source]
    if loss.head != head or not names & {*loss.inputs}:
        what = "values" if head == "scalar" else "token statistics"
        raise ConfigError(
            f"{loss.origin}: does not fit trainer.source={source}, whose losses take {what} and "
            f"{' or '.join(sorted(names))}; use {losses}"
        )


def check_reference(config: DictConfig, needs: Collection[str]) -> None:
    """ConfigError if a reference policy of its own would not be used."""
    name, own = (config.get(node, {}).get("model_name") for node in ("ref_actor", "actor"))
    if name not in (None, own) and "ref_logps" not in needs:
        raise ConfigError(
            f"ref_actor.model_name={name}: has no effect, as neither the loss nor actor.kl uses a "
            "reference; leave it out"
        )


def check_loss(config: DictConfig, loss: TokenLoss, brought: Collection[str]) -> None:
    """ConfigError if this run cannot give the loss what it names, or would ignore a key."""
    actor = config.actor
    if loss.head == "scalar" and "rollout" in config:
        raise ConfigError(
            f"{loss.origin}: takes values, one number a token, but the actor of this trainer writes"
            " text; use a loss over token statistics (what its critic says is old_values)"
        )
    of_logits = {"entropy.coef": 0.0, "temperature": 1.0, "token_stats": "auto"}
    for name, neutral in of_logits.items() if loss.head == "scalar" else ():
        given = OmegaConf.select(actor, name, default=neutral)
        if given != neutral:
            raise ConfigError(
                f"actor.{name}={given}: has no effect with {loss.origin}, whose model gives values "
                "and no distribution; leave it out"
            )
    if loss.draws and actor.get("tp_size", 1) > 1:
        raise ConfigError(
            f"actor.tp_size={actor.tp_size}: the loss {loss.name} draws random numbers, and "
            "ranks that share their tokens would draw other numbers; use actor.tp_size=1, or a "
            "torch.Generator with a seed"
        )
    check_answers(config, loss)
    there = {"old_logps", *OLD_STATISTICS, "ref_logps", *TEACHER_FIELDS, *brought}
    there |= {"advantages"} if "adv" in config else set()
    if loss.selection is not None:
        check_estimator(config, loss.selection, brought)
        there |= {"selected"}
    there |= {"mismatch_kl"} if "labels" in brought else set()
    missing = sorted(set(loss.fields) - there)
    if "critic" in config and {"old_values", "returns"} & {*missing}:
        raise ConfigError(
            f"actor.loss: {loss.name} needs {', '.join(missing)}, and this run has no critic; set "
            "adv.estimator=gae, or use an estimator that names values"
        )
    if missing:
        trainer = "" if "rollout" in config else ", or a trainer with rollouts"
        trainer = ", or the trainer dpo" if "labels" in missing else trainer
        raise ConfigError(
            f"actor.loss: {loss.name} needs {', '.join(missing)}, which "
            f"trainer.source={config.trainer.source} does not bring; use a loss over token "
            f"statistics{trainer}"
        )
    check_segments(config, loss, brought)
    kl = actor.get("kl")
    blind = actor.avg_level == "correct" and not loss.uses_advantages
    if blind and kl is not None and kl.coef > 0 and kl.type != "loss":
        raise ConfigError(
            f"actor.kl.type={kl.type}: has no effect with actor.avg_level=correct and the loss "
            f"{loss.name}, which do not read the advantages; use actor.kl.type=loss"
        )
