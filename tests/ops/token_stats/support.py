"""What the tests of every implementation share: float64 oracles, cases, and one way to call all."""

import importlib.util
import os

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from RL2.algorithms import FIELDS, LOSSES, resolve_loss
from RL2.ops.token_stats import STATISTICS as ALL_STATISTICS
from RL2.ops.token_stats import TokenStats
from RL2.ops.token_stats.in_forward import tiled_token_loss
from RL2.ops.token_stats.linear import IMPLEMENTATIONS
from RL2.ops.token_stats.naive import naive_token_stats
from RL2.ops.token_stats.recompute import tiled_token_stats
from RL2.ops.token_stats.tiling import Tiling

NEG_INF = float("-inf")
# `test_at_logps.py` has the other two, which come with tokens.
STATISTICS = tuple(x for x in ALL_STATISTICS if x not in ("top_ids", "at_logps"))
DIFFERENTIABLE = tuple(name for name in STATISTICS if name != "ranks")
# Losses that read nothing but these and fields that every batch with rollouts has.
OF_TOKENS = tuple(
    name for name in LOSSES if {*resolve_loss({"name": name}).inputs} <= {*STATISTICS, *FIELDS}
)
TOP_K = 3
# Smaller than every vocabulary and batch below: several tiles, several blocks of rows, remainders.
SMALL = Tiling(columns=4, rows=5)

# Triton kernels run interpreted where TRITON_INTERPRET=1 was set, else on a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None and (
    INTERPRETED or torch.cuda.is_available()
)
QUICK = ("naive", "tiled")
ALL = (
    *QUICK,
    pytest.param("compiled", marks=pytest.mark.slow),
    pytest.param(
        "triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no GPU, no TRITON_INTERPRET=1")
    ),
)


def stats_of(
    implementation, hidden, weight, actions, temperature=1.0, wanted=STATISTICS, bias=None, *,
    top_k=TOP_K, tiling=SMALL, shard=None, at=None,
):  # fmt: skip
    """`linear_token_stats` with tiles of a test's size."""
    arguments = (hidden, weight, actions, temperature, wanted, bias)
    if implementation == "naive":
        return naive_token_stats(*arguments, top_k=top_k, at=at)
    kernels, device = IMPLEMENTATIONS[implementation](), _device_of(implementation)
    return _moved(
        "cpu",
        tiled_token_stats(
            *_moved(device, arguments),
            top_k=top_k,
            tiling=tiling,
            kernels=kernels,
            shard=shard,
            at=_moved(device, [at])[0],
        ),  # fmt: skip
    )


def loss_of(
    implementation, hidden, weight, actions, temperature, wanted, loss_fn, bias=None, *,
    top_k=TOP_K, tiling=SMALL, shard=None, at=None,
):  # fmt: skip
    """`linear_token_loss` with tiles of a test's size; naive: the loss over all tokens at once."""
    arguments = (hidden, weight, actions, temperature, wanted)
    if implementation == "naive":
        stats = naive_token_stats(*arguments, bias, top_k=top_k, at=at)
        return loss_fn(stats, slice(0, len(actions)))
    kernels, device = IMPLEMENTATIONS[implementation](), _device_of(implementation)
    loss, metrics = tiled_token_loss(
        *_moved(device, arguments), lambda stats, rows: loss_fn(_moved("cpu", stats), rows),
        *_moved(device, [bias]), top_k=top_k, tiling=tiling, kernels=kernels, shard=shard,
        at=_moved(device, [at])[0],
    )  # fmt: skip
    return loss.cpu(), metrics


def _device_of(implementation):
    return "cuda" if implementation == "triton" and not INTERPRETED else "cpu"


def _moved(device, values):
    """Statistics, or a list, with their tensors on `device`."""
    if isinstance(values, TokenStats):
        return TokenStats(**{name: x.to(device) for name, x in values.as_dict().items()})
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in values]


