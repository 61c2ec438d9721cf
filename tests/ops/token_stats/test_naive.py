import math
from functools import partial

import pytest
import torch

from RL2.ops.token_stats import naive
from tests.ops.token_stats.support import STATISTICS

TOP_K = 4
token_stats = partial(naive.token_stats, top_k=TOP_K)
linear_token_stats = partial(naive.naive_token_stats, top_k=TOP_K)
DIFFERENTIABLE = [name for name in STATISTICS if name != "ranks"]


def textbook(logits, actions, temperature):
    """The definitions, in float64, without any care for speed; exact at both ends of log(1-p)."""
    z = logits.double() / temperature
    rows = torch.arange(len(z))
    p = z.softmax(-1)
    maxima = torch.tensor([min(j for j in range(len(r)) if r[j] == r.max()) for r in z])

    def log1m(index):
        others = z.clone()
        others[rows, index] = float("-inf")
        p_index = p[rows, index]
        return torch.where(
            p_index > 0.5, others.logsumexp(-1) - z.logsumexp(-1), torch.log1p(-p_index)
        )

    def log(index):
        logp = z.log_softmax(-1)[rows, index]
        return torch.where(logp > math.log(0.5), torch.log1p(-log1m(index).exp()), logp)

    V = z.shape[1]
    order = z.sort(dim=-1, descending=True, stable=True).indices
    missing = torch.full_like(z[:, 0], float("-inf"))

    return {
        "logps": log(actions),
        "log1mps": log1m(actions),
        "max_logps": log(maxima),
        "max_log1mps": log1m(maxima),
        "entropy": torch.special.entr(p).sum(-1),
        "ranks": 1 + (z > z[rows, actions].unsqueeze(-1)).sum(-1).double(),
        "top_logps": torch.stack(
            [log(order[:, k]) if k < V else missing for k in range(TOP_K)], -1
        ),
    }


def random_case(T=13, H=5, V=11, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    logits = hidden @ weight.T + bias
    actions = torch.randint(V, (T,), generator=generator)
    actions[::2] = logits[::2].argmax(-1)  # every other token is the greedy one
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), actions


def test_hand_made_distribution():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.25, 0.25, 0.5]])
    stats = token_stats(p.log() + 7.0, torch.tensor([1, 1, 0]), 1.0, STATISTICS)
    close = dict(rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.logps.exp(), torch.tensor([0.3, 0.7, 0.25]), **close)
    torch.testing.assert_close(stats.log1mps.exp(), torch.tensor([0.7, 0.3, 0.75]), **close)
    torch.testing.assert_close(stats.max_logps.exp(), torch.tensor([0.5, 0.7, 0.5]), **close)
    torch.testing.assert_close(stats.max_log1mps.exp(), torch.tensor([0.5, 0.3, 0.5]), **close)
    entropy = [-sum(q * math.log(q) for q in row) for row in p.tolist()]
    torch.testing.assert_close(stats.entropy, torch.tensor(entropy), **close)
    assert stats.ranks.tolist() == [2, 1, 2]
    top = torch.tensor([[0.5, 0.3, 0.2, 0], [0.7, 0.2, 0.1, 0], [0.5, 0.25, 0.25, 0]])
    torch.testing.assert_close(stats.top_logps.exp(), top, **close)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_float64_equals_the_definitions(temperature, with_bias):
    hidden, weight, bias, actions = random_case(T=64)
    bias = bias if with_bias else None
    stats = linear_token_stats(hidden, weight, actions, temperature, STATISTICS, bias)
    logits = hidden @ weight.T + (bias if with_bias else 0)
    for name, expected in textbook(logits, actions, temperature).items():
        value = getattr(stats, name)
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
def test_fp32_has_the_digits_of_fp32(scale):
    hidden, weight, bias, actions = random_case(T=256, V=50, dtype=torch.float32, scale=scale)
    logits = hidden @ weight.T + bias
    stats = token_stats(logits, actions, 1.0, STATISTICS)
    for name, expected in textbook(logits, actions, 1.0).items():
        atol = 1e-14 if name == "entropy" else 1e-30  # the oracle's own error
        torch.testing.assert_close(
            getattr(stats, name).double(), expected, rtol=1e-5, atol=atol, msg=name
        )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_gradcheck(name, temperature):
    hidden, weight, bias, actions = random_case(T=6, H=3, V=7)
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]

    def statistic(hidden, weight, bias):
        stats = linear_token_stats(hidden, weight, actions, temperature, [name], bias)
        return getattr(stats, name)

    assert torch.autograd.gradcheck(statistic, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)


