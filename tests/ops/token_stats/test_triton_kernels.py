"""The Triton kernels against their definitions in float64.

On CUDA the tests run in this process. Without, they run under Triton's interpreter, in a process of
their own: TRITON_INTERPRET has to be set before triton is first imported, which torch may have
done, and would hold for everything else here. Another one compiles for a GPU that need not be
there (`compile_for_sm90`).
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from RL2.ops.token_stats import linear_token_stats

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parents[3]
NEG_INF = float("-inf")
TOP, INDEX, SECOND, MASS, MOMENT, CHOSEN = range(6)
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # no bf16 products in the interpreter


@pytest.fixture(
    params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (test_everything_under_the_interpreter does without)")
    return torch.device(request.param)


@pytest.fixture
def kernels(device):
    from RL2.ops.token_stats.linear import IMPLEMENTATIONS

    return IMPLEMENTATIONS["triton_fused"]()


@pytest.fixture
def small_blocks(device, monkeypatch):
    """So that a tile of 53 columns has four."""
    from RL2.ops.token_stats import triton_kernels

    monkeypatch.setattr(triton_kernels, "BLOCK", 16)


def run(*command, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment |= {"PYTHONPATH": path, **variables}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_everything_under_the_interpreter():
    # Without conftest.py, whose models the kernels do not need.
    options = ("-q", "--noconftest", "-p", "no:cacheprovider", "-m", "not gpu")
    result = run("-m", "pytest", *options, __file__, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 80


# The state of a tile


def exact_state(z, actions, entropy=True):
    """The six definitions in float64 over `z [R, V]` (see RL2/ops/token_stats/state.py)."""
    columns = []
    for row, action in zip(z.double().cpu(), actions.tolist(), strict=True):
        top = row.max()
        index = row.tolist().index(top) if top > NEG_INF else -1
        others = torch.cat([row[: max(index, 0)], row[index + 1 :]])
        second = others.max() if len(others) else torch.tensor(NEG_INF).double()
        gaps = others[others > NEG_INF] - second
        mass, moment = gaps.exp().sum(), (gaps.exp() * gaps).sum() * entropy
        chosen = row[action] if 0 <= action < len(row) else torch.tensor(NEG_INF).double()
        columns.append(torch.stack([top, top.new_tensor(index), second, mass, moment, chosen]))
    return torch.stack(columns, -1) if columns else torch.empty(6, 0).double()


def assert_same_state(actual, expected):
    expected = expected.to(actual.device)
    for row in (TOP, INDEX, SECOND, CHOSEN):
        assert torch.equal(actual[row].double(), expected[row]), row
    tolerance = 1e-12 if actual.dtype == torch.float64 else 5e-6
    torch.testing.assert_close(
        actual[MASS : MOMENT + 1].double(),
        expected[MASS : MOMENT + 1],
        rtol=tolerance,
        atol=tolerance,
    )


def empty_state(n_rows, dtype=torch.float32, device="cpu"):
    empty = torch.tensor([NEG_INF, -1, NEG_INF, 0, 0, NEG_INF], dtype=dtype, device=device)
    return empty[:, None].repeat(1, n_rows)


def swept(kernels, logits, actions, scale=1.0, tiles=(), entropy=True):
    """The state after tiles that end at `tiles` and at the last column."""
    state = empty_state(len(logits), logits.dtype, logits.device)
    start = 0
    for stop in (*tiles, logits.shape[1]):
        kernels.update_state(state, logits[:, start:stop], actions, start, scale, entropy)
        start = stop
    return state


def peaked(logits, gap):
    """One column of every row `gap` above all others, at another place in each."""
    logits = logits.clone()
    rows = torch.arange(len(logits))
    logits[rows, rows * 5 % logits.shape[1]] = logits.amax(-1) + gap
    return logits


def with_holes(logits):
    """Every third column is -inf, but for column 0."""
    columns = torch.arange(logits.shape[1])
    return logits.masked_fill((columns % 3 == 0) & (columns > 0), NEG_INF)


KINDS = {
    "random": lambda logits: logits,
    "gap 15": lambda logits: peaked(logits, 15.0),
    "gap 100": lambda logits: peaked(logits, 100.0),
    "gap 1000": lambda logits: peaked(logits, 1000.0),
    "all negative": lambda logits: logits - 300.0,
    "wide": lambda logits: logits * 200,
    "ties": lambda logits: logits.round(),
    "all equal": lambda logits: torch.full_like(logits, -2.5),
    "-inf columns": with_holes,
    "rising": lambda logits: logits.sort(-1).values,
    "falling": lambda logits: logits.sort(-1, descending=True).values,
}


def make_case(kind, n_rows, n, dtype, device, seed=0):
    """Logits, and actions of which every third is the maximum."""
    generator = torch.Generator().manual_seed(seed)
    logits = KINDS[kind](torch.randn(n_rows, n, generator=generator, dtype=torch.float64) * 3)
    logits = logits.to(dtype)
    actions = torch.randint(n, (n_rows,), generator=generator)
    actions[::3] = logits[::3].argmax(-1)
    return logits.to(device), actions.to(device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.5, 10.0])
def test_state(kernels, device, small_blocks, kind, scale):
    logits, actions = make_case(kind, 5, 53, torch.float32, device)
    before = logits.clone()
    expected = exact_state(logits * scale, actions)
    for tiles in ((), (1, 2, 19, 40)):
        assert_same_state(swept(kernels, logits, actions, scale, tiles), expected)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("kind", ["random", "gap 1000", "-inf columns"])
def test_state_in_float64(kernels, device, small_blocks, kind):
    logits, actions = make_case(kind, 4, 37, torch.float64, device)
    state = swept(kernels, logits, actions, 1 / 0.7, (5, 30))
    assert_same_state(state, exact_state(logits * (1 / 0.7), actions))


@pytest.mark.parametrize("n_rows", [0, 1, 7])
@pytest.mark.parametrize("n", [1, 2, 16, 17, 2049])
def test_odd_shapes(kernels, device, n_rows, n):
    logits, actions = make_case("random", n_rows, n, torch.float32, device)
    assert_same_state(swept(kernels, logits, actions), exact_state(logits, actions))


def test_an_empty_tile_changes_nothing(kernels, device):
    logits, actions = make_case("random", 3, 9, torch.float32, device)
    state = swept(kernels, logits, actions)
    before = state.clone()
    kernels.update_state(state, logits[:, :0], actions, 9, 1.0, True)
    assert torch.equal(state, before)


def test_without_entropy_the_moment_stays_zero(kernels, device, small_blocks):
    logits, actions = make_case("random", 4, 53, torch.float32, device)
    state = swept(kernels, logits, actions, tiles=(20,), entropy=False)
    assert_same_state(state, exact_state(logits, actions, entropy=False))


@pytest.mark.parametrize("tiles", [(), (8,), (20,), (3, 20, 30)])
def test_the_lowest_of_equal_maxima_is_the_index(kernels, device, small_blocks, tiles):
    logits = torch.full((4, 40), -1.0)
    for row, columns in enumerate([(3, 5), (2, 18), (15, 16), (19, 20, 39)]):
        logits[row, list(columns)] = 4.0
    actions = torch.tensor([5, 2, 16, 39])
    state = swept(kernels, logits.to(device), actions.to(device), tiles=tiles)
    assert state[INDEX].tolist() == [3, 2, 15, 19]
    assert state[SECOND].tolist() == state[CHOSEN].tolist() == [4.0] * 4
    assert_same_state(state, exact_state(logits, actions))


def test_tiles_of_nothing_but_minus_infinity(kernels, device, small_blocks):
    logits = torch.full((5, 60), NEG_INF)
    logits[1, 45] = 2.0  # the only possible token, in the last tile
    logits[2, 0] = -7.0  # in the first
    logits[3, [25, 26]] = torch.tensor([-1000.0, 3.0])  # two in the middle one
    logits[4, [1, 59]] = torch.tensor([-5.0, -5.0])
    actions = torch.tensor([3, 45, 1, 26, 59])
    state = swept(kernels, logits.to(device), actions.to(device), tiles=(20, 40))
    assert_same_state(state, exact_state(logits, actions))
    assert torch.equal(state[:, :1].cpu(), empty_state(1))


def test_columns_count_over_the_whole_vocabulary(kernels, device):
    logits, _ = make_case("random", 6, 53, torch.float32, device)
    start = 150_001
    actions = start + torch.tensor([-1, 0, 17, 52, 53, -start], device=device)
    state = empty_state(6, device=device)
    kernels.update_state(state, logits, actions, start, 1.0, True)
    expected = exact_state(logits, actions - start)
    expected[INDEX] += start
    assert_same_state(state, expected)
    assert (state[CHOSEN] > NEG_INF).tolist() == [False, True, True, True, False, False]


def test_strided_tiles_and_states(kernels, device, small_blocks):
    wide, actions = make_case("random", 6, 80, torch.float32, device)
    logits = wide[::2, 11:64]
    store = torch.full((5, 6, 2), 77.0, device=device)
    state = store[1:4, :, 0].T  # strides 2 and 12
    state.copy_(empty_state(3))
    kernels.update_state(state, logits, actions[::2] - 11, 0, 1.0, True)
    assert_same_state(state, exact_state(logits, actions[::2] - 11))
    assert store[:, :, 1].eq(77).all() and store[[0, 4]].eq(77).all()


@pytest.mark.parametrize("tiles", [(), (20, 40)])
@pytest.mark.parametrize("kind", ["random", "rising"])
def test_nan_shows_in_the_mass(kernels, device, small_blocks, kind, tiles):
    logits, actions = make_case(kind, 6, 53, torch.float32, device)
    columns = [0, 15, 16, 20, 31, 52]
    logits[torch.arange(6), columns] = float("nan")
    assert swept(kernels, logits, actions, tiles=tiles)[MASS].isnan().all()
    logits = logits.where(logits.isnan(), NEG_INF)
    assert swept(kernels, logits, actions, tiles=tiles)[MASS].isnan().all()


# The gradient of the logits


def exact_gradients(z, coefficients, actions, start, entropy=True):
    top, index, rest, slope_0, slope_1, at_top, at_chosen = coefficients.double().unsqueeze(-1)
    z = z.double()
    columns = torch.arange(start, start + z.shape[1], device=z.device)
    slopes = slope_0 + (slope_1 * (z - top) if entropy else 0)
    gradients = torch.where(z > NEG_INF, (z - rest).exp() * slopes, 0)
    gradients += torch.where(columns == actions.unsqueeze(-1), at_chosen, 0)
    return torch.where(columns == index, at_top, gradients)


def make_coefficients(z, actions, dtype, start=0):
    """What a state gives, with arbitrary slopes."""
    state = exact_state(z, actions - start)
    generator = torch.Generator().manual_seed(1)
    slopes = torch.randn(4, z.shape[0], generator=generator, dtype=torch.float64)
    index = state[INDEX] + start
    slopes[3] *= actions.cpu() != index
    rest = torch.where(state[MASS] > 0, state[SECOND] + state[MASS].log(), float("inf"))
    top = torch.stack([state[TOP], index, rest])
    return torch.cat([top, slopes]).to(device=z.device, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale, entropy", [(1.0, True), (10.0, True), (0.7, False)])
def test_gradients(kernels, device, small_blocks, kind, scale, entropy):
    start = 700
    logits, actions = make_case(kind, 6, 53, torch.float32, device)
    actions += start
    z = logits * scale
    coefficients = make_coefficients(z, actions, torch.float32, start)
    actions[1], actions[4] = start - 1, start + 53  # in other tiles
    expected = exact_gradients(z, coefficients, actions, start, entropy)

    before = logits.clone()
    halves = {dtype: logits.new_full((6, 60), 77, dtype=dtype) for dtype in (HALF, torch.float16)}
    for out in halves.values():
        kernels.logit_gradients(out[:, 2:55], logits, coefficients, actions, start, scale, entropy)
    assert torch.equal(logits, before)
    kernels.logit_gradients(logits, logits, coefficients, actions, start, scale, entropy)
    # exp of a rounded argument: its error grows with the distance to the largest term
    largest = expected.abs().amax(-1, keepdim=True)
    assert ((logits - expected).abs() <= 1e-5 * expected.abs() + 1e-6 * largest).all()
    for dtype, out in halves.items():
        assert torch.equal(out[:, 2:55], logits.to(dtype))
        assert out[:, :2].eq(77).all() and out[:, 55:].eq(77).all()


def test_bfloat16_gradients(kernels, device):
    logits, actions = make_case("random", 3, 53, torch.float32, device)
    coefficients = make_coefficients(logits, actions, torch.float32)
    out = torch.empty(3, 53, dtype=torch.bfloat16, device=device)
    kernels.logit_gradients(out, logits, coefficients, actions, 0, 1.0, True)
    kernels.logit_gradients(logits, logits, coefficients, actions, 0, 1.0, True)
    # The interpreter cuts off what a GPU rounds.
    torch.testing.assert_close(out.float(), logits, rtol=2**-7 if INTERPRETED else 2**-8, atol=0)


def test_gradients_where_one_token_is_possible(kernels, device):
    logits = torch.full((2, 21), NEG_INF, device=device)
    logits[0, 4], logits[1, 20] = 3.0, -50.0
    actions = torch.tensor([4, 5], device=device)
    coefficients = make_coefficients(logits, actions, torch.float32)
    assert coefficients[2].isinf().all()
    expected = exact_gradients(logits, coefficients, actions, 0)
    kernels.logit_gradients(logits, logits, coefficients, actions, 0, 1.0, True)
    torch.testing.assert_close(logits.double(), expected)
    assert logits.count_nonzero().item() == 3  # two maxima and one action


@pytest.mark.parametrize("n_rows", [0, 1, 3])
@pytest.mark.parametrize("n", [0, 1, 2049])
def test_gradients_of_odd_shapes(kernels, device, n_rows, n):
    logits, actions = make_case("random", n_rows, max(n, 1), torch.float64, device)
    coefficients = make_coefficients(logits, actions, torch.float64)
    logits = logits[:, :n]
    expected = exact_gradients(logits * 0.3, coefficients, actions, 0)
    kernels.logit_gradients(logits, logits, coefficients, actions, 0, 0.3, True)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_log_probability_and_entropy(kernels, device, small_blocks):
    """With the coefficients of logps + 0.1 entropy the gradient is autograd's."""
    temperature = 0.7
    logits, actions = make_case("random", 6, 53, torch.float64, device)
    state = swept(kernels, logits, actions, 1 / temperature, (16, 30))
    top, index, second, mass, moment, _ = state
    rest = second + mass.log()
    odds = (rest - top).exp()
    p_top, p_rest = 1 / (1 + odds), odds / (1 + odds)
    # S = lse - sum over j of p_j z_j
    entropy = odds.log1p() - p_rest * ((moment / mass) + second - top)
    slope_1 = -0.1 * p_rest
    slope_0 = -p_rest - 0.1 * p_rest * (entropy - odds.log1p())
    greedy = actions == index
    at_top = greedy.double() - p_top - 0.1 * p_top * (entropy - odds.log1p())
    linear = torch.stack([slope_0, slope_1, at_top, (~greedy).double()]) / temperature
    coefficients = torch.cat([torch.stack([top, index, rest]), linear])

    leaf = logits.clone().requires_grad_()
    logp = (leaf / temperature).log_softmax(-1)
    loss = logp.gather(-1, actions[:, None]).sum() - 0.1 * (logp.exp() * logp).sum()
    (expected,) = torch.autograd.grad(loss, leaf)
    out = torch.empty_like(logits)
    for tile in (slice(0, 16), slice(16, 53)):
        kernels.logit_gradients(
            out[:, tile], logits[:, tile], coefficients, actions, tile.start, 1 / temperature, True
        )
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device, kernels):
    if device.type != "cuda":
        pytest.skip("9 GB")
    stride = 2**31 + 16
    store = torch.empty(stride + 64, device=device)
    logits = store.as_strided((2, 53), (stride, 1))
    source, actions = make_case("random", 2, 53, torch.float32, device)
    logits.copy_(source)
    assert_same_state(swept(kernels, logits, actions), exact_state(source, actions))
    coefficients = make_coefficients(source, actions, torch.float32)
    expected = exact_gradients(source, coefficients, actions, 0)
    kernels.logit_gradients(logits, logits, coefficients, actions, 0, 1.0, True)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_last_dimension_must_be_contiguous(kernels, device):
    logits, actions = make_case("random", 4, 6, torch.float32, device)
    with pytest.raises(ValueError, match="logits: the last dimension"):
        kernels.update_state(empty_state(3), logits[:, ::2], actions, 0, 1.0, True)
    with pytest.raises(ValueError, match="out: the last dimension"):
        kernels.logit_gradients(
            logits[:, ::2], logits[:, :3], torch.zeros(7, 4), actions, 0, 1.0, True
        )
    with pytest.raises(ValueError, match="weight: the last dimension"):
        kernels.fused_state(logits, logits.new_empty(6, 6).T, None, actions, 0, 1.0, True)


