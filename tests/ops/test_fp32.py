"""fp32 products are fp32 products, whoever computes them."""

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from RL2.ops.fp32 import accelerate_linears, multiplies, product, rounded, worthwhile


@pytest.mark.parametrize("shape", [(300, 1300, 200), (1, 64, 200), (300, 64, 1), (2, 1, 3)])
def test_products_are_products(shape):
    n, inner, m = shape
    torch.manual_seed(0)
    a, b = torch.randn(n, inner), torch.randn(m, inner).T
    expected = a.double() @ b.double()
    torch.testing.assert_close(product(a, b).double(), expected, rtol=1e-5, atol=1e-4)
    transposed = a.T.contiguous().T
    torch.testing.assert_close(product(transposed, b).double(), expected, rtol=1e-5, atol=1e-4)


def test_what_is_left_to_torch():
    cpu, a, b = torch.device("cpu"), torch.ones(20, 20), torch.ones(20, 20)
    assert worthwhile(cpu, 2**26) == torch.backends.mkldnn.is_available()
    assert not worthwhile(cpu, 2**26 - 1)
    assert not worthwhile(torch.device("cuda"), 2**30)
    assert multiplies(a, b, a)
    assert not multiplies(a[:1], b, a)
    assert not multiplies(a.double(), b.double(), a.double())
    assert not multiplies(a.bfloat16(), b.bfloat16(), a)


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
    plain = model["plain"]
    plain.register_forward_hook(lambda *_: calls.append(1))
    names = list(model.state_dict())
    accelerate_linears(model)
    assert list(model.state_dict()) == names
    assert isinstance(model["plain"], nn.Linear) and type(model["other"]) is Other
    assert type(plain) is nn.Linear and model["plain"].weight is plain.weight
    model["plain"](torch.ones(20, 4))
    assert calls == [1]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_a_layer_that_stands_in_two_places_stays_one():
    shared = nn.Linear(4, 4)
    model = nn.ModuleList([shared, nn.Sequential(shared)])
    accelerate_linears(model)
    assert model[0] is model[1][0] is not shared
