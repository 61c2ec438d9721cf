import math

import pytest
import torch

from RL2.algorithms import TIS_TYPES, importance_weights
from RL2.algorithms.importance import sequence_weights

RATIOS = torch.tensor([0.1, 0.499, 0.501, 1.0, 1.999, 2.001, 50.0], dtype=torch.float64)


def weights(kind, bound=2.0, ratios=RATIOS):
    llm_logps = torch.full_like(ratios, -3.0)
    return importance_weights(llm_logps + ratios.log(), llm_logps, bound, kind)


def test_truncate_caps_the_ratio():
    torch.testing.assert_close(weights("truncate"), RATIOS.clamp(max=2.0))


def test_mask_leaves_out_what_lies_beyond_on_either_side():
    expected = torch.tensor([0.0, 0.0, 0.501, 1.0, 1.999, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(weights("mask"), expected)
    torch.testing.assert_close(weights("token_reject"), (expected > 0).double())


# Four samples, the first of two rows; ratios of their tokens.
OF_TOKENS = [[[1.6, 1.5], [1.0, 0.625]], [[4.0, 2.0]], [[0.4, 2.5]], [[0.2, 1.0]]]
PRODUCTS, MEANS = [1.5, 8.0, 1.0, 0.2], [1.5**0.25, 8**0.5, 1.0, 0.2**0.5]


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("sequence_truncate", [1.5, 2.0, 1.0, 0.2]),
        ("sequence_mask", [1.5, 0, 1.0, 0]),
        ("sequence_reject", [1, 0, 1, 0]),
        ("geometric_truncate", [MEANS[0], 2.0, 1.0, MEANS[3]]),
        ("geometric_mask", [MEANS[0], 0, 1.0, 0]),
        ("geometric_reject", [1, 0, 1, 0]),
        ("token_reject", [1, 0, 0, 0]),
    ],
)
def test_weights_of_whole_sequences(kind, expected):
    rows = torch.tensor([row for sample in OF_TOKENS for row in sample])
    rows = torch.nn.functional.pad(rows, (1, 1), value=50.0)  # tokens that are no actions
    mask = torch.zeros(rows.shape).bool()
    mask[:, 1:3] = True
    ids = torch.tensor([7, 7, 9, 3, 8])
    llm_logps = torch.full(rows.shape, -3.0)
    found = sequence_weights(llm_logps + rows.log(), llm_logps, mask, ids, 2.0, kind)
    first, *others = expected
    of_rows = torch.tensor([first, first, *others], dtype=torch.float32)
    torch.testing.assert_close(found, of_rows[:, None] * mask)
    # in any order of the rows
    order = torch.tensor([3, 0, 4, 2, 1])
    mixed = sequence_weights(
        (llm_logps + rows.log())[order], llm_logps, mask[order], ids[order], 2.0, kind
    )
    assert torch.equal(mixed, found[order])


@pytest.mark.parametrize("kind", [kind for kind in TIS_TYPES if TIS_TYPES[kind].level != "token"])
def test_long_sequences_overflow_to_the_bound(kind):
    ones, ids = torch.ones(2, 5), torch.tensor([0, 1])
    far = torch.tensor([[1e4], [-1e4]]) * ones
    mask = torch.ones(2, 5).bool()
    mask[1, 1:] = False
    found = sequence_weights(far, 0 * far, mask, ids, 2.0, kind)
    assert found[0].tolist() == 5 * [2.0 if kind.endswith("truncate") else 0.0]
    assert not found[1].any()
    without_actions = sequence_weights(far, 0 * far, ~mask, ids, 2.0, kind)
    assert not without_actions[0].any() and without_actions.isfinite().all()


@pytest.mark.parametrize("kind", TIS_TYPES)
def test_agreement_weighs_one_and_infinities_are_no_nan(kind):
    logps = torch.tensor([-1.0, -math.inf, 0.0], dtype=torch.float64)
    llm_logps = torch.tensor([-1.0, -1.0, -1e6], dtype=torch.float64)
    found = importance_weights(logps, llm_logps, 2.0, kind)
    assert found.tolist() == [1.0, 0.0, 2.0 if kind.endswith("truncate") else 0.0]


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