def test_gradients_equal_their_closed_forms():
    hidden, weight, bias, actions = random_case(T=32)
    z = (hidden @ weight.T + bias).requires_grad_()
    stats = token_stats(z, actions, 1.0, STATISTICS)
    p, at_a = z.detach().softmax(-1), torch.nn.functional.one_hot(actions, z.shape[1])
    maxima = z.argmax(-1)
    at_m = torch.nn.functional.one_hot(maxima, z.shape[1])
    S = stats.entropy.detach().unsqueeze(-1)

    def log1m(at):
        p_at = (p * at).sum(-1, keepdim=True)
        return -p_at * at + (1 - at) * p_at * p / (1 - p_at)

    expected = {
        "logps": at_a - p,
        "log1mps": log1m(at_a),
        "max_logps": at_m - p,
        "max_log1mps": log1m(at_m),
        "entropy": -p * (p.log() + S),
    }
    for name, value in expected.items():
        (gradient,) = torch.autograd.grad(getattr(stats, name).sum(), z, retain_graph=True)
        torch.testing.assert_close(gradient, value, rtol=1e-10, atol=1e-12, msg=name)
    order = z.argsort(-1, descending=True)
    for k in range(TOP_K):
        at_k = torch.nn.functional.one_hot(order[:, k], z.shape[1])
        (gradient,) = torch.autograd.grad(stats.top_logps[:, k].sum(), z, retain_graph=True)
        torch.testing.assert_close(gradient, at_k - p, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", STATISTICS)
def test_only_what_is_wanted(name):
    hidden, weight, _, actions = random_case()
    hidden.requires_grad_()
    stats = linear_token_stats(hidden, weight, actions, 1.0, [name])
    assert list(stats.as_dict()) == [name]
    assert [s for s in STATISTICS if getattr(stats, s) is not None] == [name]
    assert getattr(stats, name).requires_grad == (name != "ranks")
    everything = linear_token_stats(hidden, weight, actions, 1.0, STATISTICS)
    assert torch.equal(getattr(stats, name), getattr(everything, name))


def test_gradient_reaches_what_requires_it():
    hidden, weight, bias, actions = random_case()
    weight.requires_grad_()
    stats = linear_token_stats(hidden, weight, actions, 1.0, ["logps"], bias)
    stats.logps.sum().backward()
    assert weight.grad.abs().sum() > 0 and hidden.grad is None and bias.grad is None
    with torch.no_grad():
        assert not linear_token_stats(hidden, weight, actions, 1.0, ["logps"]).logps.requires_grad


def test_inputs_are_left_as_they_are():
    logits = torch.randn(4, 5)
    before = logits.clone()
    token_stats(logits, torch.zeros(4, dtype=torch.long), 1.0, STATISTICS)
    assert torch.equal(logits, before)


def gradients(logits, actions, names=DIFFERENTIABLE):
    """{name: d statistic.sum() / d logits}"""
    logits = logits.clone().requires_grad_()
    stats = token_stats(logits, actions, 1.0, names)
    return {
        name: torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]
        for name, value in stats.as_dict().items()
    }


