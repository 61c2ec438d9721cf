"""`linear_token_loss`, with its gradients formed in the forward pass, against full logits."""

import pytest
import torch

from RL2.ops.token_stats import kernels, linear_token_loss
from tests.ops.token_stats.support import (
    ALL,
    OF_TOKENS,
    QUICK,
    TRAINED,
    AllocationRecorder,
    ProductCounter,
    RegisteredLoss,
    Tiling,
    batch_fields,
    gradients,
    leaves,
    loss_of,
    random_case,
    stats_of,
    unseen,
)

tiled = pytest.mark.parametrize("implementation", ALL[1:])
quick_tiled = pytest.mark.parametrize("implementation", QUICK[1:])
WANTED = ("entropy", "ranks", "logps", "log1mps", "top_logps", "max_log1mps", "max_logps")
# Chunks of a few tokens, of blocks of fewer, over several tiles.
CHUNKED = Tiling(columns=4, rows=3, kept=4, fewest=1)
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-1},  # elements of gradients of size 10, rounded
}


def results_of(implementation, inputs, actions, loss_fn, wanted=WANTED, factor=1.0, **options):
    """Loss, metrics and gradients of hidden, weight and bias of `factor * loss`."""
    inputs = [None if x is None else x.clone().requires_grad_(x.requires_grad) for x in inputs]
    hidden, weight, bias = inputs
    loss, metrics = loss_of(
        implementation, hidden, weight, actions, 0.8, wanted, loss_fn, bias, **options
    )
    assert loss.shape == () and not any(metric.requires_grad for metric in metrics.values())
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    assert loss.requires_grad == trains
    return loss.detach(), metrics, gradients(factor * loss, inputs) if trains else None


def weighted(weights):
    """A loss of the statistics with a weight for each token, and two metrics."""

    def loss_fn(stats, rows):
        losses = unseen(stats).masked_fill(weights[rows] == 0, 0.0) * weights[rows]
        metrics = {"ranks": stats.ranks.sum(), "entropy": (stats.entropy * weights[rows]).sum()}
        return losses.sum(), {name: metric.detach() for name, metric in metrics.items()}

    return loss_fn


def same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance, check_dtype=True)


@tiled
@pytest.mark.parametrize("which", TRAINED)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_loss_on_full_logits(implementation, which, dtype):
    T = 33
    hidden, weight, bias, actions = random_case(T=T, dtype=dtype)
    bias = bias.float() if dtype == torch.bfloat16 else bias
    weights = TRAINED[which](T) * torch.randn(T).to(torch.promote_types(dtype, torch.float32))
    for head_trains, one_bias, factor in (
        (True, bias, 1.0),
        (True, None, -3.0),
        (False, bias, 3.0),
    ):
        inputs = leaves(hidden, weight, one_bias)
        inputs[1].requires_grad_(head_trains)
        arguments = (inputs, actions, weighted(weights), WANTED, factor)
        found = results_of(implementation, *arguments, tiling=CHUNKED)
        same(found, results_of("naive", *arguments), **TOLERANCE[dtype])
        assert not found[2][0][weights == 0].any()


@quick_tiled
@pytest.mark.parametrize("detach_target", [False, True])
@pytest.mark.parametrize("name", OF_TOKENS)
def test_every_registered_loss(implementation, name, detach_target):
    *inputs, actions = random_case(T=21)
    loss = RegisteredLoss(name, detach_target=detach_target)
    hidden, weight, bias = inputs
    fields = batch_fields(stats_of("naive", hidden, weight, actions, 0.8, ["logps"], bias))

    def loss_fn(stats, rows):
        losses, metrics = loss(stats, fields, rows)
        weights = fields["advantages"][rows]
        return (losses * weights).sum(), {key: one.sum() for key, one in metrics.items()}

    found, expected = (
        results_of(
            one, leaves(*inputs), actions, loss_fn, loss.wanted, top_k=loss.top_k, tiling=CHUNKED
        )
        for one in (implementation, "naive")
    )
    same(found, expected, rtol=1e-12, atol=1e-12)


@quick_tiled
@pytest.mark.parametrize("T", [0, 1, 2])
@pytest.mark.parametrize("V", [1, 3, 11])
def test_few_tokens_and_columns(implementation, T, V):
    *inputs, actions = random_case(T=T, V=V)

    def loss_fn(stats, rows):
        losses = stats.logps - 2 * stats.max_logps + 0.5 * stats.entropy
        return losses.sum(), {"n": torch.tensor(float(len(losses)))}

    wanted = ("logps", "max_logps", "entropy")
    found, expected = (
        results_of(one, leaves(*inputs), actions, loss_fn, wanted, tiling=CHUNKED)
        for one in (implementation, "naive")
    )
    same(found, expected, rtol=1e-12, atol=1e-12)


@quick_tiled
@pytest.mark.parametrize("trains", [False, True])
def test_chunks_are_consecutive_slices_of_all_tokens(implementation, trains):
    """Also where few tokens get a gradient, and the others leave their place to the next chunk."""
    T = 40
    hidden, weight, bias, actions = random_case(T=T)
    weights = (torch.arange(T) % 7 == 0).double()
    loss_fn, chunks = weighted(weights), []

    def recording(stats, rows):
        chunks.append(rows)
        assert all(len(x) == rows.stop - rows.start for x in stats.as_dict().values())
        assert list(stats.as_dict()) and stats.logps.requires_grad == trains
        return loss_fn(stats, rows)

    hidden.requires_grad_(trains)
    results_of(implementation, (hidden, weight, bias), actions, recording, tiling=CHUNKED)
    assert [i for rows in chunks for i in range(T)[rows]] == list(range(T))
    if trains:
        assert len(chunks) > 2


