"""Pure functions of tensors: token losses, advantages, reductions, KL estimators."""

from RL2.algorithms.advantages import ADVANTAGES
from RL2.algorithms.advantages.returns import sample_returns
from RL2.algorithms.estimator import Estimator, resolve_advantage
from RL2.algorithms.importance import TIS_TYPES, importance_weights
from RL2.algorithms.kl import KL_ESTIMATORS, approx_kl
from RL2.algorithms.losses import LOSSES
from RL2.algorithms.parameters import ESTIMATOR_FIELDS, FIELDS
from RL2.algorithms.reductions import AVG_LEVELS, token_weights, weighted_sum
from RL2.algorithms.token_loss import TokenLoss, resolve_loss

__all__ = [
    "ADVANTAGES",
    "AVG_LEVELS",
    "ESTIMATOR_FIELDS",
    "FIELDS",
    "Estimator",
    "KL_ESTIMATORS",
    "LOSSES",
    "TIS_TYPES",
    "TokenLoss",
    "approx_kl",
    "importance_weights",
    "resolve_advantage",
    "resolve_loss",
    "sample_returns",
    "token_weights",
    "weighted_sum",
]
