"""Models spread over all ranks, frozen or trained, and what each does in a step."""

from RL2.workers.actor import Actor
from RL2.workers.critic import Critic
from RL2.workers.learner import Learner
from RL2.workers.reference import Reference
from RL2.workers.sharded_model import ShardedModel

__all__ = ["Actor", "Critic", "Learner", "Reference", "ShardedModel"]
