import math

import pytest
import torch

from RL2.algorithms import TIS_TYPES, importance_weights

RATIOS = torch.tensor([0.1, 0.499, 0.501, 1.0, 1.999, 2.001, 50.0], dtype=torch.float64)


def weights(kind, bound=2.0, ratios=RATIOS):
    llm_logps = torch.full_like(ratios, -3.0)
    return importance_weights(llm_logps + ratios.log(), llm_logps, bound, kind)


def test_truncate_caps_the_ratio():
    torch.testing.assert_close(weights("truncate"), RATIOS.clamp(max=2.0))


def test_mask_leaves_out_what_lies_beyond_on_either_side():
    expected = torch.tensor([0.0, 0.0, 0.501, 1.0, 1.999, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(weights("mask"), expected)


@pytest.mark.parametrize("kind", TIS_TYPES)
def test_agreement_weighs_one_and_infinities_are_no_nan(kind):
    logps = torch.tensor([-1.0, -math.inf, 0.0], dtype=torch.float64)
    llm_logps = torch.tensor([-1.0, -1.0, -1e6], dtype=torch.float64)
    found = importance_weights(logps, llm_logps, 2.0, kind)
    assert found.tolist() == [1.0, 0.0, 2.0 if kind == "truncate" else 0.0]


@pytest.mark.parametrize("kind", TIS_TYPES)
def test_no_gradient_flows(kind):
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert not importance_weights(logps, logps.detach() - 0.1, 2.0, kind).requires_grad


def test_truncation_is_the_expectation_of_what_is_left():
    """Sampled by q, weighted to p: E_q[w f] = sum min(p, 2 q) f, or p f where within the band."""
    p = torch.tensor([0.7, 0.2, 0.08, 0.02], dtype=torch.float64)
    q = torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=torch.float64)
    f = torch.tensor([1.0, -2.0, 3.0, 5.0], dtype=torch.float64)
    for kind, kept in (
        ("truncate", torch.minimum(p, 2 * q)),
        ("mask", torch.where((p <= 2 * q) & (p >= q / 2), p, 0.0)),
    ):
        found = (q * importance_weights(p.log(), q.log(), 2.0, kind) * f).sum()
        torch.testing.assert_close(found, (kept * f).sum())