# The fused forward pass


def make_head(n_tokens, n_hidden, n_columns, dtype, device, whole=False):
    """Of small whole numbers, products and sums are exact and maxima tie."""
    generator = torch.Generator().manual_seed(n_tokens + n_columns)

    def draw(*shape):
        numbers = torch.randn(*shape, generator=generator)
        return (numbers.round() if whole else numbers).to(device=device, dtype=dtype)

    actions = torch.randint(n_columns, (n_tokens,), generator=generator).to(device)
    return draw(n_tokens, n_hidden), draw(n_columns, n_hidden), draw(n_columns), actions


def exact_logits(hidden, weight, bias):
    logits = hidden.double() @ weight.double().T
    return logits if bias is None else logits + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    "n_tokens, n_hidden, n_columns",
    [(1, 1, 1), (3, 37, 255), (5, 65, 1003), (130, 16, 259)],
)
def test_fused_state_of_whole_numbers(kernels, device, dtype, n_tokens, n_hidden, n_columns):
    head = make_head(n_tokens, n_hidden, n_columns, dtype, device, whole=True)
    hidden, weight, bias, actions = head
    for scale, entropy, b in ((0.5, True, bias), (2.0, False, None)):
        z = exact_logits(hidden, weight, b) * scale
        actions[::3] = z[::3].argmax(-1)
        state = kernels.fused_state(hidden, weight, b, actions, 0, scale, entropy)
        assert state.dtype == torch.float32
        assert_same_state(state, exact_state(z, actions, entropy))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_fused_state_is_as_accurate_as_fp32_products(kernels, device, dtype):
    hidden, weight, bias, actions = make_head(7, 67, 777, dtype, device)
    z = exact_logits(hidden, weight, bias) / 0.7
    actions[:3] = z[:3].argmax(-1)
    state = kernels.fused_state(hidden, weight, bias, actions, 0, 1 / 0.7, True)
    expected = exact_state(z, actions).to(device)
    assert torch.equal(state[INDEX].double(), expected[INDEX])
    torch.testing.assert_close(state.double(), expected, rtol=2e-5, atol=2e-5)
    assert torch.equal(state[CHOSEN][:3], state[TOP][:3])


