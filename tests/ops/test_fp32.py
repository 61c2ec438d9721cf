"""fp32 products are fp32 products, whoever computes them."""

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from RL2.ops.fp32 import accelerate_linears, fast_fp32, rounded, without_switching


def test_products_stay_exact_and_the_switch_goes_back():
    torch.manual_seed(0)
    a, b = torch.randn(300, 200), torch.randn(200, 100)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with fast_fp32(torch.device("cpu")):
        within = matmul.fp32_precision
        with fast_fp32(torch.device("cpu")):
            assert matmul.fp32_precision == within
        assert matmul.fp32_precision == within
        torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)
    assert matmul.fp32_precision == before


def test_other_devices_and_small_products_are_left_alone():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with fast_fp32(torch.device("cuda")):
        assert torch.backends.mkldnn.matmul.fp32_precision == before
    with fast_fp32(torch.device("cpu"), n_multiplications=1000):
        assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_nothing_is_switched_while_another_thread_may_compute():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with without_switching(), fast_fp32(torch.device("cpu")):
        assert torch.backends.mkldnn.matmul.fp32_precision == before


def linear_pair(bias: bool = True, dtype=torch.float32) -> tuple[nn.Module, nn.Module]:
    """The same layer in float64 as torch has it, and accelerated."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(37, 19, bias=bias, dtype=dtype))
    reference = copy.deepcopy(ours).double()
    accelerate_linears(ours)
    return reference, ours


def operators(function) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    return {event.name for event in seen.events()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 37), (1, 300, 37), (2, 3, 50, 37), (3, 37), (0, 37)])
def test_linear_layers_and_their_gradients_are_the_same(shape, bias):
    reference, ours = linear_pair(bias)
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().double().requires_grad_()
    out, expected = ours(x), reference(y)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    pairs = [(x, y), *zip(ours.parameters(), reference.parameters(), strict=True)]
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-4)


def test_few_sizes_reach_onednn_and_little_is_added():
    """It keeps code for each: 4 GB for the sizes up to 4,000 of one layer."""
    sizes = [rounded(n) for n in range(1, 10_000)]
    assert all(n <= size and size % 16 == 0 for n, size in enumerate(sizes, start=1))
    assert all(size <= 1.125 * n for n, size in enumerate(sizes, start=1) if n >= 128)
    assert len(set(sizes)) < 80
    assert all(rounded(size) == size for size in set(sizes))


def test_only_what_asks_for_a_gradient_gets_one():
    _, ours = linear_pair()
    ours[0].weight.requires_grad_(False)
    x = torch.randn(40, 37, requires_grad=True)
    ours(x).sum().backward()
    assert ours[0].weight.grad is None
    assert ours[0].bias.grad is not None and x.grad is not None
    assert not ours.requires_grad_(False)(x.detach()).requires_grad


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_onednn_multiplies_what_is_large_enough_and_fp32():
    _, ours = linear_pair()
    x = torch.randn(40, 37, requires_grad=True)
    assert "mkldnn::_linear_pointwise" in operators(lambda: ours(x))
    assert "mkldnn::_linear_pointwise" in operators(lambda: ours(x).sum().backward())
    with torch.no_grad():
        assert "mkldnn::_linear_pointwise" in operators(lambda: ours(x))
        assert "mkldnn::_linear_pointwise" not in operators(lambda: ours(x[:8]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    _, half = linear_pair(dtype=torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_names_and_hooks_stay_and_other_layers_too():
    class Other(nn.Linear):
        pass

    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "other": Other(4, 4)})
    calls = []
    model["plain"].register_forward_hook(lambda *_: calls.append(1))
    names = list(model.state_dict())
    accelerate_linears(model)
    assert list(model.state_dict()) == names
    assert isinstance(model["plain"], nn.Linear) and type(model["other"]) is Other
    model["plain"](torch.ones(20, 4))
    assert calls == [1]
