"""Weights for tokens that were sampled from another distribution than the trained one."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Rule = Callable[[Tensor, float], Tensor]


def _truncate(ratio: Tensor, bound: float) -> Tensor:
    return ratio.clamp(max=bound)


def _mask(ratio: Tensor, bound: float) -> Tensor:
    return ratio.masked_fill((ratio > bound) | (ratio < 1 / bound), 0.0)


def _reject(ratio: Tensor, bound: float) -> Tensor:
    return ((ratio <= bound) & (ratio >= 1 / bound)).to(ratio)


@dataclass(frozen=True)
class TISType:
    """From ratios to weights.

    Attributes:
        rule: of a ratio and the bound C.
        help: what it does, for users.
        level: whose ratio it is: that of each `token`, for all tokens of a sequence the product of
            their ratios (`sequence`) or its geometric mean (`geometric`), or the smallest weight of
            all tokens (`worst`).
    """

    rule: Rule
    help: str
    level: str = "token"

    @property
    def leaves_out(self) -> bool:
        """Whether a weight may be 0."""
        return self.rule is not _truncate


_OF_A_SEQUENCE = "for all tokens of a sequence"

TIS_TYPES: dict[str, TISType] = {
    "truncate": TISType(_truncate, "ratios above C count as C"),
    "mask": TISType(_mask, "tokens outside of 1/C to C count for nothing"),
    "sequence_truncate": TISType(
        _truncate, f"{_OF_A_SEQUENCE} the product of their ratios, at most C", "sequence"
    ),
    "sequence_mask": TISType(_mask, "the same product, 0 outside of 1/C to C", "sequence"),
    "sequence_reject": TISType(_reject, "1, or 0 where the product is outside", "sequence"),
    "geometric_truncate": TISType(
        _truncate, f"{_OF_A_SEQUENCE} the geometric mean of their ratios, at most C", "geometric"
    ),
    "geometric_mask": TISType(_mask, "the same mean, 0 outside of 1/C to C", "geometric"),
    "geometric_reject": TISType(_reject, "1, or 0 where the mean is outside", "geometric"),
    "token_reject": TISType(_reject, "1, or 0 where the ratio of any token is outside", "worst"),
}


def importance_weights(old_logps: Tensor, llm_logps: Tensor, bound: float, kind: str) -> Tensor:
    """Weight of each element, from its ratio r = exp(old_logps - llm_logps), without gradient.

    `truncate`: min(r, bound), truncated importance sampling (Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training"). What lies beyond stays, with a bias.
    `mask`: r where 1/bound <= r <= bound, else 0, double-sided masking (IcePop; Ling Team 2025,
    "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model",
    arXiv:2510.18855). On such tokens the engine and the trainer disagree, so they teach nothing.
    `reject`: 1 there, else 0. The `kind` says which of them, and for which ratio; here each
    element has a ratio of its own.

    Args:
        old_logps: those of the trainer before the first update with these tokens. A loss that names
            old_logps has a ratio of its own for later updates, which would count twice here.
        llm_logps: those of the engine that sampled them.
        bound: C, 1 or more for all but `truncate`.
    """
    return TIS_TYPES[kind].rule((old_logps.detach() - llm_logps).exp(), bound)


def sequence_weights(
    old_logps: Tensor,
    llm_logps: Tensor,
    action_mask: Tensor,
    sample_ids: Tensor,
    bound: float,
    kind: str,
) -> Tensor:
    """The same weight for all action tokens of a sample, `[B, T]`; 0 elsewhere.

    With all tokens of the batch, since a sequence may be several rows of it. The product of the
    ratios has the variance of all tokens together: long sequences are soon beyond any bound. Their
    geometric mean is biased, and stays near 1 (Liu et al. 2025, "When Speed Kills Stability:
    Demystifying RL Collapse from the Training-Inference Mismatch").

    Args:
        old_logps, llm_logps: `[B, T]`; see `importance_weights`. action_mask: `[B, T]`.
        sample_ids: `[B]`, the sample that each row belongs to.
        kind: a type whose level is not `token`.
    """
    sample = sample_ids.unique(return_inverse=True)[1]
    n = int(sample.max()) + 1
    difference = (old_logps - llm_logps).double().masked_fill(~action_mask, 0.0)
    level, rule = TIS_TYPES[kind].level, TIS_TYPES[kind].rule
    if level == "worst":
        of_tokens = rule(difference.exp(), bound).masked_fill(~action_mask, 1.0).amin(-1)
        weights = of_tokens.new_ones(n).scatter_reduce(0, sample, of_tokens, "amin")
    else:
        sums = difference.new_zeros(n).index_add(0, sample, difference.sum(-1))
        if level == "geometric":
            counts = difference.new_zeros(n).index_add(0, sample, action_mask.sum(-1).double())
            sums = sums / counts.clamp(min=1)
        weights = rule(sums.exp(), bound)
    return (weights[sample].unsqueeze(-1) * action_mask).float()