@pytest.mark.parametrize("gap", [15.0, 25.0, 88.0, 110.0, 300.0, 1000.0])
def test_probability_near_one(gap):
    logits = torch.tensor([[0.0, -gap, -gap - 1.0], [0.0, -gap, -gap - 1.0]])
    actions = torch.tensor([0, 1])
    stats = token_stats(logits, actions, 1.0, STATISTICS)
    rest = -gap + math.log1p(math.exp(-1.0))
    assert stats.log1mps[0].item() == pytest.approx(rest - math.log1p(math.exp(rest)), rel=1e-6)
    assert stats.max_log1mps[1] == stats.log1mps[0]
    assert stats.log1mps[1].item() == pytest.approx(-math.exp(-gap), rel=1e-5, abs=1e-45)
    assert stats.logps[0].item() == pytest.approx(-math.exp(rest), rel=1e-5, abs=1e-44)

    found = gradients(logits, actions)
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
    # -p_a at a; p_a times the share among the others elsewhere
    share = 1 / (1 + math.exp(-1.0))
    expected = torch.tensor([-1.0, share, 1 - share])
    torch.testing.assert_close(found["log1mps"][0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exponent", range(7, 17))
def test_probability_near_zero(exponent):
    p = 10.0**-exponent
    logits = torch.tensor([[0.0, math.log(p), 0.0]])
    stats = token_stats(logits, torch.tensor([1]), 1.0, STATISTICS)
    p_a = math.exp(logits[0, 1].item()) / (2 + p)  # of the logit as fp32 holds it
    assert stats.log1mps.item() == pytest.approx(math.log1p(-p_a), rel=1e-5)
    assert stats.log1mps.item() != 0
    found = gradients(logits, torch.tensor([1]))["log1mps"][0]
    assert found[1].item() == pytest.approx(-p_a, rel=1e-5)
    assert found[0].item() == pytest.approx(p_a / 2, rel=1e-5)


def test_lowest_index_wins_a_tie():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0]]).requires_grad_()
    stats = token_stats(logits, torch.tensor([3]), 1.0, STATISTICS)
    assert stats.ranks.item() == 1
    assert stats.max_logps.item() == stats.logps.item()
    (gradient,) = torch.autograd.grad(stats.max_logps.sum(), logits)
    assert gradient[0, 1] > 0 > gradient[0, 2]  # delta at the first of the three


@pytest.mark.parametrize("V", [2, 3, 1000])
def test_uniform_distribution(V):
    logits = torch.full((1, V), -5.0)
    for action in (0, V - 1):
        actions = torch.tensor([action])
        stats = token_stats(logits, actions, 1.0, STATISTICS)
        assert stats.logps.item() == pytest.approx(-math.log(V), rel=1e-6)
        assert stats.log1mps.item() == pytest.approx(math.log1p(-1 / V), rel=1e-6)
        assert stats.max_log1mps.item() == pytest.approx(math.log1p(-1 / V), rel=1e-6)
        assert stats.entropy.item() == pytest.approx(math.log(V), rel=1e-6)
        assert all(g.isfinite().all() for g in gradients(logits, actions).values())


def test_impossible_columns_change_nothing():
    hidden, weight, bias, actions = random_case(dtype=torch.float32)
    hidden.requires_grad_()
    plain = linear_token_stats(hidden, weight, actions, 1.0, STATISTICS, bias)
    padded_weight = torch.cat([weight, torch.randn(3, weight.shape[1])])
    padded_bias = torch.cat([bias, torch.full((3,), float("-inf"))])
    padded = linear_token_stats(hidden, padded_weight, actions, 1.0, STATISTICS, padded_bias)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name))
        if name != "ranks":
            a, b = (
                torch.autograd.grad(getattr(s, name).sum(), hidden, retain_graph=True)[0]
                for s in (padded, plain)
            )
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("logits", [[[2.0]], [[float("-inf"), 2.0, float("-inf")]]])
def test_only_one_token_is_possible(logits):
    logits = torch.tensor(logits)
    actions = logits.argmax(-1)
    stats = token_stats(logits, actions, 1.0, STATISTICS)
    assert stats.logps.item() == stats.max_logps.item() == stats.entropy.item() == 0
    assert stats.log1mps.item() == stats.max_log1mps.item() == float("-inf")
    assert stats.ranks.item() == 1
    for gradient in gradients(logits, actions).values():
        assert torch.equal(gradient, torch.zeros_like(logits))