def gradients(value, inputs):
    """d value.sum() / d inputs, None for an input that is None or requires none."""
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(value.sum(), leaves, retain_graph=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


def leaves(*tensors):
    """Copies that require gradients."""
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


# ---------------------------------------------------------------- inputs


def random_case(T=13, H=5, V=11, dtype=torch.float64, seed=0, scale=1.0):
    """hidden, weight, bias, actions; every other token is the greedy one."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    actions = torch.randint(V, (T,), generator=generator)
    actions[::2] = (hidden @ weight.T + bias)[::2].argmax(-1)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), actions


def some_tokens(actions, V):
    """Tokens `[T, 4]` for `at_logps`: the action, two that follow in the vocabulary, and either
    the first of these again or none."""
    at = torch.stack([actions, (actions + 1) % V, (actions + 2) % V, (actions + 1) % V], -1)
    at[::3, -1] = -1
    return at.int()


def every_action(rows):
    """Logits `[R V, V]` and actions `[R V]`: each row once with each of its columns as action."""
    rows = torch.as_tensor(rows, dtype=torch.float32)
    V = rows.shape[1]
    return rows.repeat_interleave(V, 0), torch.arange(V).repeat(len(rows))


def as_linear(logits):
    """hidden, weight, bias of which `logits [T, V]` are the exact product: the identity for a
    weight, so that d hidden = d logits, and -inf (whole columns of it) in the bias."""
    impossible = (logits == NEG_INF).all(0) & (len(logits) > 0)
    bias = torch.zeros(logits.shape[1], dtype=logits.dtype).masked_fill(impossible, NEG_INF)
    return logits.masked_fill(impossible, 0.0), torch.eye(len(bias), dtype=logits.dtype), bias


# ---------------------------------------------------------------- oracles


def textbook(logits, actions, temperature=1.0, top_k=TOP_K):
    """The definitions in float64, and the closed forms of their gradients by the logits.

    Returns `{name: [T]}` (top_logps `[T, K]`) and `{name: [T, V]}`, the latter of the sum over K.
    Exact at both ends of log(1 - p): whatever is excluded from a sum is left out, not subtracted.
    """
    z = logits.double() / temperature
    T, V = z.shape
    rows, columns = torch.arange(T), torch.arange(V)
    order = torch.sort(
        z, dim=-1, descending=True, stable=True
    ).indices  # the lowest of equal columns first
    maxima = order[:, 0]

    def without(index):
        return z.masked_fill(columns == index[:, None], NEG_INF)

    lse = z.logsumexp(-1)
    log1m_max = without(maxima).logsumexp(-1) - lse
    logp = z - lse[:, None]
    sharp = logp[rows, maxima] > -0.7
    logp[rows, maxima] = torch.where(sharp, torch.log1p(-log1m_max.exp()), logp[rows, maxima])
    p = logp.exp()

    def log1m(index):
        return torch.where(index == maxima, log1m_max, torch.log1p(-p[rows, index]))

    values = {
        "logps": logp[rows, actions],
        "log1mps": log1m(actions),
        "max_logps": logp[rows, maxima],
        "max_log1mps": log1m(maxima),
        "entropy": -(p * logp.masked_fill(p == 0, 0.0)).sum(-1),
        "ranks": 1 + (z > z[rows, actions].unsqueeze(-1)).sum(-1).double(),
        "top_logps": torch.nn.functional.pad(
            logp.gather(-1, order[:, :top_k]), (0, max(0, top_k - V)), value=NEG_INF
        ),
    }

    def d_log(index):
        at = columns == index[:, None]
        mass_of_others = p.masked_fill(at, 0.0).sum(-1, keepdim=True)
        return torch.where(at, mass_of_others, -p)

    def d_log1m(index):
        at = columns == index[:, None]
        p_at = p[rows, index].unsqueeze(-1)
        share = without(index).softmax(-1).nan_to_num(0.0)
        possible = (log1m(index) > NEG_INF).unsqueeze(-1)
        return torch.where(possible, torch.where(at, -p_at, p_at * share), 0.0)

    S = values["entropy"].unsqueeze(-1)
    by_logits = {
        "logps": d_log(actions),
        "log1mps": d_log1m(actions),
        "max_logps": d_log(maxima),
        "max_log1mps": d_log1m(maxima),
        "entropy": -p * (logp.masked_fill(p == 0, 0.0) + S),
        "top_logps": sum(
            d_log(order[:, k]).masked_fill(z[rows, order[:, k]].unsqueeze(-1) == NEG_INF, 0.0)
            for k in range(min(top_k, V))
        ),
    }
    return values, {name: gradient / temperature for name, gradient in by_logits.items()}


# ---------------------------------------------------------------- losses


def unseen(stats):
    """A differentiable `[T]` of the statistics that no library has."""
    at = 0.0 if stats.at_logps is None else stats.at_logps[:, 1:].exp().square().sum(-1)
    return at + (
        stats.logps.sin() * stats.entropy
        + stats.log1mps.exp() * stats.max_logps / stats.ranks
        + (stats.max_log1mps.exp() + 0.1).sqrt() * stats.top_logps[:, :2].tanh().sum(-1)
    )


def batch_fields(stats, seed=1):
    """Made-up fields of the batch `{name: [T]}`, log-probabilities near those of `stats`."""
    logps = stats.logps.detach()
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(len(logps), generator=generator).to(logps) for name in FIELDS}
    return noise | {
        name: logps + 0.3 * noise[name] for name in ("old_logps", "ref_logps", "llm_logps")
    }


class RegisteredLoss:
    """A loss of `LOSSES` as a function of statistics and fields; options that it lacks are left."""

    def __init__(self, name, **options):
        self.loss = resolve_loss({"name": name}, fallbacks=options)
        self.wanted, self.top_k = self.loss.statistics, self.loss.top_k

    def __call__(self, stats, fields, rows=slice(None)):
        """Losses `[T]` and metrics `{name: [T]}` of the tokens `rows`."""
        batch = {name: values[rows] for name, values in fields.items()}
        return self.loss({**stats.as_dict(), **batch})


# which of T tokens receive a gradient
TRAINED = {
    "all": lambda T: torch.ones(T, dtype=torch.bool),
    "none": lambda T: torch.zeros(T, dtype=torch.bool),
    "a fifth": lambda T: torch.arange(T) % 5 == 2,
    "the last": lambda T: torch.arange(T) == T - 1,
    "all but one": lambda T: torch.arange(T) != 3,
}


# ---------------------------------------------------------------- what it costs


class ProductCounter(TorchDispatchMode):
    """Multiplications in matrix products."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.overloadpacket.__name__:  # mm(a, b), addmm(out, a, b), addmm_, bmm
            a, b = args[-2:]
            self.total += a.numel() * b.shape[-1]
        return function(*args, **(kwargs or {}))


class AllocationRecorder(TorchDispatchMode):
    """The largest tensor that an operator returned, and the most bytes that new ones held at once
    (a view counts as what it looks at; what an operator uses inside is not seen)."""

    def __init__(self, known=()):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.alive, self.largest, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.largest = max(self.largest, storage.nbytes())
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return result
