"""One suite for every implementation: against float64 definitions, and against the naive one."""

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from RL2.ops.token_stats import kernels
from tests.ops.token_stats.support import (
    ALL,
    DIFFERENTIABLE,
    NEG_INF,
    OF_TOKENS,
    QUICK,
    SMALL,
    STATISTICS,
    TRAINED,
    AllocationRecorder,
    ProductCounter,
    RegisteredLoss,
    Tiling,
    as_linear,
    batch_fields,
    every_action,
    gradients,
    leaves,
    random_case,
    stats_of,
    textbook,
    unseen,
)

EPS = torch.finfo(torch.float32).eps
# compiled and interpreted kernels are slow: they take part where kernels are what is tested
everywhere = pytest.mark.parametrize("implementation", ALL)
quick = pytest.mark.parametrize("implementation", QUICK)
tiled = pytest.mark.parametrize("implementation", ALL[1:])
quick_tiled = pytest.mark.parametrize("implementation", QUICK[1:])


# ---------------------------------------------------------------- equal to naive in float64

# V, T, columns and rows of a tile: remainders of both, one column, fewer columns than a tile has
SHAPES = [
    (11, 13, 4, 5),
    (12, 10, 4, 5),
    (11, 1, 4, 5),
    (11, 5, 1, 1),
    (11, 13, 64, 64),
    (3, 7, 4, 5),
    (2, 3, 1, 5),
    (1, 3, 4, 5),
    (11, 0, 4, 5),
]


@tiled
@pytest.mark.parametrize("V, T, columns, rows", SHAPES)
def test_float64_equals_naive(implementation, V, T, columns, rows):
    *inputs, actions = random_case(T=T, V=V)
    for temperature, with_bias in ((1.0, True), (0.1, False), (2.0, True)):
        hidden, weight, bias = leaves(*inputs)
        arguments = (hidden, weight, actions, temperature, STATISTICS, bias if with_bias else None)
        found = stats_of(implementation, *arguments, tiling=Tiling(columns, rows))
        expected = stats_of("naive", *arguments)
        for name in STATISTICS:
            a, b = getattr(found, name), getattr(expected, name)
            assert a.dtype == torch.float64 and a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
            if name == "ranks":
                assert not a.requires_grad
                continue
            upstream = torch.randn(b.shape, dtype=b.dtype)
            a, b = (gradients(value * upstream, arguments[:2]) for value in (a, b))
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


