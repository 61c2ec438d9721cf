"""The keys whose values are names in a registry, and that registry."""

import pkgutil
from collections.abc import Mapping
from typing import Any

# By key: the registry, and the words that the key takes besides its names.
REGISTRIES: dict[str, tuple[str, ...]] = {
    "actor.loss.name": ("RL2.algorithms.losses:LOSSES",),
    "actor.avg_level": ("RL2.algorithms.reductions:AVG_LEVELS",),
    "critic.avg_level": ("RL2.algorithms.reductions:AVG_LEVELS",),
    "actor.tis_type": ("RL2.algorithms.importance:TIS_TYPES",),
    "actor.kl.reward_estimator": ("RL2.algorithms.kl:KL_ESTIMATORS",),
    "actor.kl.loss_estimator": ("RL2.algorithms.kl:KL_ESTIMATORS",),
    "actor.kl.avg_level": ("RL2.algorithms.reductions:KL_LEVELS",),
    "actor.token_stats": ("RL2.ops.token_stats.linear:IMPLEMENTATIONS", "auto"),
    "ref_actor.token_stats": ("RL2.ops.token_stats.linear:IMPLEMENTATIONS", "auto"),
    "teacher.token_stats": ("RL2.ops.token_stats.linear:IMPLEMENTATIONS", "auto"),
    "rollout.engine": ("RL2.config.engines:ENGINES", "auto"),
    "trainer.trackers": ("RL2.trainer.sinks.registry:SINKS",),
    "trainer.source": ("RL2.trainer.sources.registry:SOURCES",),
    "adv.estimator": ("RL2.algorithms.advantages:ADVANTAGES",),
}


def registry_of(key: str) -> Mapping[str, Any] | None:
    """What a key may name; None if its values are in no registry. The registry is imported on
    demand, since torch takes seconds."""
    if key not in REGISTRIES:
        return None
    location, *others = REGISTRIES[key]
    return dict.fromkeys(others) | pkgutil.resolve_name(location)
