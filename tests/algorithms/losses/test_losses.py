import math

import pytest
import torch
from omegaconf import OmegaConf

from RL2.algorithms import FIELDS, LOSSES, TokenLoss, resolve_loss
from RL2.algorithms.losses import fixed_target_kl, max_target_kl, nll, ppo, rank_jsd
from RL2.algorithms.segments import SEGMENTS, segments_of
from RL2.ops import STATISTICS, linear_token_stats, token_stats
from RL2.runtime.errors import ConfigError

INF = float("inf")


def config(**changes):
    """The `actor.loss` node as the schema makes it."""
    base = dict.fromkeys(
        ["import_path", "clip_low", "clip_high", "detach_target", "target", "gate", "max_rank"]
    )
    return OmegaConf.create({"name": "ppo", "options": {}} | base | changes)


def distributions(N=40, V=9, seed=0):
    """Logits in float64, tokens of which every other one is the greedy one, and batch fields."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    actions = torch.randint(V, (N,), generator=generator)
    actions[::2] = logits[::2].argmax(-1)
    fields = {name: torch.randn(N, generator=generator, dtype=torch.float64) for name in FIELDS}
    logps = logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    fields["old_logps"] = logps + 0.3 * fields["old_logps"]
    return logits, actions, fields


def probabilities(logits, actions):
    p = logits.softmax(-1)
    return p.gather(-1, actions[:, None])[:, 0], p.max(-1).values


def textbook_max_target(logits, actions):
    p, p_max = probabilities(logits, actions)
    return p_max * (p_max / p).log() + (1 - p_max) * ((1 - p_max) / (1 - p)).log()


def textbook_fixed_target(logits, actions, q):
    p, _ = probabilities(logits, actions)
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    return torch.where(p > q, kl, 0.0)


def promoted(p, actions, max_rank):
    """p' of the rank-aware loss over the whole vocabulary, token by token."""
    p = p.detach()
    target = p.clone()
    for row, (probabilities, a) in enumerate(zip(p.tolist(), actions.tolist(), strict=True)):
        above = [j for j, q in enumerate(probabilities) if q > probabilities[a]]
        chain = [*sorted(above, key=lambda j: -probabilities[j])[:max_rank], a]
        for j, following in zip(chain, chain[1:] + chain[:1], strict=True):
            target[row, j] = probabilities[following]
        target[row, a] = probabilities[chain[0]]
    return target