def test_impossible_action():
    logits = torch.tensor([[1.0, float("-inf"), 0.0]])
    stats = token_stats(logits, torch.tensor([1]), 1.0, STATISTICS)
    assert stats.logps.item() == float("-inf") and stats.log1mps.item() == 0
    assert stats.ranks.item() == 3
    for gradient in gradients(logits, torch.tensor([1])).values():
        assert gradient.isfinite().all()


@pytest.mark.parametrize("offset", [-1e4, -300.0, 300.0, 4096.0])
def test_nothing_depends_on_the_offset(offset):
    # Multiples of 1/512 below 2^14 are exact in fp32 whatever the offset.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-4096, 4096, (32, 50), generator=generator) / 512
    actions = torch.randint(50, (32,), generator=generator)
    here = token_stats(logits, actions, 1.0, STATISTICS)
    there = token_stats(logits + offset, actions, 1.0, STATISTICS)
    for name in STATISTICS:
        assert torch.equal(getattr(here, name), getattr(there, name)), name
    exact = textbook(logits, actions, 1.0)["entropy"]
    torch.testing.assert_close(there.entropy.double(), exact, rtol=1e-6, atol=1e-6)


def test_entropy_of_a_sharp_distribution_at_an_offset():
    logits = torch.tensor([[300.0, 280.0, 279.0]])
    stats = token_stats(logits, torch.tensor([0]), 1.0, ["entropy"])
    exact = textbook(logits, torch.tensor([0]), 1.0)["entropy"]
    torch.testing.assert_close(stats.entropy.double(), exact, rtol=1e-5, atol=0)


def test_order_sees_differences_that_the_shift_rounds_away():
    logits = torch.tensor([[300.0, 0.0, 1e-8]], requires_grad=True)
    actions = torch.tensor([1])
    assert token_stats(logits, actions, 1.0, ["ranks"]).ranks.item() == 3
    second = token_stats(logits, actions, 1.0, ["top_logps"]).top_logps[0, 1]
    (gradient,) = torch.autograd.grad(second, logits)
    assert gradient.tolist() == [[-1, 0, 1]]


# ---------------------------------------------------------------- the most likely tokens


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 3, 11, 15])
def test_top_logps_are_the_largest(temperature, top_k):
    hidden, weight, bias, actions = random_case(T=64)
    found = naive.naive_token_stats(
        hidden, weight, actions, temperature, ["top_logps"], bias, top_k=top_k
    ).top_logps
    everything = ((hidden @ weight.T + bias) / temperature).log_softmax(-1)
    expected = everything.sort(-1, descending=True).values[:, :top_k]
    assert found.shape == (64, top_k) and found.dtype == torch.float64
    torch.testing.assert_close(found[:, :11], expected, rtol=1e-12, atol=1e-12)
    assert (found[:, 11:] == float("-inf")).all()


def test_the_first_of_the_top_is_the_maximum_and_one_of_them_the_action():
    logits = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    actions = torch.arange(100) % 6
    wanted = ["logps", "max_logps", "ranks", "top_logps"]
    stats = naive.token_stats(logits, actions, 0.7, wanted, 6)
    assert torch.equal(stats.top_logps[:, 0], stats.max_logps)
    at_rank = stats.top_logps.gather(-1, stats.ranks.long()[:, None] - 1)[:, 0]
    assert torch.equal(at_rank, stats.logps)  # bit for bit: losses compare them
    (one,) = naive.token_stats(logits, actions, 0.7, ["top_logps"], 1).as_dict().values()
    assert torch.equal(one, stats.max_logps[:, None])


def test_lowest_index_comes_first_among_equals():
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0, 3.0]]).requires_grad_()
    top = naive.token_stats(logits, torch.tensor([0]), 1.0, ["top_logps"], 5).top_logps[0]
    assert top[0] == top[1] == top[2] and top[3] == top[4] < top[2]
    gradients = [torch.autograd.grad(one, logits, retain_graph=True)[0][0] for one in top]
    assert [gradient.argmax().item() for gradient in gradients] == [1, 3, 5, 0, 2]


