"""Losses of a user's own, named by `actor.loss.import_path`."""

import torch


def margin(logps, log1mps, max_log1mps, entropy, advantages, llm_logps, *, bound=1.5):
    """Takes the advantages itself, and logs two metrics, one of which is mostly 0."""
    gap = (logps - log1mps).clamp(max=bound)
    losses = -advantages * gap * (1 + 0.1 * entropy)
    metrics = {
        "at_bound": (gap == bound).to(gap),
        "top_mass": torch.expm1(max_log1mps).neg().detach() * (logps - llm_logps).detach().abs(),
    }
    return losses, metrics


def above(logps, ranks, top_logps, ref_logps, rewards, *, max_rank=2):
    """Takes none, so that the advantages multiply it; reads ranks, rewards and a second policy."""
    best = top_logps[:, :max_rank].exp().sum(-1)
    losses = (best - logps.exp()) * ranks.clamp(max=5) + 0.1 * (logps - ref_logps).square()
    return losses, {"rank": ranks, "reward": rewards + 0 * losses.detach()}


def ratios(logps, old_logps, advantages, sequences):
    """One value a token, with a gradient through its sequence's ratio."""
    ratio = sequences.spread(sequences.mean(logps - old_logps))
    return -advantages * (ratio.detach() + logps - logps.detach()).exp() + 0.1 * ratio.square()


def likelihood(log1mps, sequences):
    """One value a sequence without advantages, so that those multiply it."""
    return sequences.sum(log1mps) / sequences.sizes.sqrt()


def best_of_group(logps, top_logps, rewards, sequences, groups, *, max_rank=2):
    """One value a group: cross-entropy of a softmax over its sequences to their rewards."""
    scores = sequences.mean(logps + 0.1 * top_logps.sum(-1))
    wanted = sequences.sum(rewards).exp()
    wanted = wanted / groups.spread(groups.sum(wanted))
    norm = groups.sum(scores.exp()).log()
    losses = norm - groups.sum(wanted * scores) + 0.01 * groups.mean(scores.square())
    return losses, {"best": norm - groups.mean(scores)}