def test_fused_state_of_a_shard_with_padded_columns(kernels, device):
    hidden, weight, bias, actions = make_head(5, 16, 700, torch.float32, device, whole=True)
    bias[256:520] = NEG_INF  # a whole split and more
    bias[699] = NEG_INF
    actions += torch.tensor([0, 0, -700, 700, 0], device=device)
    state = kernels.fused_state(hidden, weight, bias, actions + 300, 300, 1.0, True)
    expected = exact_state(exact_logits(hidden, weight, bias), actions)
    expected[INDEX] += 300
    assert_same_state(state, expected)


def test_fused_states_of_two_shards_merge(kernels, device):
    from RL2.ops.token_stats.state import merge

    hidden, weight, bias, actions = make_head(5, 16, 300, torch.float32, device, whole=True)
    low = kernels.fused_state(hidden, weight[:123], bias[:123], actions, 0, 1.0, True)
    high = kernels.fused_state(hidden, weight[123:], bias[123:], actions, 123, 1.0, True)
    expected = exact_state(exact_logits(hidden, weight, bias), actions)
    assert_same_state(merge(low, high), expected)


def test_the_op_with_a_fused_forward(kernels, device):
    """`triton_fused`: the forward sweep makes no tile, the backward pass makes them again."""
    n_tokens, n_hidden, n_columns = 37, 32, 201
    hidden, weight = (
        torch.randn(n, n_hidden, device=device, generator=torch.Generator(device).manual_seed(n))
        .to(HALF)
        .requires_grad_()
        for n in (n_tokens, n_columns)
    )
    actions = torch.arange(n_tokens, device=device)
    wanted = ["logps", "log1mps", "max_logps", "max_log1mps", "entropy"]
    found, expected = (
        linear_token_stats(hidden, weight, actions, 0.8, wanted, implementation=how).as_dict()
        for how in ("triton_fused", "naive")
    )
    for name in wanted:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
        for inputs in (hidden, weight):
            a, b = (
                torch.autograd.grad(values[name].sum(), inputs, retain_graph=True)[0].float()
                for values in (found, expected)
            )
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item(), msg=name)


