"""`top_ids`, and `at_logps` of tokens that the caller names, in every implementation."""

import pytest
import torch

from RL2.ops.token_stats import linear_token_stats, token_stats
from tests.ops.token_stats.support import (
    ALL,
    NEG_INF,
    QUICK,
    AllocationRecorder,
    Tiling,
    as_linear,
    gradients,
    leaves,
    loss_of,
    random_case,
    some_tokens,
    stats_of,
    unseen,
)

every = pytest.mark.parametrize("implementation", ALL)
tiled = pytest.mark.parametrize("implementation", ALL[1:])
quick = pytest.mark.parametrize("implementation", QUICK)
CHUNKED = Tiling(columns=4, rows=3, kept=4, fewest=1)
WANTED = ("logps", "log1mps", "max_logps", "max_log1mps", "entropy", "ranks", "top_logps",
          "top_ids", "at_logps")  # fmt: skip


@every
def test_numbers_by_hand(implementation):
    """p = 1/2, 1/4, 1/8, 1/8; the last of the tokens asked for is none."""
    hidden, weight, _ = as_linear(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().double())
    (hidden,) = leaves(hidden)
    at = torch.tensor([[2, 0, 2, -1]])
    arguments = (hidden, weight, torch.tensor([1]), 1.0, ["at_logps", "top_ids"])
    stats = stats_of(implementation, *arguments, at=at, top_k=2)
    found = stats.at_logps.detach().exp()
    torch.testing.assert_close(found, torch.tensor([[0.125, 0.5, 0.125, 0.0]]).double())
    assert stats.top_ids.tolist() == [[0, 1]] and stats.top_ids.dtype == torch.int32
    # delta_2 - p + 2 (delta_0 - p) + 4 (delta_2 - p)
    (gradient,) = gradients(
        stats.at_logps[:, :3] @ torch.tensor([1.0, 2.0, 4.0]).double(), [hidden]
    )
    expected = torch.tensor([[2 - 3.5, -1.75, 5 - 0.875, -0.875]]).double()
    torch.testing.assert_close(gradient, expected)


@quick
def test_gradcheck(implementation):
    *inputs, actions = random_case(T=6, H=3, V=7)
    at = some_tokens(actions, 7)

    def present(hidden, weight, bias):
        arguments = (hidden, weight, actions, 1.3, ["at_logps"], bias)
        return stats_of(implementation, *arguments, at=at).at_logps[at >= 0]

    assert torch.autograd.gradcheck(present, leaves(*inputs), eps=1e-6, atol=1e-6, rtol=1e-6)


@tiled
@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_full_logits(implementation, in_forward, dtype):
    """Beside all other statistics, where few tokens have a gradient, over chunks and tiles."""
    *inputs, actions = random_case(T=33, dtype=dtype)
    weights = (torch.arange(33) % 3 > 0).to(torch.float64 if dtype == torch.float64 else None)

    def loss_fn(stats, rows):
        losses = unseen(stats).masked_fill(weights[rows] == 0, 0.0) * weights[rows]
        return losses.sum(), {"ids": stats.top_ids.sum().float()}

    results = []
    for name in (implementation, "naive"):
        hidden, weight, bias = leaves(*inputs)
        arguments = (hidden, weight, actions, 0.8, WANTED)
        options = {"at": some_tokens(actions, 11), "tiling": CHUNKED}
        if in_forward:
            loss, metrics = loss_of(name, *arguments, loss_fn, bias, **options)
        else:
            loss, metrics = loss_fn(stats_of(name, *arguments, bias, **options), slice(0, 33))
        results.append((loss.detach(), metrics, gradients(loss, [hidden, weight, bias])))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    atol = 2e-1 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(*results, rtol=tolerance, atol=atol)


@quick
def test_impossible_tokens_have_no_gradient(implementation):
    logits = torch.tensor(
        [[1.0, 2.0, 0.5, NEG_INF, NEG_INF], [0.0, 500.0, -400.0, NEG_INF, NEG_INF]]
    )
    hidden, weight, bias = as_linear(logits)
    (hidden,) = leaves(hidden)
    at = torch.tensor([[3, 1, -1], [4, 2, 0]])
    arguments = (hidden, weight, torch.tensor([0, 1]), 1.0, ["at_logps", "top_ids"], bias)
    stats = stats_of(implementation, *arguments, at=at, top_k=4)
    assert stats.at_logps.tolist()[0][::2] == [NEG_INF, NEG_INF]
    assert stats.at_logps.tolist()[1] == [NEG_INF, -900.0, -500.0]
    assert stats.top_ids[:, 3].tolist() == [-1, -1]
    (gradient,) = gradients(stats.at_logps.exp(), [hidden])
    p = logits[0].softmax(-1)
    expected = torch.stack([p[1] * (torch.eye(5)[1] - p), torch.zeros(5)])
    torch.testing.assert_close(gradient, expected)


def test_no_logits_are_kept():
    T, H, V = 64, 4, 2000
    *inputs, actions = random_case(T=T, H=H, V=V, dtype=torch.float32)
    hidden, weight, bias = leaves(*inputs)
    at = some_tokens(actions, V)
    with AllocationRecorder([hidden, weight, bias, actions, at]) as recorder:
        stats = stats_of(
            "tiled", hidden, weight, actions, 1.0, ["at_logps"], bias, at=at,
            tiling=Tiling(columns=50, rows=64),
        )  # fmt: skip
        stats.at_logps[:, :3].sum().backward()
    assert recorder.peak < 4 * (V * H + V + T * H) + 4 * T * V / 4


def test_tokens_are_needed():
    hidden, weight, _, actions = random_case()
    for at in (None, actions):
        with pytest.raises(ValueError, match=r"at_logps needs the tokens, \[13, K\]"):
            linear_token_stats(hidden, weight, actions, 1.0, ["at_logps"], at=at)
    with pytest.raises(ValueError, match="at_logps needs the tokens"):
        token_stats(hidden @ weight.T, actions, 1.0, ["at_logps"])
