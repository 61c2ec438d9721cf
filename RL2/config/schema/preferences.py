"""`actor` of dpo and rm, and their losses."""

from dataclasses import dataclass

from RL2.config.schema.actor import LossChoice, TrainedModelConfig
from RL2.config.schema.keys import ABOVE_ZERO, FROM_ONE, FROM_ZERO, Range, follow, group, key

_TWO_SEQUENCES = (
    "tokens in one training forward on a rank; times sp_size, this must hold both sequences of a "
    "pair"
)


@dataclass
class PreferenceLossConfig(LossChoice):
    beta: float | None = key(
        None,
        "weight of the log-ratios (simpo: of the mean log-probabilities; orpo: of the odds ratio); "
        "null: 0.1, and 2.0 for simpo",
        ABOVE_ZERO,
    )
    label_smoothing: float | None = key(
        None,
        "dpo, dpop, simpo: the share of pairs whose labels are thought to be wrong; null: 0",
        Range(lambda x: 0 <= x < 0.5, "be 0 or more and below 0.5"),
    )
    dpop_lambda: float | None = key(
        None,
        "dpop: weight of what a chosen answer has lost against the reference, inside of beta; "
        "null: 50",
        FROM_ZERO,
    )
    length_normalized: bool | None = key(
        None, "ipo: mean log-ratios of an answer in place of sums, as TRL has it; null: false"
    )
    gamma: float | None = key(
        None,
        "simpo: the margin that the chosen answer's reward must have; null: 1.0",
        FROM_ZERO,
    )
    desirable_weight: float | None = key(
        None, "kto: weight of the losses of desirable answers; null: 1.0", ABOVE_ZERO
    )
    undesirable_weight: float | None = key(
        None, "kto: weight of the losses of undesirable answers; null: 1.0", ABOVE_ZERO
    )


@dataclass
class PairModelConfig(TrainedModelConfig):
    """A model that learns from pairs, which are never split."""

    max_length_per_device: int = key("${twice:${data.max_length}}", _TWO_SEQUENCES, FROM_ONE)


@dataclass
class DPOActorConfig(PairModelConfig):
    max_inference_length_per_device: int = follow(
        "actor.max_length_per_device", "tokens in one forward without gradients", FROM_ONE
    )
    loss: PreferenceLossConfig = group(PreferenceLossConfig)


@dataclass
class RewardLossConfig(LossChoice):
    center_rewards_coefficient: float | None = key(
        None,
        "bradley_terry: weight of the squared sum of both scores, which keeps scores around 0; "
        "null: 0",
        FROM_ZERO,
    )


@dataclass
class RewardActorConfig(PairModelConfig):
    loss: RewardLossConfig = group(RewardLossConfig)