@quick
@pytest.mark.parametrize("name", STATISTICS)
def test_one_statistic_alone(implementation, name):
    """Nothing else is returned, and value and gradients are those of a call for everything."""
    *inputs, actions = random_case()
    hidden, weight, bias = leaves(*inputs)
    alone, everything = (
        stats_of(implementation, hidden, weight, actions, 0.7, wanted, bias)
        for wanted in ([name], STATISTICS)
    )
    assert list(alone.as_dict()) == [name]
    a, b = getattr(alone, name), getattr(everything, name)
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert a.requires_grad == (name != "ranks")
    if a.requires_grad:
        for x, y in zip(*(gradients(v, (hidden, weight, bias)) for v in (a, b)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@quick
@pytest.mark.parametrize("temperature", [0.5, 1.3])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck_of_statistics(implementation, name, temperature):
    *inputs, actions = random_case(T=6, H=3, V=7)

    def statistic(hidden, weight, bias):
        arguments = (hidden, weight, actions, temperature, [name], bias)
        return getattr(stats_of(implementation, *arguments), name)

    assert torch.autograd.gradcheck(statistic, leaves(*inputs), eps=1e-6, atol=1e-6, rtol=1e-6)


# Finite differences see through what these detach.
STOPS_GRADIENTS = ("cispo", "dppo")


@quick
@pytest.mark.parametrize("name", [name for name in OF_TOKENS if name not in STOPS_GRADIENTS])
def test_gradcheck_of_losses(implementation, name):
    *inputs, actions = random_case(T=6, H=3, V=7)
    loss = RegisteredLoss(name, detach_target=False)  # finite differences see through a detach
    hidden, weight, bias = inputs
    fields = batch_fields(stats_of("naive", hidden, weight, actions, 0.8, ["logps"], bias))

    def losses(hidden, weight, bias):
        arguments = (hidden, weight, actions, 0.8, loss.wanted, bias)
        return loss(stats_of(implementation, *arguments, top_k=loss.top_k), fields)[0]

    assert torch.autograd.gradcheck(losses, leaves(*inputs), eps=1e-6, atol=1e-6, rtol=1e-6)


@tiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_loss_nobody_has_seen(implementation, dtype):
    *inputs, actions = random_case(T=29, dtype=dtype)
    hidden, weight, bias = leaves(*inputs)
    found, expected = (
        gradients(unseen(stats_of(i, hidden, weight, actions, 0.7, bias=bias)), [hidden, weight])
        for i in (implementation, "naive")
    )
    torch.testing.assert_close(found, expected, **_tolerance(dtype))


def _tolerance(dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    return {"rtol": tolerance, "atol": tolerance}


# ---------------------------------------------------------------- the digits of fp32


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# rows of logits, each tried with every column as the action
CASES = {
    **{f"gap {gap}": [[0.0, -gap, -gap - 1.0]] for gap in (15.0, 25.0, 88.0, 110.0, 300.0, 1000.0)},
    **{f"p = 1e-{n}": [[0.0, -n * math.log(10.0), 0.0, -0.5, 0.25]] for n in range(7, 17)},
    **{
        f"offset {offset}, scale {scale}": (_normal(6, 11) * scale + offset).tolist()
        for offset, scale in ((300.0, 1.0), (300.0, 8.0), (-300.0, 3.0), (-1e4, 3.0), (4096.0, 1.0))
    },
    "sharp at an offset": [[300.0, 280.0, 279.0, 120.0, -300.0]],
    "tie of maxima in a tile": [[1.0, 3.0, 3.0, 3.0, 0.0, 2.0]],
    "tie of maxima across tiles": [[1.0, 0.0, 0.5, 3.0, 3.0, 2.0, 1.0, 1.5, 3.0]],
    "tie of two sharp maxima": [[0.0, 200.0, 0.0, 0.0, 0.0, 200.0]],
    "all equal": [[-5.0] * 9, [0.0] * 9],
    "maximum first": [[50.0] + [0.0] * 8],
    "maximum last": [[0.0] * 8 + [50.0]],
    "rising": [torch.arange(13.0).tolist(), (torch.arange(13.0) * 40).tolist()],
    "falling": [(-torch.arange(13.0)).tolist(), (-torch.arange(13.0) * 40).tolist()],
    "padded columns": [[1.0, 2.0, 0.0, -1.0, 0.5, NEG_INF, NEG_INF]],
    "a tile of padding": [[1.0, 2.0, 0.0, -1.0] + [NEG_INF] * 4 + [0.5, 2.0]],
    "first tile is padding": [[NEG_INF] * 4 + [-700.0, -701.0, -720.0]],
    "padding everywhere but once": [[NEG_INF] * 5 + [2.0, NEG_INF, NEG_INF]],
    "one column": [[2.0], [-1e4]],
    "two columns": [[0.0, -30.0], [0.0, 0.0], [-3.0, 900.0]],
}


def _error(found, exact, scale):
    """The largest error, relative to `scale`; equal infinities are none, and fp32 cannot hold less
    than 1e-38."""
    error = (found.double() - exact).abs().sub(1e-38).clamp(min=0) / scale.clamp(min=1e-38)
    return error.masked_fill(found == exact, 0.0).nan_to_num(math.inf).amax().item()


def _errors(implementation, logits, actions, temperature=1.0, least_scale=0.0, tiling=SMALL):
    """{name: relative error}, {name: error of the gradient relative to the row's largest}, where
    that exceeds `least_scale`."""
    values, by_logits = textbook(logits, actions, temperature)
    hidden, weight, bias = as_linear(logits)
    (hidden,) = leaves(hidden)
    stats = stats_of(implementation, hidden, weight, actions, temperature, bias=bias, tiling=tiling)
    possible = logits.gather(-1, actions[:, None])[:, 0] > NEG_INF
    value_errors, gradient_errors = {}, {}
    for name, value in stats.as_dict().items():
        assert value.dtype == torch.float32
        value_errors[name] = _error(value, values[name], values[name].abs())
        if name == "ranks":
            continue
        (gradient,) = gradients(torch.where(value == NEG_INF, 0.0, value), [hidden])
        assert gradient.isfinite().all(), name
        exact = by_logits[name].masked_fill(bias == NEG_INF, 0.0)
        if name == "top_logps":  # which of equal columns is the second is left to chance
            gradient, exact = gradient.sort(-1).values, exact.sort(-1).values
        scale = exact.abs().amax(-1, keepdim=True)
        if name == "entropy":  # -p (log p + S) may be 0 everywhere
            scale = scale + values[name].unsqueeze(-1)
        scale = scale.clamp(min=least_scale)
        gradient_errors[name] = _error(gradient[possible], exact[possible], scale[possible])
    return value_errors, gradient_errors


@everywhere
@pytest.mark.parametrize("case", CASES)
def test_fp32_against_float64(implementation, case):
    logits, actions = every_action(CASES[case])
    # autograd subtracts 1 - (1 - p): its errors are relative to 1
    least_scale = 1 / 8 if implementation == "naive" else 0.0
    value_errors, gradient_errors = _errors(
        implementation, logits, actions, least_scale=least_scale
    )
    for name, error in value_errors.items():
        assert error < 16 * EPS, f"{name}: {error:.1e}"
    for name, error in gradient_errors.items():
        assert error < 16 * EPS, f"gradient of {name}: {error:.1e}"


@quick_tiled
@pytest.mark.parametrize("temperature", [0.1, 0.6, 2.0])
def test_fp32_is_never_worse_than_naive(implementation, temperature):
    actions = torch.arange(150) % 97
    for scale, offset in ((0.3, 0.0), (3.0, 40.0), (20.0, -300.0)):
        logits = _normal(150, 97) * scale + offset
        actions[::2] = logits[::2].argmax(-1)
        for mine, naive in zip(
            *(
                _errors(one, logits, actions, temperature, least_scale=1 / 8, tiling=Tiling(32, 64))
                for one in (implementation, "naive")
            ),
            strict=True,
        ):
            for name, error in mine.items():  # the largest of some thousand roundings is luck
                assert error <= 1.6 * naive[name] + 6 * EPS, f"{name}: {error / naive[name]:.1f} x"


@quick
def test_entropy_at_offsets_up_to_300(implementation):
    """As with a bias that all columns share: 3e-5 is one unit of the last place of a logit."""
    logits = _normal(32, 50)
    for offset in (-300.0, -20.0, 300.0):
        shifted = logits + offset
        actions = torch.zeros(32, dtype=torch.long)
        hidden, weight, _ = as_linear(logits)
        stats = stats_of(
            implementation,
            hidden,
            weight,
            actions,
            bias=torch.full((50,), offset),
            wanted=["entropy"],
        )
        for exact_of in (logits, shifted):
            exact = textbook(exact_of, actions)[0]["entropy"]
            torch.testing.assert_close(stats.entropy.double(), exact, rtol=0, atol=3e-5)


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_fp32_logits(implementation, dtype):
    hidden, weight, bias, actions = random_case(T=40, H=64, V=100, dtype=dtype)
    hidden, weight, bias = leaves(hidden, weight, bias.float())
    logits = (hidden.double() @ weight.double().T + bias.double()).detach()
    values, by_logits = textbook(logits, actions)
    stats = stats_of(implementation, hidden, weight, actions, bias=bias, tiling=Tiling(32, 16))
    for name, exact in values.items():
        value = getattr(stats, name)
        assert value.dtype == torch.float32
        # logits of size 30 carry errors of about 1e-5; rounded to bf16 they would carry 0.1
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-4, msg=name)
        if name == "ranks":
            continue
        exact = by_logits[name]
        exact = [exact @ weight.double(), exact.T @ hidden.double(), exact.sum(0)]
        for found, expected in zip(gradients(value, [hidden, weight, bias]), exact, strict=True):
            error = (found.double() - expected).norm() / expected.norm()
            # the gradient itself and what enters its products are rounded once each
            assert error < torch.finfo(dtype).eps, f"gradient of {name}: {error:.1e}"
        assert gradients(value, [hidden, weight])[0].dtype == dtype


@everywhere
def test_impossible_action(implementation):
    hidden, weight, bias = as_linear(torch.tensor([[1.0, NEG_INF, 0.0, 2.0, 0.0, 0.5]]))
    (hidden,) = leaves(hidden)
    stats = stats_of(implementation, hidden, weight, torch.tensor([1]), bias=bias)
    assert stats.logps.item() == NEG_INF and stats.log1mps.item() == 0 and stats.ranks.item() == 6
    for name in DIFFERENTIABLE:
        assert gradients(getattr(stats, name), [hidden])[0].isfinite().all(), name


@everywhere
@pytest.mark.parametrize("column", [0, 6, 10])
def test_nan_does_not_vanish(implementation, column):
    """A NaN logit makes every statistic of its token NaN, and of no other."""
    hidden, weight, bias = as_linear(_normal(3, 11))
    hidden[1, column] = math.nan
    hidden, weight = hidden.requires_grad_(), torch.eye(11)
    actions = torch.tensor([1, 2, 3])
    stats = stats_of(implementation, hidden, weight, actions, bias=bias)
    for name in ("logps", "log1mps", "max_logps", "max_log1mps", "entropy"):
        value = getattr(stats, name)
        assert value.isnan().tolist() == [False, True, False], name
        (gradient,) = gradients(value, [hidden])
        assert gradient.isnan().any(-1).tolist() == [False, True, False], name


# ---------------------------------------------------------------- what is computed, and kept


@quick
@pytest.mark.parametrize("trained", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)])
def test_gradient_only_where_required(implementation, trained):
    *inputs, actions = random_case()
    some = [x.clone().requires_grad_(bool(t)) for x, t in zip(inputs, trained, strict=True)]
    every = leaves(*inputs)
    stats, full = (
        stats_of(implementation, hidden, weight, actions, bias=bias)
        for hidden, weight, bias in (some, every)
    )
    assert stats.logps.requires_grad == any(trained)
    if any(trained):
        found, expected = gradients(unseen(stats), some), gradients(unseen(full), every)
        for x, y, train in zip(found, expected, trained, strict=True):
            assert (x is not None) == train
            if train:
                torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