def test_fused_state_takes_rows_apart(kernels, device):
    hidden, weight, _, actions = make_head(6, 24, 300, torch.float32, device, whole=True)
    hidden, weight = hidden[::2, 1:20], weight[:, 3:22]
    state = kernels.fused_state(hidden, weight, None, actions[::2], 0, 1.0, True)
    assert_same_state(state, exact_state(exact_logits(hidden, weight, None), actions[::2]))


def test_fused_state_of_nothing(kernels, device):
    hidden, weight, bias, actions = make_head(3, 8, 9, torch.float32, device)
    state = kernels.fused_state(hidden[:0], weight, bias, actions[:0], 0, 1.0, True)
    assert state.shape == (6, 0)
    state = kernels.fused_state(hidden, weight[:0], None, actions, 0, 1.0, True)
    assert torch.equal(state.cpu(), empty_state(3))


def test_nan_shows_in_the_mass_of_the_fused_state(kernels, device):
    hidden, weight, bias, actions = make_head(4, 8, 600, torch.float32, device)
    hidden[2] = float("nan")
    mass = kernels.fused_state(hidden, weight, bias, actions, 0, 1.0, True)[MASS]
    assert mass.isnan().tolist() == [False, False, True, False]
    for column in (0, 255, 256, 599):
        bad = bias.clone()
        bad[column] = float("nan")
        assert kernels.fused_state(hidden, weight, bad, actions, 0, 1.0, True)[MASS].isnan().all()


