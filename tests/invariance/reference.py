"""The update, as its definition says: float64, each row alone, no library code but the formulas of
the token losses, which have tests of their own."""

import math
from functools import cache

import torch
from transformers import AutoModelForCausalLM

_KL = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: torch.exp(-d) - 1 + d}


def statistics(logits, actions, top_k, at):
    """Of `[T, V]` logits that are already divided by the temperature."""
    logps = logits.log_softmax(-1)
    p, chosen = logps.exp(), actions[:, None]
    largest = logps.topk(min(top_k, logps.shape[-1]), -1).values
    others = logits.scatter(-1, chosen, -math.inf).logsumexp(-1)
    best = logits.argmax(-1, keepdim=True)
    not_best = logits.scatter(-1, best, -math.inf).logsumexp(-1)
    return {
        "logps": logps.gather(-1, chosen)[:, 0],
        "log1mps": others - logits.logsumexp(-1),
        "max_logps": logps.gather(-1, best)[:, 0],
        "max_log1mps": not_best - logits.logsumexp(-1),
        "entropy": -(p * logps).sum(-1),
        "ranks": 1 + (logits > logits.gather(-1, chosen)).sum(-1).double(),
        "top_logps": largest,
        "at_logps": logps.gather(-1, at.long()),
    }


def row_weight(batch, row, level):
    """What divides the summed loss of a row's tokens. A sample may have several rows."""
    n_actions, correct = {}, set()
    of_rows = zip(batch["sample_ids"].tolist(), batch["action_mask"].sum(-1).tolist(), strict=True)
    for other, (sample, n) in enumerate(of_rows):
        n_actions[sample] = n_actions.get(sample, 0) + n
        correct |= {sample} if batch["correct"][other] else set()
    own = int(batch["sample_ids"][row])
    if level == "token":
        return 1 / sum(n_actions.values())
    if level == "sequence":
        return 1 / (n_actions[own] * len(n_actions))
    if level == "sequence_sum":
        return 1 / len(n_actions)
    return 1 / (n_actions[own] * len(correct)) if own in correct else 0.0


class Sums:
    """`sequences` or `groups`, one by one."""

    def __init__(self, ids):
        self.ids, self.own = ids, sorted(set(ids))

    def __len__(self):
        return len(self.own)

    def members(self, one):
        return [place for place, other in enumerate(self.ids) if other == one]

    @property
    def sizes(self):
        return torch.tensor([len(self.members(one)) for one in self.own])

    def sum(self, x):
        return torch.stack([x[self.members(one)].double().sum() for one in self.own])

    def mean(self, x):
        return torch.stack([x[self.members(one)].double().mean() for one in self.own])

    def spread(self, x):
        return torch.stack([x[self.own.index(one)] for one in self.ids])


class Pairs(Sums):
    def __init__(self, ids, chosen):
        super().__init__(ids)
        self.is_chosen = chosen

    def chosen(self, x):
        return self.sum(torch.where(torch.tensor(self.is_chosen), x, 0.0))

    def rejected(self, x):
        return self.sum(torch.where(torch.tensor(self.is_chosen), 0.0, x))

    def difference(self, x):
        return self.chosen(x) - self.rejected(x)


def segments_of(batch, rows):
    """Of the tokens, whose rows are given."""
    samples = batch["sample_ids"].tolist()
    sequences = Sums([samples[row] for row in rows])
    first = [samples.index(one) for one in sequences.own]
    groups = Sums(batch["group_ids"][first].tolist())
    pairs = Pairs(
        [int(batch["pair_ids"][row]) for row in first],
        [bool(batch["chosen"][row]) for row in first],
    )
    return {"sequences": sequences, "groups": groups, "pairs": pairs}


def sequence_weights(batch, config):
    """`[B, T]`: the importance weight of each row's sample."""
    level, rule = config.tis_type.split("_")
    ids, weights = batch["sample_ids"].tolist(), []
    for own in ids:
        rows = [row for row, other in enumerate(ids) if other == own]
        difference = (batch["old_logps"] - batch["llm_logps"])[rows].double()
        ratios = difference[batch["action_mask"][rows]].exp()
        ratio = ratios.prod() if level == "sequence" else ratios.prod() ** (1 / max(len(ratios), 1))
        one_of = [ratio] if level != "token" else [*ratios]
        inside = all(1 / config.tis_coef <= one <= config.tis_coef for one in one_of)
        if rule == "truncate":
            weights.append(min(float(ratio), config.tis_coef))
        else:
            weights.append(float(inside) * (float(ratio) if rule == "mask" else 1.0))
    return torch.tensor(weights).double()[:, None] * batch["action_mask"]


