"""Losses of TRL's that the library does not have, as a user would write them."""

import torch


def luspo(logps, old_logps, advantages, sequences, *, clip=0.2):
    """A clipped ratio of the sequence, which counts once for each of its tokens."""
    ratio = sequences.mean(logps - old_logps).exp()
    a = sequences.mean(advantages)
    return sequences.spread(-torch.minimum(a * ratio, a * ratio.clamp(1 - clip, 1 + clip)))


def vespo(logps, old_logps, advantages, sequences):
    """A gamma density of the sequence's ratio in place of a clip, with another shape and rate for
    negative advantages."""
    log_ratio = sequences.sum(logps - old_logps).detach().clamp(-18.4, 20.0)
    above = sequences.mean(advantages) >= 0
    shape, rate = torch.where(above, 2.0, 3.0), torch.where(above, 3.0, 2.0)
    weight = (rate * (1 - log_ratio.exp()) + shape * log_ratio).exp()
    return -sequences.spread(weight) * advantages * logps