def test_fused_state_refuses_what_it_cannot_multiply(kernels, device):
    hidden, weight, _, actions = make_head(3, 8, 9, torch.float32, device)
    with pytest.raises(ValueError, match="hidden torch.float64"):
        kernels.fused_state(hidden.double(), weight.double(), None, actions, 0, 1.0, True)
    with pytest.raises(ValueError, match="weight torch.float16"):
        kernels.fused_state(hidden, weight.half(), None, actions, 0, 1.0, True)


@pytest.mark.gpu
def test_the_vocabulary_of_qwen3(device, kernels):
    if device.type != "cuda":
        pytest.skip("too slow")
    hidden, weight, _, actions = make_head(256, 2560, 151_936, torch.bfloat16, device)
    hidden /= 2560**0.5 / 4
    z = exact_logits(hidden, weight, None)
    actions[::2] = z[::2].argmax(-1)
    expected = exact_state(z, actions).to(device)
    state = kernels.fused_state(hidden, weight, None, actions, 0, 1.0, True)
    torch.testing.assert_close(state.double(), expected, rtol=1e-4, atol=1e-4)
    logits = z.float()
    assert_same_state(
        swept(kernels, logits, actions, tiles=(8192, 65536)), exact_state(logits, actions)
    )


# Ahead of time