def segment_loss(loss, config, batch, tokens, rows):
    """Loss, and metrics, of a loss of sequences, groups or pairs; entropy and KL are no part of it.

    tokens: of the whole batch, one row after the other.
    """
    level, segments = config.avg_level, segments_of(batch, rows)
    losses, extra = loss(tokens | segments)
    weights = torch.tensor([row_weight(batch, row, level) for row in rows]).double()
    mean = lambda x: x  # noqa: E731
    if loss.kind != "tokens":
        weights = segments["sequences"].sum(weights)
    if loss.kind == "sequences":
        mean = segments["sequences"].mean
    elif loss.kind != "tokens":
        weights = segments[loss.kind].sum(weights)
    if loss.kind in ("tokens", "sequences"):
        if not loss.uses_advantages and level != "correct":
            losses = losses * mean(tokens["advantages"])
        if "tis_weights" in tokens:
            weight = mean(tokens["tis_weights"])
            losses = losses * weight
            if not config.tis_type.endswith("truncate"):
                extra = extra | {"tis_masked": (weight == 0).double()}
        elif config.tis_coef > 0:
            ratio = mean(tokens["old_logps"] - tokens["llm_logps"]).exp()
            outside = (ratio > config.tis_coef) | (ratio < 1 / config.tis_coef)
            if config.tis_type == "mask":
                extra = extra | {"tis_masked": outside.double()}
                losses = torch.where(outside, 0.0, losses * ratio)
            else:
                losses = losses * ratio.clamp(max=config.tis_coef)
    metrics = {f"actor/{name}": x.double().mean().item() for name, x in extra.items()}
    return (losses * weights).sum(), metrics


def batch_loss(hf, loss, config, batch):
    """Loss, and metrics, of one optimizer batch; None where there is nothing to learn from."""
    n_all = int(batch["action_mask"].sum()) if batch is not None else 0
    if n_all == 0:
        return None
    if config.avg_level == "correct":
        learns = batch["correct"].any()
    else:
        of_one = loss.kind in ("tokens", "sequences")
        learns = loss.uses_advantages or not of_one or batch["advantages"].any()
    if not learns:
        return None
    if loss.selection is not None:
        batch = batch | {"selected": loss.selection(batch)["selections"]}
    if config.tis_coef > 0 and config.tis_type not in ("truncate", "mask"):
        batch = batch | {"tis_weights": sequence_weights(batch, config)}
    total, sums, all_tokens, rows = 0.0, {}, [], []
    for row, length in enumerate(batch["lengths"].tolist()):
        mask = batch["action_mask"][row, :length]
        if not mask.any():
            continue
        logits = hf(batch["states"][row : row + 1, :length]).logits[0, mask] / config.temperature
        at = batch["teacher_top_ids"][row, :length][mask]
        tokens = statistics(logits, batch["actions"][row, :length][mask], loss.top_k, at)
        names = ("old_logps", "ref_logps", "llm_logps", "advantages", "rewards", "selected")
        names += ("tis_weights", "labels", "mismatch_kl", "teacher_top_logps")
        fields = {name: batch[name][row, :length][mask].double() for name in names if name in batch}
        tokens |= {"old_logps": tokens["logps"].detach()} | fields
        if loss.segments:
            all_tokens.append(tokens)
            rows += len(tokens["logps"]) * [row]
            losses, extra = torch.zeros_like(tokens["logps"]), {}
        else:
            losses, extra = loss(tokens)
        if not loss.uses_advantages and config.avg_level != "correct":
            losses = losses * tokens["advantages"]
        metrics = {f"actor/{name}": values for name, values in extra.items()}
        if "llm_logps" in fields:
            d = tokens["llm_logps"] - tokens["old_logps"]
            metrics["rollout/llm_kl"] = _KL["k3"](d)
            ratio = (tokens["old_logps"] - tokens["llm_logps"]).exp()
            if "tis_weights" in tokens and not loss.segments:
                losses = losses * tokens["tis_weights"]
                if not config.tis_type.endswith("truncate"):
                    metrics["actor/tis_masked"] = (tokens["tis_weights"] == 0).double()
            elif config.tis_coef > 0 and config.tis_type == "truncate":
                losses = losses * ratio.clamp(max=config.tis_coef)
            elif config.tis_coef > 0 and not loss.segments:
                outside = (ratio > config.tis_coef) | (ratio < 1 / config.tis_coef)
                losses = torch.where(outside, 0.0, losses * ratio)
                metrics["actor/tis_masked"] = outside.double()
        losses = losses - config.entropy.coef * tokens["entropy"]
        metrics["actor/entropy"] = tokens["entropy"]
        metrics["actor/p_max"] = tokens["max_logps"].exp()
        if "ref_logps" in fields:
            kl = _KL[config.kl.loss_estimator](tokens["logps"] - fields["ref_logps"])
            if config.kl.get("clamp") is not None:
                kl = kl.clamp(0, config.kl.clamp)
            metrics["actor/kl"] = kl
            if config.kl.get("unbiased"):
                kl = kl * (tokens["logps"] - tokens["old_logps"]).exp()
            if config.kl.type == "loss":
                level = config.kl.get("avg_level") or config.avg_level
                total = total + config.kl.coef * kl.sum() * row_weight(batch, row, level)
        total = total + losses.sum() * row_weight(batch, row, config.avg_level)
        for name, values in metrics.items():
            sums[name] = sums.get(name, 0.0) + values.sum().item() / n_all
    if loss.segments:
        whole = {name: torch.cat([one[name] for one in all_tokens]) for name in all_tokens[0]}
        more, metrics = segment_loss(loss, config, batch, whole, rows)
        total, sums = total + more, sums | metrics
    return total, sums


