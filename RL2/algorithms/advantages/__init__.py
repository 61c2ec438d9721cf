"""Advantage estimators: one pure function each.

The names of an estimator's positional parameters say what it needs of a rollout's batch
(`RL2.algorithms.parameters` lists them): `rewards [B, T]`, `action_mask [B, T]`, `sample_ids [B]`,
`entropy [B, T]` and so on. Rows are token sequences; the rows of one multi-turn sample share their
sample id, the samples of one prompt their group id. Its keyword-only parameters are options, read
from `adv.*` and `adv.options.*`. It returns the advantages `[B, T]`; those where `action_mask` is
False are not read.

One that names `values [B, T]` gets what a critic says of each token before it is written, and the
run trains one. It may return `(advantages, {"returns": [B, T]})`, which the critic learns; without
them it learns the rewards to come, discounted by `adv.gamma`.

    def surprised(rewards, action_mask, entropy, turn_ids, *, bonus=0.1):
        first = (turn_ids == 0).float()
        return (rewards.sum(-1, keepdim=True) + bonus * entropy * first) * action_mask

is a complete example, which a run uses with `adv.import_path=my_estimator.py:surprised`.
"""

from collections.abc import Callable
from typing import Any

from RL2.algorithms.advantages.attempts import maxrl, pass_k
from RL2.algorithms.advantages.baselines import opo, reinforce, remax, rloo, spo
from RL2.algorithms.advantages.distillation import ones, reinforce_reverse_kl, reverse_kl
from RL2.algorithms.advantages.gae import gae
from RL2.algorithms.advantages.plus_plus import reinforce_pp, reinforce_pp_baseline
from RL2.algorithms.advantages.several import gdpo

ADVANTAGES: dict[str, Callable[..., Any]] = {
    "reinforce": reinforce,
    "spo": spo,
    "gae": gae,
    "rloo": rloo,
    "opo": opo,
    "remax": remax,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "maxrl": maxrl,
    "pass_k": pass_k,
    "gdpo": gdpo,
    "reverse_kl": reverse_kl,
    "reinforce_reverse_kl": reinforce_reverse_kl,
    "ones": ones,
}
