"""Products by oneDNN where it is faster, and nothing else of the process is switched."""

import pytest
import torch

from RL2.ops import fp32
from RL2.ops.token_stats import linear_token_loss, linear_token_stats
from RL2.ops.token_stats.products import add_product, product_into

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"
)


@pytest.mark.parametrize("n_rows", [1, 2, 300])
@pytest.mark.parametrize("n_columns", [1, 200])
def test_products_with_and_without_onednn(n_rows, n_columns):
    torch.manual_seed(0)
    a, b = torch.randn(n_rows, 128), torch.randn(n_columns, 128).T
    start = torch.randn(n_rows, n_columns)
    expected = a.double() @ b.double()
    for onednn in (False, True):
        out, total = torch.full_like(start, float("nan")), start.clone()
        product_into(out, a, b, onednn)
        add_product(total, a, b, onednn)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(total.double(), start + expected, rtol=1e-5, atol=1e-4)


def test_a_row_that_is_alone_is_rounded_as_among_others():
    torch.manual_seed(0)
    a, b = torch.randn(5, 256), torch.randn(1000, 256).T
    all_of_them, alone = torch.empty(5, 1000), torch.empty(1, 1000)
    product_into(all_of_them, a, b, onednn=True)
    product_into(alone, a[2:3], b, onednn=True)
    assert torch.equal(alone[0], all_of_them[2])


def operators_of(call, n_tokens: int = 40) -> set[str]:
    """The operators that `call(hidden, weight, actions)` and its gradients need."""
    torch.manual_seed(0)
    hidden = torch.randn(n_tokens, 64, requires_grad=True)
    weight = torch.randn(300, 64, requires_grad=True)
    actions = torch.randint(300, (n_tokens,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call(hidden, weight, actions).backward()
    return {event.name for event in seen.events()}


@pytest.mark.parametrize("in_forward", [True, False])
def test_a_large_head_multiplies_by_onednn_and_switches_nothing(monkeypatch, in_forward):
    """torch's switch would be the whole process's: an engine that generates in another thread would
    compute other last bits."""
    before, switches = torch.backends.mkldnn.matmul.fp32_precision, set()

    def loss(stats, rows):
        switches.add(torch.backends.mkldnn.matmul.fp32_precision)
        return -stats.logps.sum(), {}

    def head(*tensors):
        if in_forward:
            return linear_token_loss(*tensors, 1.0, ("logps",), loss)[0]
        return loss(linear_token_stats(*tensors, 1.0, ("logps",)), slice(None))[0]

    assert "mkldnn::_linear_pointwise" not in operators_of(head) and switches == {before}
    monkeypatch.setattr(fp32, "_MANY", 0)
    names = operators_of(head)
    assert "mkldnn::_linear_pointwise" in names and switches == {before}
    assert not names & {"aten::mm", "aten::addmm", "aten::addmm_"}
