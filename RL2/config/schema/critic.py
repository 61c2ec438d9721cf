"""`critic`: the model whose values are the baseline of `adv.estimator=gae`."""

from dataclasses import dataclass

from RL2.config.schema.actor import TrainedModelConfig
from RL2.config.schema.keys import (
    ABOVE_ZERO,
    FROM_ONE,
    FROM_ZERO,
    follow,
    following,
    key,
    keys_of,
)

# What only a policy has, or what differs from it.
_OWN = ("temperature", "token_stats", "entropy", "avg_level", "lr", "freeze_steps")


@dataclass
class CriticConfig(following(TrainedModelConfig, "actor", without=_OWN)):
    """A model with one number a token. It begins as the actor's, with a head of zeros."""

    max_inference_length_per_device: int = follow(
        "critic.max_length_per_device", "tokens in one forward without gradients", FROM_ONE
    )
    update_per_rollout: int = follow("actor.update_per_rollout", within=FROM_ONE)
    epochs_per_rollout: int = follow("actor.epochs_per_rollout", within=FROM_ONE)
    avg_level: str = key("token", "what the summed loss is divided by")
    lr: float = key(5e-6, "peak learning rate of AdamW", keys_of(TrainedModelConfig)["lr"].within)
    freeze_steps: int = key(
        0, "first steps without training (actor.freeze_steps=4 trains the critic alone)", FROM_ZERO
    )
    clip: float = key(
        0.5,
        "how far a value may move from that before the update; beyond it, the larger of the two "
        "squared errors counts",
        ABOVE_ZERO,
    )
