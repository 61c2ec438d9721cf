"""What a config adds around a token loss: importance weights, entropy bonus and KL penalty."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from RL2.algorithms.importance import TIS_TYPES, importance_weights
from RL2.algorithms.kl import approx_kl


@dataclass(frozen=True)
class Corrections:
    """All off by default; the attributes are the keys of `actor` with the same names."""

    tis_coef: float = 0.0
    tis_type: str = "truncate"
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_type: str | None = None
    kl_loss_estimator: str = "k2"

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
            "kl_coef": kl.get("coef"),
            "kl_type": kl.get("type"),
            "kl_loss_estimator": kl.get("loss_estimator"),
        }
        return cls(**{name: value for name, value in found.items() if value is not None})


def penalised(
    losses: Tensor, tokens: Mapping[str, Tensor], corrections: Corrections
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses `[N]` of tokens with entropy bonus and KL penalty, and the sums of their metrics.

    Args:
        tokens: `[N]` each: `logps`, `entropy`, `old_logps` and, if they exist, `llm_logps` and
            `ref_logps`.
    """
    logps, entropy = tokens["logps"], tokens["entropy"]
    metrics = {"actor/entropy": entropy.sum()}
    if "llm_logps" in tokens:
        # k3 on the engine's own samples: KL(engine || trainer), zero if both are one policy
        kl = approx_kl(tokens["llm_logps"], tokens["old_logps"], "k3")
        metrics["rollout/llm_kl"] = kl.sum()
    if corrections.entropy_coef != 0:  # else entropy is a metric, and costs no gradient
        losses = losses - corrections.entropy_coef * entropy
    if "ref_logps" in tokens:
        kl = approx_kl(logps, tokens["ref_logps"], corrections.kl_loss_estimator)
        metrics["actor/kl"] = kl.sum()
        if corrections.kl_type == "loss":
            losses = losses + corrections.kl_coef * kl
    return losses, metrics


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
