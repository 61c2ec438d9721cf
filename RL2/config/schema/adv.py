"""`adv`: from rewards to advantages."""

from dataclasses import dataclass
from typing import Any

from RL2.config.schema.keys import FRACTION, by_trainer, key


@dataclass
class AdvConfig:
    estimator: str = by_trainer(
        "how rewards become advantages", own="adv.import_path=my_estimator.py:my_estimator"
    )
    import_path: str | None = key(
        None,
        "your own estimator (file.py:function or package.module:function), used instead of "
        "estimator",
        code=True,
    )
    gamma: float = key(1.0, "discount, for estimators with a critic", FRACTION)
    lamda: float = key(1.0, "lambda of GAE, for estimators with a critic", FRACTION)
    global_norm: bool = key(False, "reinforce: subtract the mean of the batch, not of the prompt")
    norm_var: bool = key(
        False,
        "reinforce: divide by the standard deviation (equal rewards, up to rounding, give 0)",
    )
    options: dict[str, Any] = key(
        {}, "keyword arguments for your own estimator, e.g. adv.options.beta=0.1"
    )
