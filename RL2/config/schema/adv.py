"""`adv`: from rewards to advantages."""

from dataclasses import dataclass
from typing import Any

from RL2.config.schema.keys import ABOVE_ZERO, FRACTION, Range, by_trainer, key


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
    gamma: float = key(1.0, "discount, for gae and reinforce_pp", FRACTION)
    lamda: float = key(1.0, "lambda of GAE, for estimators with a critic", FRACTION)
    global_norm: bool = key(False, "reinforce: subtract the mean of the batch, not of the prompt")
    norm_var: bool = key(
        False,
        "reinforce: divide by the standard deviation (equal rewards, up to rounding, give 0)",
    )
    k: int | None = key(
        None,
        "pass_k: how many attempts there are, at most train_data.responses_per_prompt; null: 2",
        Range(lambda x: x >= 2, "be 2 or more", "; k=1 is adv.estimator=rloo"),
    )
    teacher_coef: float | None = key(
        None,
        "reverse_kl, reinforce_reverse_kl: weight of the teacher's part; null: 1",
        ABOVE_ZERO,
    )
    options: dict[str, Any] = key(
        {}, "keyword arguments for your own estimator, e.g. adv.options.beta=0.1"
    )