def compile_for_sm90():
    """Every kernel as the wrappers launch it, for a device that need not be there.

    Prints one line of JSON for each: see `describe`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    from RL2.ops.token_stats.linear import IMPLEMENTATIONS

    kernels = IMPLEMENTATIONS["triton_fused"]()

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        get_current_stream = staticmethod(lambda device: 0)

    run, compiled = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    # Every configuration, where `run` would time them.
    Autotuner.run = lambda self, *args, warmup, **kwargs: self.warmup(*args, **kwargs)

    def report(label):
        for kernel in compiled:
            print(json.dumps({"label": label, **describe(kernel)}), flush=True)
        compiled.clear()

    for dtype, n in ((torch.float32, 4096), (torch.float32, 1003), (torch.float64, 4096)):
        logits, actions = make_case("random", 2, n, dtype, "cpu")
        out = logits.to(torch.bfloat16) if dtype == torch.float32 else logits
        coefficients = torch.zeros(7, 2, dtype=dtype)
        for entropy in (True, False):
            state = empty_state(2, dtype)
            kernels.update_state(state, logits, actions, 0, 0.5, entropy)
            kernels.logit_gradients(out, logits, coefficients, actions, 0, 0.5, entropy)
            report(f"{dtype}, n={n}, entropy={entropy}")
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight, bias, actions = make_head(3, 64, 2048, dtype, "cpu")
        kernels.fused_state(hidden, weight, bias, actions, 0, 0.5, True)
        report(f"{dtype}")


def describe(kernel):
    """Registers and bytes of stack (spills) a thread; a * b + c in one rounding; tensor cores."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = (triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = kernel.asm["ptx"]
    return {
        "kernel": kernel.name,
        "warps": kernel.metadata.num_warps,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
        "fma": len(re.findall(r"\bfma\.\S*f32", ptx)),
        "wgmma": ptx.count("wgmma.mma_async"),
        "target": re.search(r"\.target (\S+)", ptx)[1],
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="compiles in another process")
def test_compiles_for_sm90(tmp_path):
    result = run(__file__, TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert Counter(report["kernel"] for report in reports) == {
        "_update_state_kernel": 6,
        "_logit_gradients_kernel": 6,
        "_fused_state_kernel": 5,
        "_merge_splits_kernel": 2,
    }
    for report in reports:
        assert report["target"] == "sm_90a" and report["stack"] == 0, report
        is_product = report["kernel"] == "_fused_state_kernel"
        assert (report["wgmma"] > 0) == (is_product and "bfloat16" in report["label"]), report
        # z * scale - second in one rounding would make equal logits unequal.
        assert report["fma"] == 0 or (is_product and "float32" in report["label"]), report


if __name__ == "__main__":
    compile_for_sm90()