@quick_tiled
def test_without_gradients(implementation):
    *inputs, actions = random_case()
    loss_fn = weighted(torch.ones(13, dtype=torch.float64))
    expected = results_of("naive", inputs, actions, loss_fn)
    same(results_of(implementation, inputs, actions, loss_fn, tiling=CHUNKED), expected)
    with torch.no_grad():
        found = results_of(implementation, leaves(*inputs), actions, loss_fn, tiling=CHUNKED)
    same(found, expected)


@quick_tiled
def test_a_loss_that_depends_on_no_parameter(implementation):
    """A micro-batch of filler, say: the graph is there, its gradients are zeros."""
    *inputs, actions = random_case()
    inputs = leaves(*inputs)

    def loss_fn(stats, rows):
        return stats.ranks.sum() * 0.0, {}

    _, _, found = results_of(implementation, inputs, actions, loss_fn)
    same(found, [torch.zeros_like(x) for x in inputs])


@quick_tiled
def test_autocast_has_no_effect(implementation):
    """On the products; the loss is the caller's and obeys it."""
    *inputs, actions = random_case(T=33, H=16, V=40, dtype=torch.float32)
    loss_fn = weighted(torch.ones(33))
    plain = results_of(implementation, leaves(*inputs), actions, loss_fn)
    with torch.autocast("cpu", torch.bfloat16):
        cast = results_of(implementation, leaves(*inputs), actions, loss_fn)
    same(cast, plain, rtol=0, atol=0)


@quick_tiled
def test_inside_a_larger_graph(implementation):
    """Gradients reach what hidden and weight were made of, and add up over two calls."""
    *inputs, actions = random_case(dtype=torch.float64)
    results = []
    for one in ("naive", implementation):
        inner, weight, bias = leaves(*inputs)
        total = 0.0
        for rows in (slice(0, 6), slice(6, 13)):
            loss_fn = weighted(torch.ones(rows.stop - rows.start, dtype=torch.float64))
            hidden = (2 * inner[rows]).tanh()
            loss, _ = loss_of(
                one, hidden, weight.sin(), actions[rows], 1.0, WANTED, loss_fn, bias, tiling=CHUNKED
            )
            total = total + loss
        (total + weight.square().sum()).backward()
        results.append([inner.grad, weight.grad, bias.grad])
    same(*results, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("head_trains", [True, False])
@pytest.mark.parametrize("n_trained", [0, 40, 200])
def test_products(head_trains, n_trained):
    """One for the logits of all tokens; for those with a gradient two more, hidden and weight."""
    T, H, V = 200, 8, 60
    *inputs, actions = random_case(T=T, H=H, V=V, dtype=torch.float32)
    hidden, weight, _ = leaves(*inputs)
    weight.requires_grad_(head_trains)
    trained = (torch.arange(T) < n_trained)[torch.randperm(T)].float()

    def loss_fn(stats, rows):
        return ((stats.logps + stats.entropy) * trained[rows]).sum(), {}

    with ProductCounter() as counter:
        loss, _ = loss_of(
            "tiled", hidden, weight, actions, 1.0, ("logps", "entropy"), loss_fn,
            tiling=Tiling(columns=16, rows=8, kept=10, fewest=1),
        )  # fmt: skip
        loss.backward()
    assert counter.total == (T + (1 + head_trains) * n_trained) * H * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype, monkeypatch):
    """Beyond the gradients: the logits of `[T, kept]`, a few numbers a token, and for
    half-precision operands one tile of the weight and its gradient in fp32."""
    monkeypatch.setattr(kernels, "_EAGER_BLOCK", 1000)
    T, H, V, kept, columns = 200, 4, 1500, 150, 100
    hidden, weight, bias, actions = random_case(T=T, H=H, V=V, dtype=dtype)
    hidden, weight, bias = leaves(hidden, weight, bias.float())

    def loss_fn(stats, rows):
        return (stats.logps + stats.entropy).sum(), {}

    with AllocationRecorder([hidden, weight, bias, actions]) as recorder:
        loss, _ = loss_of(
            "tiled", hidden, weight, actions, 1.0, ("logps", "entropy"), loss_fn, bias,
            tiling=Tiling(columns, 32, kept, 1),
        )  # fmt: skip
        loss.backward()
    size = 4 if dtype == torch.float32 else 2
    own = size * V * H + 4 * (T * H + V)
    assert recorder.peak <= own + 4 * (T * kept + T * 64)


def test_the_public_entry():
    *inputs, actions = random_case()
    loss_fn = weighted(torch.ones(13, dtype=torch.float64))
    results = []
    for name in ("naive", "auto", "tiled"):
        hidden, weight, bias = leaves(*inputs)
        arguments = (hidden, weight, actions, 0.8, WANTED, loss_fn, bias)
        loss, metrics = linear_token_loss(*arguments, top_k=3, implementation=name)
        results.append((loss.detach(), metrics, gradients(loss, [hidden, weight, bias])))
    for result in results[1:]:
        same(result, results[0], rtol=1e-12, atol=1e-12)


@quick_tiled
def test_a_metric_of_some_chunks_is_summed_over_them(implementation):
    """Also where the last chunk has none."""

    def loss_fn(stats, rows):
        n = len(stats.logps)
        some = {"early": stats.logps.new_full((), n)} if rows.start == 0 else {}
        return stats.logps.sum(), {"all": stats.logps.new_full((), n)} | some

    *inputs, actions = random_case(T=33)
    _, metrics, _ = results_of(
        implementation, leaves(*inputs), actions, loss_fn, ("logps",), tiling=CHUNKED
    )
    assert metrics["all"] == 33 and 0 < metrics["early"] < 33