def parts_of(batch, n_parts, segments):
    """The batch's samples, groups or pairs in `n_parts` equal parts, the first ones one larger."""
    if batch is None:
        return [None] * n_parts
    smallest = {"groups": "group_ids", "pairs": "pair_ids"}
    ids = batch[next((smallest[s] for s in segments if s in smallest), "sample_ids")].tolist()
    samples = sorted(set(ids))
    size, more = divmod(len(samples), n_parts)
    parts, start = [], 0
    for part in range(n_parts):
        own = set(samples[start : start + size + (part < more)])
        start += len(own)
        rows = [row for row, sample in enumerate(ids) if sample in own]
        parts.append({name: values[rows] for name, values in batch.items()})
    return parts


@cache
def plain_model(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)


def update(hf, config, loss, batch, eps, name="actor", of_batch=batch_loss):
    """Metrics, clipped gradients `{name: tensor}` of each optimizer step, and the weights after;
    the model stays as it is."""
    before = {key: p.detach().clone() for key, p in hf.named_parameters()}
    optimizer = torch.optim.AdamW(
        hf.parameters(), lr=config.lr, weight_decay=config.weight_decay, eps=eps
    )
    logged, gradients = {}, []
    for part in parts_of(batch, config.update_per_rollout, loss.segments):
        result = of_batch(hf, loss, config, part)
        if result is None:
            metrics = {f"{name}/skipped": 1.0}
        else:
            total, metrics = result
            optimizer.zero_grad()
            total.backward()
            norm = math.sqrt(sum(p.grad.square().sum().item() for p in hf.parameters()))
            for parameter in hf.parameters():
                parameter.grad *= min(1.0, config.max_grad_norm / (norm + 1e-6))
            gradients.append({key: p.grad.clone() for key, p in hf.named_parameters()})
            optimizer.step()
            own = {"loss": total.item(), "grad_norm": norm, "skipped": 0.0, "nonfinite": 0.0}
            metrics |= {f"{name}/{key}": value for key, value in own.items()}
        for key, value in metrics.items():
            logged.setdefault(key, []).append(value)
    counts = (f"{name}/skipped", f"{name}/nonfinite")
    means = {
        key: sum(values) / (1 if key in counts else len(values)) for key, values in logged.items()
    }
    weights = {key: p.detach().clone() for key, p in hf.named_parameters()}
    hf.load_state_dict(before, strict=False)  # tied weights have one name here
    return means | {f"{name}/lr": config.lr}, gradients, weights


@torch.no_grad()
def logps(hf, batch, temperature):
    """`[B, T]` log-probabilities of the actions, 0 elsewhere."""
    result = torch.zeros(batch["action_mask"].shape, dtype=torch.float64)
    for row, length in enumerate(batch["lengths"].tolist()):
        logits = hf(batch["states"][row : row + 1, :length]).logits[0] / temperature
        chosen = logits.log_softmax(-1).gather(-1, batch["actions"][row, :length, None])
        result[row, :length] = chosen[:, 0]
    return result * batch["action_mask"]


@torch.no_grad()
def tops(hf, batch, temperature, k, ids):
    """Log-probabilities of all actions `[N]`, of the k likeliest tokens `[N, k]`, and of the tokens
    `ids`, which are `[B, T, k]`."""
    own, top, of_ids = [], [], []
    for row, length in enumerate(batch["lengths"].tolist()):
        mask = batch["action_mask"][row, :length]
        logits = hf(batch["states"][row : row + 1, :length]).logits[0, mask] / temperature
        logps = logits.log_softmax(-1)
        actions = batch["actions"][row, :length][mask]
        own.append(logps.gather(-1, actions[:, None])[:, 0])
        top.append(logps.topk(k, -1).values)
        of_ids.append(logps.gather(-1, torch.as_tensor(ids[row, :length])[mask].long()))
    return [torch.cat(one).float().numpy() for one in (own, top, of_ids)]
