"""Losses over pairs of a chosen and a rejected answer, and over answers labelled good or bad.

A reward is beta times the summed log-ratio of policy and reference, or what stands in its place.
Of each pair the metrics are the rewards and summed log-probabilities of its two answers, their
difference `margin`, and `accuracy`, 1 if the chosen answer has the larger reward.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from RL2.algorithms.segments import Pairs, Segments

Result = tuple[Tensor, dict[str, Tensor]]


def dpo(
    logps: Tensor,
    ref_logps: Tensor,
    sequences: Segments,
    pairs: Pairs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Result:
    """Direct preference optimization (Rafailov et al. 2023): -log sigmoid(beta z) with z the
    difference of the summed log-ratios of chosen and rejected answer.

    `label_smoothing` is the share of labels that are thought to be wrong (conservative DPO,
    Mitchell 2023): (1 - eps) of the loss above, and eps of that of the swapped pair.
    """
    ratios = sequences.sum(logps - ref_logps)
    z = pairs.difference(ratios)
    return _logistic(beta * z, label_smoothing), _metrics(beta * ratios, logps, sequences, pairs)


def dpop(
    logps: Tensor,
    ref_logps: Tensor,
    sequences: Segments,
    pairs: Pairs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    dpop_lambda: float = 50.0,
) -> Result:
    """DPO-Positive (Pal et al. 2024): `dpo` with z less dpop_lambda times what the chosen answer
    has lost against the reference, max(0, ref - logp) of its sums.

    The metric `penalty` is that loss of log-probability, without dpop_lambda and beta.
    """
    ratios = sequences.sum(logps - ref_logps)
    lost = (-pairs.chosen(ratios)).relu()
    z = pairs.difference(ratios) - dpop_lambda * lost
    metrics = _metrics(beta * ratios, logps, sequences, pairs)
    return _logistic(beta * z, label_smoothing), metrics | {"penalty": lost}


def ipo(
    logps: Tensor,
    ref_logps: Tensor,
    sequences: Segments,
    pairs: Pairs,
    *,
    beta: float = 0.1,
    length_normalized: bool = False,
) -> Result:
    """Identity preference optimization (Azar et al. 2023): (z - 1 / (2 beta))^2 with the z of
    `dpo`, or with `length_normalized` that of mean log-ratios."""
    ratios = logps - ref_logps
    ratios = sequences.mean(ratios) if length_normalized else sequences.sum(ratios)
    losses = (pairs.difference(ratios) - 0.5 / beta).square()
    return losses, _metrics(beta * ratios, logps, sequences, pairs)


def simpo(
    logps: Tensor,
    sequences: Segments,
    pairs: Pairs,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> Result:
    """Simple preference optimization, SimPO (Meng et al. 2024): -log sigmoid of the margin less
    gamma, where a reward is beta times the mean log-probability of an answer's tokens. It has no
    reference."""
    rewards = beta * sequences.mean(logps)
    losses = _logistic(pairs.difference(rewards) - gamma, label_smoothing)
    return losses, _metrics(rewards, logps, sequences, pairs)


def orpo(logps: Tensor, sequences: Segments, pairs: Pairs, *, beta: float = 0.1) -> Result:
    """Odds ratio preference optimization, ORPO (Hong et al. 2024): the mean negative log-likelihood
    of the chosen answer's tokens, plus beta times -log sigmoid of the log odds ratio, where an
    answer's odds are p / (1 - p) and log p is the mean log-probability of its tokens. It has no
    reference.

    A p that is 1 up to rounding counts as the largest number below 1, with zero gradient of its
    odds. A reward is beta log p. The metric `odds_ratio` is the log odds ratio.
    """
    means = sequences.mean(logps)
    odds = pairs.difference(_log_odds(means))
    losses = -pairs.chosen(means) - beta * logsigmoid(odds)
    metrics = _metrics(beta * means, logps, sequences, pairs)
    return losses, metrics | {"odds_ratio": odds}


def kto(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    mismatch_kl: Tensor,
    sequences: Segments,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Result:
    """KTO, Kahneman-Tversky optimization (Ethayarajh et al. 2024): weight times
    1 - sigmoid(beta (r - kl)) for a good answer, with kl - r in the place of r - kl for a bad one,
    where r is its summed log-ratio.

    Args:
        labels: above 0 for a good answer.
        mismatch_kl: an estimate of the KL between policy and reference, 0 or more, without
            gradient: see `RL2.trainer.references`.
    """
    ratios = sequences.sum(logps - ref_logps)
    kl, good = sequences.mean(mismatch_kl), sequences.mean(labels) > 0
    gains = torch.where(good, ratios - kl, kl - ratios)
    weights = torch.where(good, desirable_weight, undesirable_weight)
    right = gains.detach() > 0
    metrics = {"rewards": beta * ratios, "accuracy": right, "mismatch_kl": kl}
    return weights * (-beta * gains).sigmoid(), metrics


def bradley_terry(
    values: Tensor, sequences: Segments, pairs: Pairs, *, center_rewards_coefficient: float = 0.0
) -> Result:
    """The likelihood of preferences (Bradley and Terry 1952), for a reward model: -log sigmoid of
    the difference of the scores of chosen and rejected answer.

    `center_rewards_coefficient` times the squared sum of both scores is added, which keeps scores
    around 0 (Eisenstein et al. 2023).
    """
    scores = sequences.sum(values)
    margin = pairs.difference(scores)
    losses = -logsigmoid(margin) + center_rewards_coefficient * pairs.sum(scores).square()
    return losses, _rewards(scores, pairs)


def _logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: must be 0 or more and below 0.5")
    losses = -(1 - label_smoothing) * logsigmoid(margin)
    return losses - label_smoothing * logsigmoid(-margin) if label_smoothing else losses


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, exact where p is near 0 or 1."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    near_one = logps > -math.log(2)
    # Both branches are computed: each must be finite where the other is used.
    large = (-logps.masked_fill(~near_one, -1.0).expm1()).log()
    small = (-logps.masked_fill(near_one, -1.0).exp()).log1p()
    return logps - torch.where(near_one, large, small)


def _rewards(rewards: Tensor, pairs: Pairs) -> dict[str, Tensor]:
    chosen, rejected = pairs.chosen(rewards), pairs.rejected(rewards)
    return {
        "chosen_rewards": chosen,
        "rejected_rewards": rejected,
        "margin": chosen - rejected,
        "accuracy": chosen > rejected,
    }


def _metrics(
    rewards: Tensor, logps: Tensor, sequences: Segments, pairs: Pairs
) -> dict[str, Tensor]:
    sums = sequences.sum(logps.detach())
    logps_of = {"chosen_logps": pairs.chosen(sums), "rejected_logps": pairs.rejected(sums)}
    return _rewards(rewards.detach(), pairs) | logps_of