def _saved_by(function):
    """Elements of every tensor that autograd keeps while `function` runs."""
    sizes = []
    with saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        result = function()
    return result, sizes


def test_few_numbers_are_kept_for_the_backward_pass():
    hidden, weight, bias, actions = random_case(T=50, H=6, V=200)
    hidden, weight, bias = leaves(hidden, weight, bias)

    def call():
        return stats_of("tiled", hidden, weight, actions, bias=bias)

    _, sizes = _saved_by(call)
    for owned in (hidden, weight, bias):
        sizes.remove(owned.numel())
    assert 0 < sum(sizes) <= 20 * len(actions)
    with torch.no_grad():
        stats, sizes = _saved_by(call)
    assert sizes == [] and not any(x.requires_grad for x in stats.as_dict().values())
    hidden, weight, bias = (x.detach() for x in (hidden, weight, bias))
    stats, sizes = _saved_by(call)
    assert sizes == [] and not any(x.requires_grad for x in stats.as_dict().values())


@quick
def test_autocast_has_no_effect(implementation):
    *inputs, actions = random_case(T=33, H=16, V=40, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        hidden, weight, bias = leaves(*inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            stats = stats_of(implementation, hidden, weight, actions, bias=bias)
        # autograd's own backward pass obeys autocast, which nobody should call it under
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and implementation != "naive"):
            results.append([*stats.as_dict().values(), *gradients(unseen(stats), [hidden, weight])])
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype and torch.equal(plain, cast)


@quick
def test_layout_does_not_matter_and_inputs_stay(implementation):
    *inputs, actions = random_case(H=6, dtype=torch.float32)
    spread = [torch.stack([x, x + 1], -1)[..., 0] for x in inputs]  # every second element
    flipped = [inputs[0].T.contiguous().T, inputs[1].T.contiguous().T, inputs[2]]
    every_other = torch.stack([actions, actions], -1)[..., 0]
    results = []
    for hidden, weight, bias in (inputs, spread, flipped):
        before = [x.clone() for x in (hidden, weight, bias)]
        hidden, weight, bias = (x.requires_grad_() for x in (hidden, weight, bias))
        stats = stats_of(implementation, hidden, weight, every_other, bias=bias)
        results.append(
            [*stats.as_dict().values(), *gradients(unseen(stats), [hidden, weight, bias])]
        )
        for x, y in zip((hidden, weight, bias), before, strict=True):
            assert torch.equal(x, y)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@quick_tiled
def test_backward_twice(implementation):
    *inputs, actions = random_case()
    hidden, weight, bias = leaves(*inputs)
    value = unseen(stats_of(implementation, hidden, weight, actions, bias=bias))
    first, second = (gradients(value, [hidden, weight, bias]) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
    separate = [gradients(value[rows], [weight])[0] for rows in (slice(0, 4), slice(4, None))]
    torch.testing.assert_close(separate[0] + separate[1], first[1], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- rows without a gradient


@quick_tiled
@pytest.mark.parametrize("which", TRAINED)
def test_rows_without_a_gradient(implementation, which):
    *inputs, actions = random_case(T=21)
    weights = TRAINED[which](21) * torch.rand(21, dtype=torch.float64)
    results = []
    for one in (implementation, "naive"):
        hidden, weight, bias = leaves(*inputs)
        stats = stats_of(one, hidden, weight, actions, 0.8, bias=bias)
        results.append(gradients(unseen(stats) * weights, [hidden, weight, bias]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert torch.equal(results[0][0][weights == 0], torch.zeros_like(inputs[0][weights == 0]))


def _backward_products(value, inputs):
    """Multiplications of a backward pass."""
    with ProductCounter() as counter:
        gradients(value, inputs)
    return counter.total


@pytest.mark.parametrize("trained, products", [((1, 1), 3), ((1, 0), 2), ((0, 1), 2)])
def test_backward_products_see_only_rows_with_a_gradient(trained, products):
    T, H, V = 200, 8, 60
    hidden, weight, _, actions = random_case(T=T, H=H, V=V, dtype=torch.float32)
    hidden, weight = (
        hidden.requires_grad_(bool(trained[0])),
        weight.requires_grad_(bool(trained[1])),
    )
    for n_trained in (0, 40, 200):
        upstream = (torch.arange(T) < n_trained).float()[torch.randperm(T)]
        value = unseen(stats_of("tiled", hidden, weight, actions, tiling=Tiling(16, 64))) * upstream
        assert _backward_products(value, [hidden, weight]) == products * n_trained * H * V


def test_greedy_tokens_of_the_max_target_kl_cost_nothing():
    T, H, V = 100, 8, 60
    hidden, weight, _, actions = random_case(T=T, H=H, V=V, dtype=torch.float32)
    actions = torch.where(torch.arange(T) < 80, (hidden @ weight.T).argmax(-1), actions)
    n_greedy = ((hidden @ weight.T).argmax(-1) == actions).sum()
    hidden, weight = leaves(hidden, weight)
    loss = RegisteredLoss("max_target_kl")
    losses, _ = loss(stats_of("tiled", hidden, weight, actions, wanted=loss.wanted), {})
    assert n_greedy >= 80
    assert _backward_products(losses, [hidden, weight]) == 3 * (T - n_greedy) * H * V


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("wanted", [("logps",), STATISTICS])
@pytest.mark.parametrize("implementation, fits", [("tiled", True), ("naive", False)])
def test_no_tensor_of_all_logits(implementation, fits, wanted, monkeypatch):
    monkeypatch.setattr(kernels, "_EAGER_BLOCK", 1000)  # what it needs does not grow with T
    T, H, V, columns, rows = 250, 4, 1500, 100, 50
    hidden, weight, bias, actions = random_case(T=T, H=H, V=V, dtype=torch.float32)
    hidden, weight, bias = leaves(hidden, weight, bias)
    with AllocationRecorder([hidden, weight, bias, actions]) as recorder:
        stats = stats_of(
            implementation, hidden, weight, actions, wanted=wanted, bias=bias,
            tiling=Tiling(columns, rows),
        )  # fmt: skip
        gradients(sum(x.sum() for x in stats.as_dict().values()), [hidden, weight, bias])
    tile, per_token, own = 4 * T * columns, 4 * T * 66, 4 * (T * H + V * H + V)
    assert (recorder.largest <= tile) == fits
    assert (recorder.peak <= own + tile + per_token) == fits


# ---------------------------------------------------------------- operands of other types


@quick_tiled
@pytest.mark.parametrize(
    "hidden_dtype, weight_dtype",
    [
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_operands_of_other_types(implementation, hidden_dtype, weight_dtype):
    """Gradients come back in the types of the inputs; those of 1e-7 do not vanish in fp16."""
    hidden, weight, _, actions = random_case(T=20, H=16, V=30)
    hidden, weight = leaves(hidden.to(hidden_dtype), weight.to(weight_dtype))
    found, expected = (
        gradients(
            stats_of(i, hidden, weight, actions, wanted=["logps", "entropy"]).logps * 1e-4,
            [hidden, weight],
        )
        for i in (implementation, "naive")
    )
    for a, b, inputs in zip(found, expected, (hidden, weight), strict=True):
        assert a.dtype == inputs.dtype
        assert (a != 0).any()
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * b.abs().max().item())
