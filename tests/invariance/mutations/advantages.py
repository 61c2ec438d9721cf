"""Mistakes in advantage estimators."""

from tests.invariance.mutations.mutation import Mutation, mutations_of

ADVANTAGES, TESTS = "RL2/algorithms/advantages", "tests/algorithms/advantages"

MUTATIONS: dict[str, Mutation] = mutations_of(
    f"{ADVANTAGES}/gae.py",
    f"{TESTS}/test_gae.py",
    {
        "values-not-discounted": ("rewards_ + gamma * after", "rewards_ + after"),
        "gamma-forgotten": ("gamma * lamda)", "lamda)"),
        "lamda-forgotten": ("gamma * lamda)", "gamma)"),
        "no-baseline": ("gamma * after - values_", "gamma * after"),
        "values-of-the-token-before": (
            "pad(values_[:, 1:], (0, 1))",
            "pad(values_[:, :-1], (1, 0))",
        ),
        "returns-without-values": ("place.tokens(found + values_)", "place.tokens(found)"),
        "not-normalised": ("normalised(advantages, action_mask, sizes)", "advantages"),
        "normalised-over-prompts": (
            "normalised(advantages, action_mask, sizes)",
            "normalised(advantages)",
        ),
        "sizes-forgotten": (
            "normalised(advantages, action_mask, sizes)",
            "normalised(advantages, action_mask)",
        ),
    },
)
MUTATIONS |= mutations_of(
    f"{ADVANTAGES}/returns.py",
    f"{TESTS}/test_gae.py",
    {
        "forwards": ("for t in reversed(range(x.shape[1])):", "for t in range(x.shape[1]):"),
        "rows-apart": ("sample_ids[row].unique", "row.unique"),
        "biased-deviation": ("/ own.std()", "/ own.std(correction=0)"),
        "not-centred": ("(own - own.mean())", "own"),
        "steps-of-another-order": ("first[sample[order]]", "first[sample]"),
    },
)
MUTATIONS |= mutations_of(
    f"{ADVANTAGES}/baselines.py",
    f"{TESTS}/test_shelf.py",
    {
        "rloo-own-return": ("counts / (counts - 1).clamp(min=1) * samples", "samples"),
        "opo-unweighted": (
            "sum_by(lengths * samples.returns, samples.group)",
            "sum_by(samples.returns, samples.group)",
        ),
        "opo-rows-for-lengths": ("action_mask.sum(-1).double()", "action_mask.any(-1).double()"),
        "opo-noise": (
            "advantages.masked_fill(samples.equal(), 0.0), action_mask",
            "advantages, action_mask",
        ),
        "remax-sign": (
            "advantages = returns - greedy_reward",
            "advantages = greedy_reward - returns",
        ),
        "remax-noise": ("advantages.masked_fill(equal, 0.0)", "advantages"),
        "remax-on-prompts": (
            "(advantages.masked_fill(equal, 0.0) * action_mask)",
            "advantages.masked_fill(equal, 0.0)",
        ),
    },
)
MUTATIONS |= mutations_of(
    f"{ADVANTAGES}/baselines.py",
    f"{TESTS}/test_advantages.py",
    {
        "reinforce-always-grouped": (
            "if global_norm or len(samples.counts)",
            "if len(samples.counts)",
        ),
        "reinforce-never-alone": (" or len(samples.counts) == len(samples.returns)", ""),
        "spo-on-prompts": (
            "sample_returns(rewards, sample_ids).unsqueeze(-1) * action_mask",
            "sample_returns(rewards, sample_ids).unsqueeze(-1) + 0 * rewards",
        ),
    },
)
MUTATIONS |= mutations_of(
    f"{ADVANTAGES}/attempts.py",
    f"{TESTS}/test_shelf.py",
    {
        "maxrl-not-divided": ("((samples.returns - mean) / mean)", "(samples.returns - mean)"),
        "maxrl-zero-mean": ("flat = samples.equal() | (mean == 0)", "flat = samples.equal()"),
        "pass_k-one-more": ("math.comb(place, k - 2)", "math.comb(place, k - 1)"),
        "pass_k-small-groups": ("if len(own) >= k:", "if len(own) > k:"),
        "pass_k-scale": ("order, k * gains)", "order, gains)"),
        "pass_k-sorted": ("index_copy_(0, order,", "index_copy_(0, torch.arange(n),"),
        "pass_k-losses": (".clamp(min=0) @", " @"),
    },
)
MUTATIONS |= mutations_of(
    f"{ADVANTAGES}/samples.py",
    f"{TESTS}/test_advantages.py",
    {
        "biased-deviation": ("(self.counts - 1).clamp(min=1)", "self.counts"),
        "rows-for-samples": (
            "samples, of_row = torch.unique(sample_ids, return_inverse=True)",
            "samples = of_row = torch.arange(len(sample_ids))",
        ),
        "equal-over-the-batch": ("found.masked_fill(self.equal(), 0.0)", "found"),
    },
)
MUTATIONS |= mutations_of(
    f"{ADVANTAGES}/plus_plus.py",
    f"{TESTS}/test_shelf.py",
    {
        "no-discount": (
            "rewards_to_go(rewards, action_mask, sample_ids, gamma)",
            "rewards_to_go(rewards, action_mask, sample_ids, 1.0)",
        ),
        "over-prompts": ("normalised(returns, action_mask)", "normalised(returns)"),
        "no-baseline": ("normalised(samples.relative())", "normalised(samples.returns)"),
        "by-group": ("normalised(samples.relative())", "samples.relative(True)"),
    },
)
MUTATIONS |= mutations_of(
    f"{ADVANTAGES}/several.py",
    f"{TESTS}/test_shelf.py",
    {
        "no-weights": ("advantages += weights * one", "advantages += one"),
        "not-by-deviation": ("relative(by_deviation=True)", "relative()"),
        "not-over-the-batch": (
            "samples.tokens(normalised(advantages)",
            "samples.tokens(advantages",
        ),
    },
)
MUTATIONS |= mutations_of(
    f"{ADVANTAGES}/distillation.py",
    f"{TESTS}/test_distillation.py",
    {
        "student-less-teacher": (
            "(teacher_logps - old_logps) * action_mask",
            "(old_logps - teacher_logps) * action_mask",
        ),
        "coef-forgotten": (
            "old_logps, action_mask, teacher_coef=teacher_coef)",
            "old_logps, action_mask)",
        ),
        "norm-forgotten": ("global_norm=global_norm, norm_var=norm_var", "global_norm=global_norm"),
        "global-forgotten": ("global_norm=global_norm, norm_var=norm_var", "norm_var=norm_var"),
    },
)