def jsd(p, q):
    m = (p + q) / 2
    return (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum(-1) / 2


def losses_of(name, logits, actions, fields, **options):
    loss = resolve_loss(config(name=name, **options))
    stats = token_stats(logits, actions, 1.0, loss.statistics, loss.top_k)
    return loss({**stats.as_dict(), **fields})[0]


def filled(loss, n, value):
    """What a loss takes, all of one value."""
    several = {"top_logps": loss.top_k, "at_logps": 3, "teacher_top_logps": 3}
    shapes = {name: (n, several[name]) if name in several else (n,) for name in loss.inputs}
    values = {name: torch.full(shape, value) for name, shape in shapes.items()}
    row = torch.arange(n)
    ids = {"sample_ids": row, "group_ids": row, "pair_ids": row, "chosen": row >= 0}
    found = segments_of(row, ids, SEGMENTS, "cpu")
    return values | {name: found[name] for name in loss.inputs if name in SEGMENTS}


# ---------------------------------------------------------------- values


def test_max_target_by_hand():
    # p_a = 0.2, p_m = 0.6
    losses = max_target_kl(*(torch.tensor([v]).log() for v in (0.2, 0.8, 0.6, 0.4)))
    expected = 0.6 * math.log(0.6 / 0.2) + 0.4 * math.log(0.4 / 0.8)
    assert losses.item() == pytest.approx(expected, rel=1e-6)


def test_fixed_target_by_hand():
    p = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    half = fixed_target_kl(p.log(), (1 - p).log())
    assert half.tolist() == pytest.approx(
        [-0.5 * (math.log(0.9) + math.log(0.1)) + math.log(0.5), 0, 0]
    )
    ungated = fixed_target_kl(p.log(), (1 - p).log(), gate=False)
    assert ungated.tolist() == pytest.approx(
        [-0.5 * (math.log(v) + math.log(1 - v)) + math.log(0.5) for v in (0.9, 0.5, 0.2)]
    )
    low = fixed_target_kl(p.log(), (1 - p).log(), target=0.3)
    assert low.tolist() == pytest.approx(
        [0.3 * math.log(0.3 / v) + 0.7 * math.log(0.7 / (1 - v)) for v in (0.9, 0.5)] + [0]
    )


def test_ppo_by_hand():
    ratio = torch.tensor([1.0, 1.1, 1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([2.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    losses, metrics = ppo(ratio.log(), torch.zeros(6), advantages, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(losses, -torch.tensor([2.0, 1.1, 1.3, -1.5, 0.5, -0.8]))
    assert metrics["clip_ratio"].tolist() == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    "p, a, max_rank, target",
    [
        ([0.5, 0.3, 0.2], 0, 8, [0.5, 0.3, 0.2]),
        ([0.5, 0.3, 0.2], 1, 8, [0.3, 0.5, 0.2]),
        ([0.5, 0.3, 0.2], 2, 8, [0.3, 0.2, 0.5]),
        ([0.2, 0.1, 0.3, 0.4], 1, 8, [0.1, 0.4, 0.2, 0.3]),
        ([0.4, 0.3, 0.2, 0.1], 3, 3, [0.3, 0.2, 0.1, 0.4]),  # one below the cap: nothing changes
        ([0.4, 0.3, 0.2, 0.1], 3, 2, [0.3, 0.1, 0.2, 0.4]),  # the last above takes p(a)
        ([0.4, 0.3, 0.2, 0.1], 3, 1, [0.1, 0.3, 0.2, 0.4]),
        ([0.3, 0.3, 0.4], 0, 8, [0.4, 0.3, 0.3]),  # a tie: 1 is not above 0
        ([0.2, 0.3, 0.3, 0.2], 3, 8, [0.2, 0.3, 0.2, 0.3]),
        ([0.25, 0.25, 0.25, 0.25], 2, 8, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_rank_jsd_by_hand(p, a, max_rank, target):
    expected = 0.5 * sum(
        x * math.log(2 * x / (x + y)) + y * math.log(2 * y / (x + y))
        for x, y in zip(p, target, strict=True)
    )
    logps = torch.tensor([p], dtype=torch.float64).log()
    top = torch.nn.functional.pad(logps.sort(-1, descending=True).values, (0, 8), value=-INF)
    losses = rank_jsd(logps[:, a], top, max_rank=max_rank)
    assert losses.item() == pytest.approx(expected, rel=1e-12, abs=1e-16)
    assert (losses == 0).item() == (p == target)


def test_nll_by_hand():
    assert nll(torch.tensor([-0.5, -2.0])).tolist() == [0.5, 2.0]


@pytest.mark.parametrize("seed", range(3))
def test_values_equal_the_definitions(seed):
    logits, actions, fields = distributions(N=300, seed=seed)
    close = dict(rtol=1e-10, atol=1e-12)
    for detach in (True, False):
        found = losses_of("max_target_kl", logits, actions, {}, detach_target=detach)
        torch.testing.assert_close(found, textbook_max_target(logits, actions), **close)
    for q in (0.5, 0.2, 0.9):
        found = losses_of("fixed_target_kl", logits, actions, {}, target=q)
        torch.testing.assert_close(found, textbook_fixed_target(logits, actions, q), **close)
        assert (found != 0).any() and (found == 0).any()
    p, _ = probabilities(logits, actions)
    ratio, A = p / fields["old_logps"].exp(), fields["advantages"]
    clipped = torch.where(ratio > 1.3, 1.3, torch.where(ratio < 0.9, 0.9, ratio))
    found = losses_of("ppo", logits, actions, fields, clip_low=0.1, clip_high=0.3)
    torch.testing.assert_close(found, -torch.minimum(A * ratio, A * clipped), **close)
    torch.testing.assert_close(losses_of("nll", logits, actions, {}), -p.log(), **close)


@pytest.mark.parametrize("max_rank", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("V", [2, 9, 40])
def test_rank_jsd_equals_the_divergence_of_the_whole_vocabulary(V, max_rank):
    logits, actions, _ = distributions(N=200, V=V)
    logits[1::3] = logits[1::3].round()  # with ties
    p = logits.softmax(-1)
    target = promoted(p, actions, max_rank)
    torch.testing.assert_close(target.sum(-1), torch.ones_like(target[:, 0]))
    for detach in (True, False):
        found = losses_of("rank_jsd", logits, actions, {}, max_rank=max_rank, detach_target=detach)
        torch.testing.assert_close(found, jsd(target, p), rtol=1e-10, atol=1e-12)
    greedy = p.gather(-1, actions[:, None])[:, 0] == p.max(-1).values
    assert (found[greedy] == 0).all() and (found[~greedy] > 0).all()


def test_rank_jsd_looks_at_no_column_past_the_cap():
    logits, actions, _ = distributions(V=20)
    stats = token_stats(logits, actions, 1.0, ["logps", "top_logps"], 12)
    narrow = rank_jsd(stats.logps, stats.top_logps[:, :4], max_rank=4)
    assert torch.equal(rank_jsd(stats.logps, stats.top_logps, max_rank=4), narrow)
    assert not torch.equal(rank_jsd(stats.logps, stats.top_logps, max_rank=5), narrow)


@pytest.mark.parametrize("gap", [1e-3, 1e-2, 0.3, 1.99, 2.01, 5.0, 20.0, 60.0])
@pytest.mark.parametrize("top", [-1e-3, -0.5, -9.0])
def test_rank_jsd_has_the_digits_of_fp32(gap, top):
    """Also where p' ~ p, whose terms in the definition are 1,000 times as large as their sum."""
    top_logps = torch.tensor([[top, top - gap / 2]], requires_grad=True)
    logps = (top_logps[:, 0] - gap).detach().requires_grad_()
    losses = rank_jsd(logps, top_logps, max_rank=2, detach_target=False)
    gradients = torch.autograd.grad(losses.sum(), (logps, top_logps))

    exact = [leaf.detach().double().requires_grad_() for leaf in (logps, top_logps)]
    p = torch.cat([exact[1], exact[0][:, None]], -1).exp()
    definition = jsd(p.roll(-1, -1), p)
    torch.testing.assert_close(losses.double(), definition.detach(), rtol=1e-6, atol=0)
    expected = torch.autograd.grad(definition.sum(), exact)
    largest = max(gradient.abs().max().item() for gradient in expected)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6 * largest)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "name, options",
    [
        ("ppo", {}),
        ("max_target_kl", {}),
        ("fixed_target_kl", {}),
        ("fixed_target_kl", {"gate": False, "target": 0.3}),
        ("rank_jsd", {"detach_target": False}),
        ("rank_jsd", {"detach_target": False, "max_rank": 2}),
        ("nll", {}),
    ],
)
def test_gradcheck_through_the_head(name, options):
    generator = torch.Generator().manual_seed(3)
    hidden = 3 * torch.randn(8, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    actions = torch.randint(6, (8,), generator=generator)
    actions[::2] = (hidden @ weight.T)[::2].argmax(-1)
    fields = {name: torch.randn(8, generator=generator, dtype=torch.float64) for name in FIELDS}
    loss = resolve_loss(config(name=name, **options))

    def losses(hidden, weight):
        stats = linear_token_stats(hidden, weight, actions, 0.8, loss.statistics, top_k=loss.top_k)
        return loss({**stats.as_dict(), **fields})[0]

    inputs = hidden.requires_grad_(), weight.requires_grad_()
    assert losses(*inputs).abs().sum() > 0
    assert torch.autograd.gradcheck(losses, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)


def test_detached_target_has_the_gradient_of_a_constant():
    logits, actions, _ = distributions()
    _, p_max = probabilities(logits, actions)  # held fixed below

    def with_constant_target(z):
        p = z.softmax(-1).gather(-1, actions[:, None])[:, 0]
        return p_max * (p_max / p).log() + (1 - p_max) * ((1 - p_max) / (1 - p)).log()

    z = logits.clone().requires_grad_()
    found = losses_of("max_target_kl", z, actions, {}, detach_target=True)
    (gradient,) = torch.autograd.grad(found.sum(), z)
    (expected,) = torch.autograd.grad(with_constant_target(z).sum(), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("max_rank", [2, 8])
@pytest.mark.parametrize("detach", [False, True])
def test_rank_jsd_gradient_is_that_of_the_whole_vocabulary(detach, max_rank):
    logits, actions, _ = distributions()
    z = logits.clone().requires_grad_()
    found = losses_of("rank_jsd", z, actions, {}, detach_target=detach, max_rank=max_rank)
    (gradient,) = torch.autograd.grad(found.sum(), z)

    p = z.softmax(-1)
    entries = promoted(p, actions, max_rank).unsqueeze(-1) == p.detach().unsqueeze(-2)
    target = p.gather(-1, entries.long().argmax(-1))  # p' as a permutation of p, no two are equal
    definition = jsd(target.detach() if detach else target, p)
    (expected,) = torch.autograd.grad(definition.sum(), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_rank_jsd_with_a_detached_target_against_finite_differences():
    logits, actions, _ = distributions(N=12)
    z = logits.clone().requires_grad_()
    found = losses_of("rank_jsd", z, actions, {}, max_rank=3)
    (gradient,) = torch.autograd.grad(found.sum(), z)
    assert gradient.abs().sum() > 0
    target, step = promoted(logits.softmax(-1), actions, 3), 1e-5  # the target stays where it was

    for column in range(logits.shape[1]):
        change = torch.zeros(logits.shape[1], dtype=torch.float64)
        change[column] = step
        up, down = (jsd(target, (logits + side).softmax(-1)) for side in (change, -change))
        numeric = (up - down) / (2 * step)
        torch.testing.assert_close(gradient[:, column], numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("detach", [False, True])
def test_max_target_gradient_in_closed_form(detach):
    logits, actions, _ = distributions()
    z = logits.clone().requires_grad_()
    losses = losses_of("max_target_kl", z, actions, {}, detach_target=detach)
    (gradient,) = torch.autograd.grad(losses.sum(), z)

    p = logits.softmax(-1)
    p_a, p_m = (v[:, None] for v in probabilities(logits, actions))
    one_hot = torch.nn.functional.one_hot
    at_a, at_m = one_hot(actions, p.shape[1]), one_hot(p.argmax(-1), p.shape[1])
    expected = -(p_m - p_a) / (1 - p_a) * (at_a - p)
    if not detach:
        expected = expected + p_m * (p_m.logit() - p_a.logit()) * (at_m - p)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_fixed_half_gradient_in_closed_form():
    logits, actions, _ = distributions()
    z = logits.clone().requires_grad_()
    losses = losses_of("fixed_target_kl", z, actions, {})
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    p = logits.softmax(-1)
    p_a = probabilities(logits, actions)[0][:, None]
    at_a = torch.nn.functional.one_hot(actions, p.shape[1])
    expected = torch.where(p_a > 0.5, (2 * p_a - 1) / (2 * (1 - p_a)) * (at_a - p), 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("detach", [False, True])
def test_max_target_is_exactly_nothing_where_the_token_is_the_maximum(dtype, detach):
    logits, _, _ = distributions(N=500)
    z = logits.to(dtype).requires_grad_()
    losses = losses_of("max_target_kl", z, logits.argmax(-1), {}, detach_target=detach)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    assert not losses.any() and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("detach", [False, True])
def test_rank_jsd_is_exactly_nothing_at_rank_1(dtype, detach):
    logits, _, _ = distributions(N=500)
    logits[::2] = logits[::2].round()  # with ties
    last_maximum = logits.shape[1] - 1 - logits.flip(-1).argmax(-1)
    for actions in (logits.argmax(-1), last_maximum):
        z = logits.to(dtype).requires_grad_()
        losses = losses_of("rank_jsd", z, actions, {}, detach_target=detach)
        (gradient,) = torch.autograd.grad(losses.sum(), z)
        assert not losses.any() and not gradient.any()


def test_which_logps_rank_jsd_gives_gradient():
    # p = 0.5 0.2 0.15 0.1 0.05; tokens of rank 1, 2, 3 and 5, the last beyond the cap
    def gradients(detach):
        top = torch.tensor([[0.5, 0.2, 0.15, 0.1]] * 4, dtype=torch.float64).log()
        logps = torch.tensor([0.5, 0.2, 0.15, 0.05], dtype=torch.float64).log()
        leaves = logps.requires_grad_(), top.requires_grad_()
        losses = rank_jsd(*leaves, max_rank=3, detach_target=detach)
        return torch.autograd.grad(losses.sum(), leaves)

    def half(p, q):  # of d jsd / d log p
        return 0.5 * p * math.log(2 * p / (p + q))

    close = dict(rtol=1e-12, atol=1e-15)
    expected = torch.tensor(
        [
            [0, 0, 0, 0],
            [half(0.5, 0.2), 0, 0, 0],
            [half(0.5, 0.2), half(0.2, 0.15), 0, 0],
            [half(0.5, 0.2), half(0.2, 0.15), half(0.15, 0.05), 0],
        ],
        dtype=torch.float64,
    )
    of_logps = torch.tensor([0, half(0.2, 0.5), half(0.15, 0.5), half(0.05, 0.5)]).double()
    on_logps, on_top = gradients(detach=True)
    torch.testing.assert_close(on_top, expected, **close)
    torch.testing.assert_close(on_logps, of_logps, rtol=1e-6, atol=1e-9)

    more = torch.zeros(4, 4, dtype=torch.float64)  # what the target adds
    more[1:, 0] = torch.tensor([half(0.5, 0.2), half(0.5, 0.15), half(0.5, 0.05)])
    more[2:, 1], more[3, 2] = half(0.2, 0.5), half(0.15, 0.2)
    on_a = torch.tensor([0, half(0.2, 0.5), half(0.15, 0.2), half(0.05, 0.15)])
    on_logps, on_top = gradients(detach=False)
    torch.testing.assert_close(on_top, expected + more, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(on_logps, of_logps + on_a, rtol=1e-6, atol=1e-9)


def test_which_statistics_receive_gradient():
    def leaves():
        p, p_max = torch.tensor([0.2, 0.6]), torch.tensor([0.6, 0.6])
        values = [p.log(), (-p).log1p(), p_max.log(), (-p_max).log1p()]
        return [value.requires_grad_() for value in values]

    attached = leaves()
    max_target_kl(*attached).sum().backward()
    assert all(leaf.grad[0] != 0 and leaf.grad[1] == 0 for leaf in attached)

    detached = leaves()
    max_target_kl(*detached, detach_target=True).sum().backward()
    assert all(leaf.grad[0] != 0 for leaf in detached[:2])
    assert all(leaf.grad is None for leaf in detached[2:])

    logps, log1mps = leaves()[:2]
    fixed_target_kl(logps, log1mps).sum().backward()
    assert logps.grad.tolist() == [0, -0.5] and log1mps.grad.tolist() == [0, -0.5]

    logps, advantages = leaves()[0], torch.tensor([1.0, -1.0])
    old = (logps.detach() - torch.tensor([0.5, 0.0])).requires_grad_()
    ppo(logps, old.detach(), advantages)[0].sum().backward()
    assert logps.grad.tolist() == [0, 1]  # the first is clipped, the second at ratio 1


# ---------------------------------------------------------------- extremes


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(
    "logps, log1mps, max_logps, max_log1mps, expected",
    [
        (0.0, -INF, 0.0, -INF, 0.0),  # the only token there is
        (-200.0, -0.0, 0.0, -INF, 200.0),  # certain maximum, another token
        (-200.0, -0.0, 0.0, -200.0, 200.0),  # exp(max_log1mps) underflows
        (-1e-9, -INF, -1e-9, -20.0, 0.0),  # a = m, statistics out of step
    ],
)
def test_max_target_at_extremes(logps, log1mps, max_logps, max_log1mps, expected, detach):
    leaves = [
        torch.tensor([v], requires_grad=True) for v in (logps, log1mps, max_logps, max_log1mps)
    ]
    losses = max_target_kl(*leaves, detach_target=detach)
    assert losses.item() == expected
    losses.sum().backward()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "logp, top, expected",
    [
        (-INF, [0.0, -INF, -INF], math.log(2)),  # an impossible token below a certain one
        (-1000.0, [0.0, -1000.0, -INF], math.log(2)),  # p(a) underflows
        (-60.0, [0.0, -61.0, -62.0], math.log(2)),
        (-INF, [-math.log(2), -math.log(2), -INF], math.log(2) / 2),  # only 0.5 of p moves
        (-300.0, [-100.0, -200.0, -300.0], 0.0),  # nothing but tiny probabilities
        (-INF, [-INF, -INF, -INF], 0.0),
        (0.0, [0.0, -INF, -INF], 0.0),  # the only token there is
    ],
)
def test_rank_jsd_at_extremes(logp, top, expected, dtype, detach):
    logps = torch.tensor([logp], dtype=dtype, requires_grad=True)
    top_logps = torch.tensor([top], dtype=dtype, requires_grad=True)
    losses = rank_jsd(logps, top_logps, max_rank=3, detach_target=detach)
    assert losses.item() == pytest.approx(expected, rel=1e-6, abs=1e-40)
    gradients = torch.autograd.grad(losses.sum(), (logps, top_logps))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("name", ["max_target_kl", "fixed_target_kl", "rank_jsd"])
def test_extreme_logits_leave_no_nan(name, gate):
    logits = torch.tensor(
        [
            [0.0, -25.0, -25.0],
            [0.0, -1000.0, -1000.0],
            [0.0, -INF, -INF],
            [0.0, 0.0, -INF],
            [-1e4, -1e4, -1e4],
            [300.0, 300.0, -300.0],
        ]
    )
    options = {"gate": gate} if name == "fixed_target_kl" else {"detach_target": gate}
    for action in (0, 1):
        # Token 1 of row 2 is impossible: it can be no action.
        rows = [r for r in range(6) if action == 0 or r != 2]
        z = logits[rows].clone().requires_grad_()
        actions = torch.full((len(rows),), action)
        losses = losses_of(name, z, actions, {}, **options)
        assert losses.isfinite().all()
        (gradient,) = torch.autograd.grad(losses.sum(), z)
        assert gradient.isfinite().all()


def test_fixed_target_pulls_down_a_saturated_token_but_not_the_only_one():
    z = torch.tensor([[0.0, -1000.0, -1000.0], [0.0, -INF, -INF]], requires_grad=True)
    losses = losses_of("fixed_target_kl", z, torch.tensor([0, 0]), {})
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    assert losses[0].item() == pytest.approx(0.5 * (1000 - math.log(2)) + math.log(0.5))
    torch.testing.assert_close(gradient[0], torch.tensor([0.5, -0.25, -0.25]))
    assert losses[1] == 0 and not gradient[1].any()


@pytest.mark.parametrize("name", LOSSES)
def test_nan_is_not_hidden(name):
    loss = resolve_loss(config(name=name))
    losses, _ = loss(filled(loss, 1, float("nan")))
    assert losses.isnan().all()


@pytest.mark.parametrize("bad", ["logps", "top_logps"])
def test_rank_jsd_hides_no_nan(bad):
    p = torch.tensor([0.2, 0.5])
    tensors = {"logps": p.log(), "top_logps": torch.tensor([[0.5, 0.2, 0.1]] * 2).log()}
    tensors[bad][0] = float("nan")
    losses = rank_jsd(**tensors, max_rank=3)
    assert losses[0].isnan() and losses[1] == 0


@pytest.mark.parametrize("name", LOSSES)
def test_no_tokens(name):
    loss = resolve_loss(config(name=name))
    tensors = filled(loss, 0, 0.0)
    for statistic in loss.statistics:
        tensors[statistic].requires_grad_()
    losses, metrics = loss(tensors)
    assert all(values.shape == (0,) for values in (losses, *metrics.values()))
    losses.sum().backward()


# ---------------------------------------------------------------- resolving


@pytest.mark.parametrize(
    "name, statistics, fields",
    [
        ("ppo", ("logps",), ("old_logps", "advantages")),
        ("max_target_kl", ("logps", "log1mps", "max_logps", "max_log1mps"), ()),
        ("fixed_target_kl", ("logps", "log1mps"), ()),
        ("rank_jsd", ("logps", "top_logps"), ()),
        ("nll", ("logps",), ()),
    ],
)
def test_what_each_loss_needs(name, statistics, fields):
    loss = resolve_loss(config(name=name))
    assert isinstance(loss, TokenLoss) and loss.name == name
    assert (loss.statistics, loss.fields) == (statistics, fields)
    assert loss.uses_advantages == (name == "ppo")
    assert loss.top_k == (8 if name == "rank_jsd" else 0)
    assert set(loss.statistics) <= set(STATISTICS) and set(loss.fields) <= set(FIELDS)


def test_plain_dict_without_optional_keys():
    assert resolve_loss({"name": "nll"}).name == "nll"


def clip_ratios(loss):
    ratio = torch.tensor([1.15, 1.25])
    tensors = {"logps": ratio.log(), "old_logps": torch.zeros(2), "advantages": torch.ones(2)}
    return loss(tensors)[1]["clip_ratio"].tolist()


def test_options_and_fallbacks_are_bound():
    fallbacks = {"clip_low": 0.1, "clip_high": 0.1, "unrelated": 1}
    assert clip_ratios(resolve_loss(config())) == [0, 1]
    assert clip_ratios(resolve_loss(config(clip_high=0.3))) == [0, 0]
    assert clip_ratios(resolve_loss(config(options={"clip_high": 0.3}))) == [0, 0]
    assert clip_ratios(resolve_loss(config(), fallbacks)) == [1, 1]
    assert clip_ratios(resolve_loss(config(clip_high=0.3), fallbacks)) == [0, 0]
    assert resolve_loss(config(name="nll"), fallbacks).name == "nll"


@pytest.mark.parametrize(("said", "meant"), [("no", False), ("FALSE", False), (0, False),
                                             ("on", True), (None, None)])  # fmt: skip
def test_an_option_that_is_true_or_false_takes_what_a_typed_key_takes(said, meant):
    loss = resolve_loss(config(name="fixed_target_kl", options={"gate": said}))
    assert loss.function.keywords.get("gate") is meant


def test_max_rank_says_how_many_columns(stranger):
    assert resolve_loss(config(name="rank_jsd", max_rank=4)).top_k == 4
    assert resolve_loss(config(name="rank_jsd", options={"max_rank": 5})).top_k == 5
    assert resolve_loss(config(name="rank_jsd", max_rank=1)).top_k == 1
    assert resolve_loss(config(import_path="my_loss.py:top")).top_k == 6
    assert resolve_loss(config(import_path="my_loss.py:top", max_rank=2)).top_k == 2
    # of a loss without top_logps it is an option like any other
    assert resolve_loss(config(import_path="my_loss.py:ranked", max_rank=3)).top_k == 0


@pytest.mark.parametrize("max_rank", [1, 2, 3, 4, 20])
def test_the_trial_tokens_are_distributions(stranger, max_rank):
    loss = resolve_loss(config(import_path="my_loss.py:top", max_rank=max_rank))
    seen = loss.function.func.__globals__["seen"]
    for logps, max_logps, ranks, top in seen[:2]:  # ordinary ones and extremes; then them again
        assert top.shape == (3, max_rank) and top.requires_grad
        assert torch.equal(top[:, 0], max_logps)
        assert (top[:, 1:] <= top[:, :-1]).all() and (top.exp().sum(-1) < 1 + 1e-6).all()
        assert (1 + (top > logps[:, None]).sum(-1) == ranks.clamp(max=max_rank + 1)).all()
        for row in range(3):
            assert logps[row] in top[row] or ranks[row] > max_rank


def test_rank_jsd_wants_its_columns():
    for top, max_rank in ((torch.zeros(2, 3), 4), (torch.zeros(2), 1)):
        with pytest.raises(ValueError, match=r"top_logps \(2.*\): expected \[N, [14]\]"):
            rank_jsd(torch.zeros(2), top, max_rank=max_rank)
    with pytest.raises(ValueError, match="max_rank=0: must be 1 or more"):
        rank_jsd(torch.zeros(2), torch.zeros(2, 0), max_rank=0)


STRANGER = """
from dataclasses import dataclass

import torch

@dataclass
class Helper:
    scale: "float"

def my_loss(log1mps, ranks, advantages, logps, *, scale=2.0, floor):
    losses = Helper(scale).scale * (log1mps - logps) * ranks * advantages
    return losses.clamp(min=floor), {"my/rank": ranks}

def plain(logps):
    return -logps

def mean(logps):
    return -logps.mean()

def detached(logps):
    return -logps.detach()

def metric_of_wrong_shape(logps):
    return -logps, {"p": logps.exp().mean()}

def raises(logps):
    return logps / undefined

def star(*args):
    return args[0]

def keywords(logps, **kwargs):
    return logps

def misspelt(logp):
    return -logp

def option_before_star(logps, beta=0.1):
    return -logps

def no_statistic(rewards):
    return -rewards

def positional(logps, /, log1mps):
    return log1mps - logps

seen = []

def top(logps, max_logps, ranks, top_logps, *, max_rank=6):
    seen.append((logps, max_logps, ranks, top_logps))
    return top_logps[:, 0] - logps

def unbounded(logps, top_logps):
    return top_logps[:, 0] - logps

def ranked(logps, *, max_rank=1.5):
    return max_rank * logps

def open_rank(logps, top_logps, *, max_rank):
    return top_logps[:, 0] - logps

constant = 3
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text(STRANGER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_strangers_loss(stranger):
    for path in ("my_loss.py", str(stranger / "my_loss.py")):
        # import_path goes before the name that a trainer's yaml holds
        loss = resolve_loss(
            config(name="max_target_kl", import_path=f"{path}:my_loss", options={"floor": -3})
        )
        assert loss.name == "my_loss" and loss.uses_advantages
        assert loss.statistics == ("log1mps", "ranks", "logps")
        logps = torch.tensor([-1.0, -2.0], requires_grad=True)
        losses, metrics = loss(
            {
                "logps": logps,
                "log1mps": torch.zeros(2),
                "ranks": torch.tensor([1.0, 2.0]),
                "advantages": torch.tensor([1.0, -1.0]),
                "entropy": torch.zeros(2),
            }
        )
        assert losses.tolist() == [2, -3] and metrics["my/rank"].tolist() == [1, 2]
        losses.sum().backward()
        assert logps.grad.tolist() == [-2, 0]


def test_a_loss_with_positional_only_parameters(stranger):
    loss = resolve_loss(config(import_path="my_loss.py:positional"))
    assert loss({"logps": torch.ones(1), "log1mps": torch.zeros(1)})[0].item() == -1


def test_a_loss_in_a_module():
    loss = resolve_loss(config(name=None, import_path="RL2.algorithms.losses:nll"))
    assert loss.name == "nll"


@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(name="ppi"), ["actor.loss.name=ppi: unknown; did you mean ppo?", "import_path"]),
        (dict(name="zzz"), ["actor.loss.name=zzz: unknown; use ppo, max_target_kl"]),
        (dict(name=None), ["actor.loss.name=None: unknown; use"]),
        (
            dict(name="max_target_kl", clip_low=0.1),
            [
                "actor.loss.clip_low=0.1: no option of actor.loss.name=max_target_kl",
                "detach_target",
            ],
        ),
        (dict(name="nll", gate=False), ["actor.loss.gate=False", "it takes no options"]),
        (
            dict(options={"clip_hihg": 0.1}),
            ["actor.loss.options.clip_hihg=0.1", "did you mean clip_high?"],
        ),
        (dict(clip_low=0.1, options={"clip_low": 0.2}), ["same option twice"]),
        (
            dict(name="fixed_target_kl", target=1.5),
            ["actor.loss.name=fixed_target_kl", "target=1.5: must lie strictly between 0 and 1"],
        ),
        (dict(clip_low=-0.1), ["clip_low=-0.1", "must not be negative"]),
        (dict(import_path="my_loss.py"), ["import_path=my_loss.py: expected file.py:function"]),
        (dict(import_path="my_loss.py:"), ["expected file.py:function"]),
        (dict(import_path="nowhere.py:f"), ["there is no file", "nowhere.py", "relative to"]),
        (dict(import_path="no_such_module:f"), ["importing no_such_module raised"]),
        (dict(import_path="broken.py:f"), ["importing broken.py raised SyntaxError"]),
        (dict(import_path="late.py:f"), ["raised KeyError: 'a' (late.py:2); make it importable"]),
        (
            dict(import_path="my_loss.py:my_los"),
            ["no my_los in my_loss.py", "did you mean my_loss?", "it defines Helper, my_loss,"],
        ),
        (dict(import_path="my_loss.py:constant"), ["no constant in"]),
        (dict(import_path="my_loss.py:my_loss"), ["option floor has no default"]),
        (dict(import_path="my_loss.py:mean"), ["losses of 3 tokens came back as []"]),
        (dict(import_path="my_loss.py:metric_of_wrong_shape"), ["p of 3 tokens came back as []"]),
        (dict(import_path="my_loss.py:detached"), ["have no gradient", "from logps"]),
        (
            dict(import_path="my_loss.py:raises"),
            ["raised NameError: name 'undefined' is not defined (my_loss.py:27)"],
        ),
        (dict(import_path="my_loss.py:star"), ["its parameter *args does not say"]),
        (dict(import_path="my_loss.py:keywords"), ["its parameter **kwargs does not say"]),
        (
            dict(import_path="my_loss.py:misspelt"),
            ["its parameter logp is neither", "did you mean logps?"],
        ),
        (
            dict(import_path="my_loss.py:option_before_star"),
            ["its parameter beta is neither", "options come after a lone *"],
        ),
        (dict(import_path="my_loss.py:no_statistic"), ["takes no token statistic"]),
        (
            dict(import_path="my_loss.py:unbounded"),
            ["takes top_logps without saying how many", "max_rank=8 after a lone *"],
        ),
        (dict(import_path="my_loss.py:open_rank"), ["option max_rank has no default"]),
        (dict(name="rank_jsd", max_rank=0), ["name=rank_jsd", "max_rank=0 must be a whole number"]),
        (
            dict(name="fixed_target_kl", options={"gate": "nope"}),
            ["actor.loss.options.gate=nope: not true or false"],
        ),
        (dict(name="rank_jsd", options={"max_rank": 2.5}), ["max_rank=2.5 must be a whole number"]),
        (dict(name="rank_jsd", options={"max_rank": True}), ["max_rank=True must be a whole"]),
        (
            dict(name="nll", max_rank=4),
            ["actor.loss.max_rank=4: no option of actor.loss.name=nll"],
        ),
        (
            dict(name="rank_jsd", gate=True),
            ["actor.loss.gate=True: no option of", "it takes max_rank, detach_target"],
        ),
    ],
)
def test_errors_name_key_value_and_way_out(stranger, changes, parts):
    (stranger / "broken.py").write_text("def f(:\n")
    (stranger / "late.py").write_text("x = {}\nx['a']\n")
    with pytest.raises(ConfigError) as error:
        resolve_loss(config(**changes))
    message = str(error.value)
    assert message.startswith("actor.loss.")
    for part in parts:
        assert part in message


def test_readme_example_of_the_module_docstring_trains():
    import RL2.algorithms.losses as module

    source = [line[4:] for line in module.__doc__.splitlines() if line.startswith("    ")]
    namespace = {}
    exec("\n".join(source), namespace)
    logps = torch.tensor([-1.0], requires_grad=True)
    namespace["my_loss"](logps, torch.tensor([-0.4]), torch.ones(1)).sum().backward()
    assert logps.grad.item() == -1
