"""Token losses: one pure function each.

The names of a loss's positional parameters say what it needs: token statistics
(`RL2.ops.STATISTICS`) and batch fields (`RL2.algorithms.FIELDS`), all flat float tensors `[N]`,
one entry per action token; those with several numbers per token are `[N, K]`. Its keyword-only
parameters are options, read from `actor.loss.*`; a loss that takes `top_logps` says with its option
`max_rank` how many columns K it wants. It returns the losses `[N]`, or `(losses, {metric: [N]})`.
How tokens are averaged, the advantage that multiplies a loss which does not take `advantages`
itself, importance weights and the entropy bonus are applied outside. A loss of sequences, groups or
pairs names those as well: `RL2.algorithms.segments`. One that treats some tokens of the whole batch
in another way names `selected`: `RL2.algorithms.losses.selection`.

    def my_loss(logps, log1mps, advantages, *, margin=0.1):
        return -advantages * (logps - log1mps).clamp(max=margin)

is a complete example, which a run uses with `actor.loss.import_path=my_loss.py:my_loss`.
"""

from collections.abc import Callable
from typing import Any

from RL2.algorithms.losses.distillation import topk_jsd, topk_kl
from RL2.algorithms.losses.exploring_paths import fixed_target_kl, max_target_kl, rank_jsd
from RL2.algorithms.losses.gates import dppo, sapo
from RL2.algorithms.losses.policy import nll, ppo
from RL2.algorithms.losses.preferences import (
    bradley_terry,
    dpo,
    dpop,
    ipo,
    kto,
    orpo,
    simpo,
)
from RL2.algorithms.losses.ratios import cispo, gmpo, gspo, gspo_token
from RL2.algorithms.losses.selection import clip_cov, entropy_80_20, kl_cov

LOSSES: dict[str, Callable[..., Any]] = {
    "ppo": ppo,
    "max_target_kl": max_target_kl,
    "fixed_target_kl": fixed_target_kl,
    "rank_jsd": rank_jsd,
    "nll": nll,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "gmpo": gmpo,
    "cispo": cispo,
    "sapo": sapo,
    "dppo": dppo,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "entropy_80_20": entropy_80_20,
    "dpo": dpo,
    "dpop": dpop,
    "ipo": ipo,
    "simpo": simpo,
    "orpo": orpo,
    "kto": kto,
    "bradley_terry": bradley_terry,
    "topk_kl": topk_kl,
    "topk_jsd": topk_jsd,
}
