"""Token losses: one pure function each.

The names of a loss's positional parameters say what it needs: token statistics
(`RL2.ops.STATISTICS`) and batch fields (`RL2.algorithms.FIELDS`), all flat float tensors `[N]`,
one entry per action token; `top_logps` alone is `[N, K]`. Its keyword-only parameters are options,
read from `actor.loss.*`; a loss that takes `top_logps` says with its option `max_rank` how many
columns K it wants. It returns the losses `[N]`, or `(losses, {metric: [N]})`. How tokens are
averaged, the advantage that multiplies a loss which does not take `advantages` itself, importance
weights and the entropy bonus are applied outside. A loss of sequences, groups or pairs names those
as well: `RL2.algorithms.segments`.

    def my_loss(logps, log1mps, advantages, *, margin=0.1):
        return -advantages * (logps - log1mps).clamp(max=margin)

is a complete example, which a run uses with `actor.loss.import_path=my_loss.py:my_loss`.
"""

from collections.abc import Callable
from typing import Any

from RL2.algorithms.losses.exploring_paths import fixed_target_kl, max_target_kl, rank_jsd
from RL2.algorithms.losses.policy import nll, ppo

LOSSES: dict[str, Callable[..., Any]] = {
    "ppo": ppo,
    "max_target_kl": max_target_kl,
    "fixed_target_kl": fixed_target_kl,
    "rank_jsd": rank_jsd,
    "nll": nll,
}
