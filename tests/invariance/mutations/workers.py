"""Mistakes in learners, and in what a run computes for them."""

from tests.invariance.mutations.mutation import Mutation, mutations_of

WORKERS, TESTS = "RL2/workers", "tests/workers"
REFERENCES = "tests/trainer/test_references.py"

MUTATIONS: dict[str, Mutation] = mutations_of(
    f"{WORKERS}/critic.py",
    "tests/workers/test_critic.py",
    {
        "all-tokens": (
            'batch[name][mask].double() for name in ("returns"',
            'batch[name].flatten().double() for name in ("returns"',
        ),
        "variance-of-values": ("(returns - values).var(correction=0)", "values.var(correction=0)"),
        "bias-counts": (
            "(returns - values).var(correction=0)",
            "(returns - values).square().mean()",
        ),
        "unbiased-spread": (
            "spread := returns.var(correction=0)",
            "spread := returns.var(correction=1)",
        ),
        "equal-returns": (
            "if len(returns) == 0 or (spread := returns.var(correction=0)) == 0:",
            "if len(returns) == 0 or (spread := returns.var(correction=0)) < 0:",
        ),
        "sign": ("return (1 - (returns - values)", "return ((returns - values)"),
    },
)
MUTATIONS |= mutations_of(
    f"{WORKERS}/parts.py",
    f"{TESTS}/test_parts.py",
    {
        "one-order-for-all-passes": ('f"{seed} {step} {epoch}"', 'f"{seed} {step}"'),
        "one-order-for-all-steps": ('f"{seed} {step} {epoch}"', 'f"{seed} {epoch}"'),
        "one-order-for-all-seeds": ('f"{seed} {step} {epoch}"', 'f"{step} {epoch}"'),
        "rows-apart": ("kept_together(batch, segments)", "torch.arange(len(batch['sample_ids']))"),
        "pairs-apart": ("kept_together(batch, segments)", "kept_together(batch, ())"),
        "slices-of-what-is-spread": ("if ends.stop - ends.start == len(rows) else rows", ""),
    },
)
MUTATIONS |= mutations_of(
    f"{WORKERS}/learner.py",
    f"{TESTS}/test_parts.py",
    {
        "first-order-again": ("order_of(self.seed, step, epoch)", "order_of(self.seed, step, 0)"),
        "passes-in-order": ("if self._n_epochs > 1 else None", "if self._n_epochs > 9 else None"),
        "one-pass-fewer": (
            "for epoch in range(self._n_epochs):",
            "for epoch in range(self._n_epochs - 1):",
        ),
        "one-pass-shuffled": ("if self._n_epochs > 1 else None", "if self._n_epochs > 0 else None"),
        "refused-and-done": ("return {refused: 1.0,", "pass\n            {refused: 1.0,"),
    },
)
MUTATIONS |= mutations_of(
    f"{WORKERS}/reference.py",
    f"{TESTS}/test_reference.py",
    {
        "one-step-early": ("step % self.every:", "(step + 1) % self.every:"),
        "whole": ("lerp_(part, self.config.renew_mix)", "lerp_(part, 1.0)"),
        "other-share": (
            "lerp_(part, self.config.renew_mix)",
            "lerp_(part, 1 - self.config.renew_mix)",
        ),
        "never-saved": ("self.renewed = True", "self.renewed = False"),
        "adapters-forgotten": ("if alike and not has_adapters(actor.hf_model):", "if alike:"),
        "shapes-of-one": ("for name in own | other if", "for name in own if"),
    },
)
MUTATIONS |= mutations_of(
    f"{WORKERS}/schedule.py",
    f"{TESTS}/test_schedule.py",
    {
        "floor-in-the-warm-up": ("return value if step < warmup else floor", "return floor"),
        "floor-added": ("floor + (1 - floor) * value", "floor + value"),
        "floor-at-least": ("floor + (1 - floor) * value", "max(floor, value)"),
        "one-step-late": ("last_epoch=done - 1", "last_epoch=done"),
        "betas-of-the-checkpoint": (
            '{"betas": tuple(config.betas), "weight_decay"',
            '{"weight_decay"',
        ),
        "warm-up-of-the-rest": (
            "int(config.warmup_ratio * n_updates)",
            "int(config.warmup_ratio * (n_updates - done))",
        ),
        "no-warm-up": ('"constant_with_warmup" if', '"constant" if'),
        "floor-of-a-polynomial": (
            '"lr_end": config.min_lr_ratio * config.lr',
            '"lr_end": config.min_lr_ratio',
        ),
        "decay-ratio": ("config.decay_ratio or 0.1", "0.1"),
    },
)
MUTATIONS |= mutations_of(
    f"{WORKERS}/evaluation.py",
    f"{TESTS}/test_evaluation.py",
    {
        "draws": ("with torch.random.fork_rng(devices), learner", "with learner"),
        "loss-divided-twice": ('means[f"{name}loss"] = totals[f"{name}loss"]', "pass"),
        "last-micro-batch": ("sums.get(one, 0.0) + value", "value"),
        "of-one-rank": (
            "totals = learner.totals(sums)",
            "learner.totals(sums)\n    totals = {one: x.item() for one, x in sums.items()}",
        ),
        "all-names": ("        if one.startswith(name)\n", ""),
    },
)
MUTATIONS |= mutations_of(
    "RL2/trainer/references.py",
    REFERENCES,
    {
        "mask-not-in-the-key": (
            '    parts.append(batch["action_mask"][row, :n].numpy().tobytes())\n',
            "",
        ),
        "actions-not-in-the-key": ('("states", "actions")]', '("states",)]'),
        "padding-in-the-key": (
            "row, :n].numpy().tobytes() for name",
            "row].numpy().tobytes() for name",
        ),
        "sizes-in-another-order": (
            'state["values"].split(state["sizes"].tolist())',
            'state["values"].split(state["sizes"].flip(0).tolist())',
        ),
        "another-origin": ("!= self.origin:", "== 0:"),
        "kl-below-zero": (
            "kl = max(0.0, ratios.sum().item() / len(ratios))",
            "kl = ratios.sum().item() / len(ratios)",
        ),
        "kl-of-the-last-token": (
            "ratios.sum().item() / len(ratios)",
            "ratios[:, -1].sum().item() / len(ratios)",
        ),
        "kl-of-a-token": (
            "ratios.sum().item() / len(ratios)",
            "ratios.sum().item() / int(others['action_mask'].sum())",
        ),
        "kl-sign": (
            'others["own"].double() - others["ref"]',
            'others["ref"].double() - others["own"]',
        ),
        "one-prompt": (
            'len(batch["group_ids"].unique()) > 1:',
            'len(batch["group_ids"].unique()) > 0:',
        ),
        "sides-mixed": ("for row in order.tolist():", "for row in range(n_rows):"),
        "last-token-lost": (
            '[*batch["states"][row, :n].tolist(), int(batch["actions"][row, n - 1])]',
            '[*batch["states"][row, :n].tolist(), int(batch["states"][row, n - 1])]',
        ),
        "references-lost": (
            'return position | {"references": self.references.state_dict()}',
            "return position",
        ),
    },
)
# however the values are spread
MUTATIONS |= mutations_of(
    f"{WORKERS}/critic.py",
    "tests/invariance/test_values.py",
    {
        "metric-of-one-rank": (
            "broadcast(None if batch is None else explained_variance(batch))",
            "None if batch is None else explained_variance(batch)",
        ),
    },
)
MUTATIONS |= mutations_of(
    "RL2/models/heads.py",
    "tests/invariance/test_values.py",
    {
        "values-of-the-token-before": (
            "question.hidden().float()).squeeze(-1)",
            "question.hidden().float().roll(1, 0)).squeeze(-1)",
        ),
    },
)
