"""What a config adds around a token loss: importance weights, entropy bonus and KL penalty."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from RL2.algorithms.importance import TIS_TYPES, importance_weights
from RL2.algorithms.kl import approx_kl
from RL2.algorithms.reductions import weighted_sum


@dataclass(frozen=True)
class Corrections:
    """All off by default; the attributes are the keys of `actor` with the same names."""

    tis_coef: float = 0.0
    tis_type: str = "truncate"
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_type: str | None = None
    kl_loss_estimator: str = "k2"
    kl_clamp: float | None = None
    kl_avg_level: str | None = None
    kl_unbiased: bool = False

    @property
    def of_sequences(self) -> bool:
        """Whether importance weights need the log-probabilities of whole sequences."""
        return self.tis_coef > 0 and TIS_TYPES[self.tis_type].level != "token"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Corrections":
        """The corrections of an `actor` node; what it does not have, such as in sft, is off."""
        kl, entropy = config.get("kl") or {}, config.get("entropy") or {}
        found = {
            "tis_coef": config.get("tis_coef"),
            "tis_type": config.get("tis_type"),
            "entropy_coef": entropy.get("coef"),
        }
        names = ("coef", "type", "loss_estimator", "clamp", "avg_level", "unbiased")
        found |= {f"kl_{name}": kl.get(name) for name in names}
        return cls(**{name: value for name, value in found.items() if value is not None})


def penalised(
    losses: Tensor, tokens: Mapping[str, Tensor], corrections: Corrections
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of losses `[N]` of tokens with entropy bonus and KL penalty, and the sums of
    their metrics.

    Args:
        tokens: `[N]` each: `logps`, `entropy`, `old_logps`, `loss_weights` and, if they exist,
            `llm_logps`, `ref_logps`, and `kl_weights`, by which the KL is then summed.
    """
    logps, entropy = tokens["logps"], tokens["entropy"]
    penalty, metrics = 0.0, {"actor/entropy": entropy.sum()}
    if "llm_logps" in tokens:
        # k3 on the engine's own samples: KL(engine || trainer), zero if both are one policy
        kl = approx_kl(tokens["llm_logps"], tokens["old_logps"], "k3")
        metrics["rollout/llm_kl"] = kl.sum()
    if corrections.entropy_coef != 0:  # else entropy is a metric, and costs no gradient
        losses = losses - corrections.entropy_coef * entropy
    if "ref_logps" in tokens:
        estimator, clamp = corrections.kl_loss_estimator, corrections.kl_clamp
        kl = approx_kl(logps, tokens["ref_logps"], estimator, clamp)
        metrics["actor/kl"] = kl.sum()
        if corrections.kl_unbiased:
            kl = kl * (logps - tokens["old_logps"]).exp()
        if corrections.kl_type == "loss" and "kl_weights" in tokens:
            penalty = corrections.kl_coef * weighted_sum(kl, tokens["kl_weights"])
        elif corrections.kl_type == "loss":
            losses = losses + corrections.kl_coef * kl
    return weighted_sum(losses, tokens["loss_weights"]) + penalty, metrics


def reweighted(
    losses: Tensor,
    old_logps: Tensor,
    llm_logps: Tensor,
    corrections: Corrections,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Losses times their importance weights; and 1 where a weight is 0, if it may be. All
    `[n]`: of tokens, or of sequences with the means of their tokens' log-probabilities, so that a
    sequence's ratio is the geometric mean of its tokens'. weights: those of whole sequences."""
    if corrections.tis_coef <= 0:
        return losses, None
    kind = corrections.tis_type
    if weights is None:
        weights = importance_weights(old_logps, llm_logps, corrections.tis_coef, kind)
    losses = losses.masked_fill(weights == 0, 0.0) * weights
    return losses, (weights == 0).to(weights) if TIS_TYPES[kind].leaves_out else None