def test_missing_tokens_are_minus_infinity_without_gradient():
    inf = float("inf")
    logits = torch.tensor([[-inf, 2.0, -inf, 1.0], [-inf, -inf, 0.0, -inf]]).requires_grad_()
    top = naive.token_stats(logits, torch.tensor([1, 2]), 1.0, ["top_logps"], 6).top_logps
    p = math.exp(-1) / (1 + math.exp(-1))
    torch.testing.assert_close(top[0, :2], torch.tensor([1 - p, p]).log())
    assert top[1, 0] == 0 and (top[0, 2:] == -inf).all() and (top[1, 1:] == -inf).all()
    (gradient,) = torch.autograd.grad(top[:, 1:].sum(), logits)  # of the second of row 0 alone
    torch.testing.assert_close(gradient, torch.tensor([[0, p - 1, 0, 1 - p], [0.0] * 4]))


def test_nan_logits_do_not_look_like_missing_tokens():
    logits = torch.tensor([[0.0, float("nan"), 1.0]])
    top = naive.token_stats(logits, torch.tensor([0]), 1.0, ["top_logps"], 3).top_logps
    assert top.isnan().all()


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_logps_without_their_number(top_k):
    hidden, weight, _, actions = random_case()
    with pytest.raises(ValueError, match=f"top_k={top_k}: top_logps needs"):
        naive.naive_token_stats(hidden, weight, actions, 1.0, ["top_logps"], top_k=top_k)
    naive.naive_token_stats(hidden, weight, actions, 1.0, ["logps"], top_k=top_k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_fp32_logits(dtype):
    hidden, weight, _, actions = random_case(T=64, H=64, V=100, dtype=dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    stats = linear_token_stats(hidden, weight, actions, 1.0, STATISTICS)
    logits = hidden.double() @ weight.double().T
    for name, expected in textbook(logits.detach(), actions, 1.0).items():
        value = getattr(stats, name)
        assert value.dtype == torch.float32
        # logits of size 30 carry errors of about 1e-5
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4, msg=name)
    stats.logps.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_autocast_does_not_round_the_logits():
    hidden, weight, _, actions = random_case(dtype=torch.float32)
    plain = linear_token_stats(hidden, weight, actions, 1.0, STATISTICS).as_dict()
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_token_stats(hidden, weight, actions, 1.0, STATISTICS).as_dict()
    for name in STATISTICS:
        assert torch.equal(plain[name], cast[name]), name


@pytest.mark.parametrize("T", [0, 1])
def test_few_tokens(T):
    hidden = torch.randn(T, 3, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    actions = torch.zeros(T, dtype=torch.long)
    stats = linear_token_stats(hidden, weight, actions, 1.0, STATISTICS)
    values = stats.as_dict()
    for name, value in values.items():
        assert value.shape == ((T, TOP_K) if name == "top_logps" else (T,))
    sum(value.sum() for value in values.values()).backward()
    assert weight.grad.shape == weight.shape and hidden.grad.shape == hidden.shape
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden=torch.zeros(2, 4)), "hidden (2, 4) and weight (5, 3)"),
        (dict(actions=torch.zeros(3, dtype=torch.long)), "actions (3,)"),
        (dict(weight=torch.zeros(0, 3)), "V >= 1"),
        (dict(temperature=0.0), "temperature=0.0: must be positive"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(wanted=["logp"]), "wanted=['logp']"),
        (dict(wanted="logps"), "wanted='logps'"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = dict(
        hidden=torch.zeros(2, 3),
        weight=torch.zeros(5, 3),
        actions=torch.zeros(2, dtype=torch.long),
        temperature=1.0,
        wanted=["logps"],
    )
    linear_token_stats(**arguments)
    with pytest.raises(ValueError) as error:
        linear_token_stats(**(arguments | change))
    assert message in str(error.value)
