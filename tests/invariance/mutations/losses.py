"""Mistakes in losses."""

from tests.invariance.mutations.mutation import Mutation, mutations_of

LOSSES, TESTS = "RL2/algorithms/losses", "tests/algorithms/losses"

MUTATIONS: dict[str, Mutation] = mutations_of(
    f"{LOSSES}/values.py",
    f"{TESTS}/test_values.py",
    {
        "no-clip-above": (
            "clamp(old_values - clip, old_values + clip)",
            "clamp(old_values - clip)",
        ),
        "no-clip-below": (
            "clamp(old_values - clip, old_values + clip)",
            "clamp(max=old_values + clip)",
        ),
        "rounded-within-the-clip": (
            "values.clamp(old_values - clip, old_values + clip)",
            "old_values + (values - old_values).clamp(-clip, clip)",
        ),
        "smaller-error": ("torch.maximum(error, clipped)", "torch.minimum(error, clipped)"),
        "clip-of-returns": ("clamp(old_values - clip", "clamp(returns - clip"),
        "equal-counts-as-clipped": ("(clipped > error)", "(clipped >= error)"),
    },
)
MUTATIONS |= mutations_of(
    f"{LOSSES}/preferences.py",
    f"{TESTS}/test_preferences.py",
    {
        "dpo-sign": ("_logistic(beta * z, label_smoothing), _m", "_logistic(-beta * z, 0.0), _m"),
        "smoothing-adds": ("-(1 - label_smoothing) * logsigmoid(margin)", "-logsigmoid(margin)"),
        "smoothing-of-the-same-pair": ("* logsigmoid(-margin)", "* logsigmoid(margin)"),
        "dpop-of-rejected": ("(-pairs.chosen(ratios)).relu()", "(-pairs.rejected(ratios)).relu()"),
        "dpop-of-gains": ("(-pairs.chosen(ratios)).relu()", "pairs.chosen(ratios).relu()"),
        "dpop-without-gradient": ("- dpop_lambda * lost", "- dpop_lambda * lost.detach()"),
        "ipo-target": ("- 0.5 / beta", "- 1 / beta"),
        "ipo-means": ("if length_normalized else", "if not length_normalized else"),
        "simpo-sums": (
            "rewards = beta * sequences.mean(logps)",
            "rewards = beta * sequences.sum(logps)",
        ),
        "simpo-gamma": ("(rewards) - gamma", "(rewards) + gamma"),
        "orpo-nll-of-rejected": ("-pairs.chosen(means) - beta", "-pairs.rejected(means) - beta"),
        "orpo-odds-sign": ("beta * logsigmoid(odds)", "beta * logsigmoid(-odds)"),
        "orpo-odds-of-one": ("near_one = logps > -math.log(2)", "near_one = logps > 0"),
        "kto-labels": (
            "torch.where(good, ratios - kl, kl - ratios)",
            "torch.where(good, kl - ratios, ratios - kl)",
        ),
        "kto-without-kl-of-bad": ("ratios - kl, kl - ratios)", "ratios - kl, -ratios)"),
        "kto-weights": ("where(good, desirable_weight, u", "where(~good, desirable_weight, u"),
        "kto-sign": ("(-beta * gains).sigmoid()", "(beta * gains).sigmoid()"),
        "rm-sign": ("-logsigmoid(margin) + center", "-logsigmoid(-margin) + center"),
        "rm-centre-of-the-margin": ("pairs.sum(scores).square()", "margin.square()"),
        "equal-is-right": ('"accuracy": chosen > rejected', '"accuracy": chosen >= rejected'),
        "margin-of-sides": ('"margin": chosen - rejected', '"margin": chosen + rejected'),
        "logps-of-the-other-side": (
            '"rejected_logps": pairs.rejected(sums)',
            '"rejected_logps": pairs.chosen(sums)',
        ),
    },
)
MUTATIONS |= mutations_of(
    f"{LOSSES}/ratios.py",
    f"{TESTS}/test_ratios.py",
    {
        "no-clip-below": (
            "ratio.clamp(1 - clip_low, 1 + clip_high)",
            "ratio.clamp(max=1 + clip_high)",
        ),
        "no-clip-above": (
            "ratio.clamp(1 - clip_low, 1 + clip_high)",
            "ratio.clamp(min=1 - clip_low)",
        ),
        "sides-swapped": (
            "ratio.clamp(1 - clip_low, 1 + clip_high)",
            "ratio.clamp(1 - clip_high, 1 + clip_low)",
        ),
        "larger-objective": (
            "torch.minimum(objective, bounded)",
            "torch.maximum(objective, bounded)",
        ),
        "gspo-sum": (
            "s = ratio_of(sequences.mean(logps - old_logps))",
            "s = ratio_of(sequences.sum(logps - old_logps))",
        ),
        "gspo-token-gradient": ("(logps - old_logps).detach())", "logps - old_logps)"),
        "gmpo-sides": (
            "d.clamp(min=-clip_low), d.clamp(max=clip_high)",
            "d.clamp(min=-clip_high), d.clamp(max=clip_low)",
        ),
        "gmpo-both-sides": ("d.clamp(max=clip_high))", "d.clamp(-clip_low, clip_high))"),
        "cispo-gradient": ("ratio_of(logps - old_logps).detach()", "ratio_of(logps - old_logps)"),
        "cispo-bound": ("clamp(max=1 + clip_high)\n", "clamp(max=clip_high)\n"),
        "cispo-clipped-takes-no-gradient": (
            "-weights * advantages",
            "-weights.masked_fill(ratio > 1 + clip_high, 0) * advantages",
        ),
        "ratio-without-bound": ("difference.clamp(max=_LARGEST).exp()", "difference.exp()"),
        "gradient-sign": ("(logps - logps.detach()).masked", "(logps.detach() - logps).masked"),
    },
)
MUTATIONS |= mutations_of(
    f"{LOSSES}/gates.py",
    f"{TESTS}/test_gates.py",
    {
        "sapo-taus": ("tau_neg).masked_fill(advantages > 0", "tau_neg).masked_fill(advantages < 0"),
        "sapo-tau-of-zero": ("masked_fill(advantages > 0, tau", "masked_fill(advantages >= 0, tau"),
        "sapo-scale": ("gate * 4 / tau, {", "gate * 4, {"),
        "sapo-centre": ("(ratio_of(logps - old_logps) - 1)", "ratio_of(logps - old_logps)"),
        "dppo-comes-back": (
            "advantages > 0, now > old, now < old",
            "advantages > 0, now < old, now > old",
        ),
        "dppo-without-advantage": (" & (advantages != 0)", ""),
        "dppo-no-largest-ratio": (".clamp(max=max_ratio)", ""),
        "dppo-kl-swapped": ("_binary_kl(old, now)", "_binary_kl(now, old)"),
        "dppo-one-outcome": (
            "return taken + torch.xlogy(not_p, not_p) - torch.xlogy(not_p, not_q)",
            "return taken",
        ),
        "dppo-weight-with-gradient": (
            "ratio_of(logps - old_logps).detach().clamp",
            "ratio_of(logps - old_logps).clamp",
        ),
    },
)
MUTATIONS |= mutations_of(
    f"{LOSSES}/selection.py",
    f"{TESTS}/test_selection.py",
    {
        "others": ("losses * (1 - selected), {", "losses * selected, {"),
        "kl-signed": ("(logps - old_logps).abs()", "(logps - old_logps)"),
        "kl-everywhere": ("kl_weight * selected *", "kl_weight *"),
        "clip-ratio-of-all": ("is_clipped * selected", "is_clipped.to(losses)"),
        "advantages-not-centred": ("(a - a.mean()) *", "a *"),
        "logps-not-centred": ("(logps - logps.mean())", "logps"),
        "lowest": ("values.topk(n).values[-1]", "values.topk(n, largest=False).values[-1]"),
        "one-more": (
            "values.topk(n).values[-1]",
            "values.topk(min(n + 1, len(values))).values[-1]",
        ),
        "maybe-none": ("max(1, int(share * n))", "int(share * n)"),
        "no-largest-covariance": (
            "(cov > min_covariance) & (cov < max_covariance)",
            "(cov > min_covariance)",
        ),
        "the-first-ones": (
            "torch.randperm(len(between), generator=generator)",
            "torch.arange(len(between))",
        ),
        "one-draw-for-all": ("manual_seed(len(cov))", "manual_seed(0)"),
    },
)
MUTATIONS |= mutations_of(
    f"{LOSSES}/distillation.py",
    f"{TESTS}/test_distillation.py",
    {
        "reverse": ("terms = q.exp() * (q - p)", "terms = p.exp() * (p - q)"),
        "beta-swapped": ("torch.log1p((1 - beta) * torch.expm1", "torch.log1p(beta * torch.expm1"),
        "weights-swapped": (
            "-beta * q.exp() * of_q + (1 - beta)",
            "-(1 - beta) * q.exp() * of_q + beta",
        ),
        "rest-of-the-teacher": ("p = torch.cat([p, left_p", "p = torch.cat([p, left_q"),
        "no-rest": (
            "counts = torch.cat([counts, torch.ones_like(",
            "counts = torch.cat([counts, torch.zeros_like(",
        ),
        "not-divided": ("p, q = p - _log_sum(p), q - _log_sum(q)", "p, q = p, q - _log_sum(q)"),
        "rest-of-nothing": ("left_p.clamp(min=least)", "left_p.clamp(min=0)"),
        "mass-of-one": ("teacher_top_logps.exp().sum(-1)}", "teacher_top_logps.exp().amax(-1)}"),
        "far-off": ("(p - q).clamp(max=80.0)", "(p - q)"),
    },
)
