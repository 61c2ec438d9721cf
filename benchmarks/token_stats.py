"""Time and memory of the token statistics of a head, against the products they are made of.

Forward and backward pass to the gradients of hidden states `[T, H]` and weight `[V, H]`:

- logps_entropy: logps and entropy, every token with a gradient in both (all that TRL and Liger
  have);
- all: all six statistics, every token with a gradient in each that has one;
- max_target_kl: that loss where 80 % of the tokens are the most likely one, without entropy.

    python benchmarks/token_stats.py --tokens 1024 4096 --hidden 1024 2560 --json token_stats.json

Contestants are timed in turns (A B C A B C …, >= 5 rounds after one that warms up); a ratio is the
median over the rounds of one contestant's time over that of another in the same round. A call
makes its gradients anew (`grad` is None before, as after `zero_grad`), the inputs are made once:

- floor: three `torch.mm` of the input type into buffers that stay: logits, dH, dW;
- floor_best: the same through oneDNN on a CPU where that keeps fp32 (`--onednn` does this to every
  contestant that is not ours);
- naive: full logits and autograd; checkpoint: `torch.utils.checkpoint` over naive;
- recompute.X: `linear_token_stats(implementation=X)`, in_forward.X: `linear_token_loss(…)`;
- trl: `ChunkedLogProbFunction`, called like `trl.trainer.utils.add_fused_lm_head` does; trl_fp32:
  with its `cast_lm_head_to_fp32`; liger: `LigerFusedLinearScaledCrossEntropyFunction`. Optional:

    pip install --no-deps "trl==1.16.*" "liger-kernel==0.8.5"

Values and gradients are first compared with float64 at a small shape; who is wrong is not timed.
Memory is measured in calls of its own: the peak of what is alive beyond inputs, dH and dW. What
is left out is named with the reason.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from RL2.algorithms.losses import max_target_kl
from RL2.ops.token_stats import (
    SEVERAL,
    STATISTICS,
    TokenStats,
    linear_token_loss,
    linear_token_stats,
)
from RL2.ops.token_stats.products import rounds_to_half
from RL2.ops.token_stats.tiling import TILINGS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VOCAB = 151936  # Qwen3's; the goals are for this one
LOGIT_STD = 2.5
TEMPERATURE = 0.9
GREEDY = 0.8  # share of the most likely tokens in max_target_kl
CHECKED_SHAPE = (160, 9001, 64)  # T, V, H of the comparison with float64
# Largest errors of who is timed: statistics in nats, gradients relative in the 2-norm. Rivals round
# the logits of bf16 inputs to bf16.
TOLERANCE = {"float32": (1e-3, 1e-3), "bfloat16": (0.3, 0.05)}


class Skip(Exception):
    """Why a contestant does not take part."""


# ------------------------------------------------------------------------- workloads


@dataclass(frozen=True)
class Case:
    title: str
    wanted: tuple[str, ...]
    greedy: float = 0.0

    @property
    def kl(self) -> bool:
        return self.greedy > 0


CASES = {
    "logps_entropy": Case(
        "logps and entropy, dense upstream gradient in both", ("logps", "entropy")
    ),
    "all": Case(
        "all six statistics, dense upstream gradient",
        tuple(name for name in STATISTICS if name not in SEVERAL),
    ),
    "max_target_kl": Case(
        f"max-target KL, {GREEDY:.0%} greedy tokens, no entropy bonus",
        ("logps", "log1mps", "max_logps", "max_log1mps"),
        GREEDY,
    ),
}


@dataclass
class Problem:
    """Inputs of one call. `upstream[name] [T]` are the gradients of the loss in the statistics."""

    case: Case
    hidden: Tensor
    weight: Tensor
    actions: Tensor
    upstream: dict[str, Tensor]
    seen: list[dict[str, Tensor]] | None = None  # statistics of the chunks, if somebody asks

    def loss(self, stats: TokenStats, rows: slice = slice(None)) -> Tensor:
        if self.seen is not None:
            self.seen.append({n: s.detach().clone() for n, s in stats.as_dict().items()})
        if self.case.kl:
            losses = max_target_kl(*(getattr(stats, name) for name in self.case.wanted))
            return (losses * self.upstream["logps"][rows]).sum()
        return sum(
            (s * self.upstream[n][rows]).sum() for n, s in stats.as_dict().items() if n != "ranks"
        )

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_problem(
    case: Case, shape: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int = 0
) -> Problem:
    n_tokens, vocab, width = shape
    draw = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(n_tokens, width, generator=draw, device=device)
    weight = torch.randn(vocab, width, generator=draw, device=device).mul_(LOGIT_STD / width**0.5)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    actions = torch.randint(vocab, (n_tokens,), generator=draw, device=device)
    greedy = torch.rand(n_tokens, generator=draw, device=device) < case.greedy
    if case.greedy:
        actions = torch.where(greedy, most_likely(hidden, weight), actions)
    upstream = {
        name: (0.5 + torch.rand(n_tokens, generator=draw, device=device)) / n_tokens
        for name in case.wanted
    }
    return Problem(case, hidden.requires_grad_(), weight.requires_grad_(), actions, upstream)


@torch.no_grad()
def most_likely(hidden: Tensor, weight: Tensor, columns: int = 8192) -> Tensor:
    """Indices `[T]` of the largest logits, from a tile of the vocabulary at a time."""
    best = torch.full((len(hidden),), -math.inf, device=hidden.device)
    index = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    for start in range(0, len(weight), columns):
        top, where = (hidden.float() @ weight[start : start + columns].float().T).max(-1)
        index = torch.where(top > best, where + start, index)
        best = torch.maximum(best, top)
    return index


# ------------------------------------------------------------------------ contestants

Statistics = Callable[[Problem], TokenStats]


@dataclass(frozen=True)
class Contestant:
    """run: one forward and backward pass.

    held: `(T, V) -> (rows, columns)` of the largest fp32 buffer that it holds, several times over.
    tile: for ours, the columns whose logits exist at a time.
    """

    run: Callable[[Problem], Tensor]
    held: Callable[[int, int], tuple[int, int]] = lambda tokens, vocab: (tokens, vocab)
    tile: int | None = None


def train(problem: Problem, stats_of: Statistics) -> Tensor:
    loss = problem.loss(stats_of(problem))
    loss.backward()
    return loss.detach()


def stats_of(problem: Problem, implementation: str) -> TokenStats:
    return linear_token_stats(
        problem.hidden, problem.weight, problem.actions, TEMPERATURE, problem.case.wanted,
        implementation=implementation,
    )  # fmt: skip


def checkpointed(problem: Problem) -> TokenStats:
    def values(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        stats = linear_token_stats(
            hidden, weight, problem.actions, TEMPERATURE, problem.case.wanted,
            implementation="naive",
        )  # fmt: skip
        return tuple(getattr(stats, name) for name in problem.case.wanted)

    found = checkpoint(values, problem.hidden, problem.weight, use_reentrant=False)
    return TokenStats(**dict(zip(problem.case.wanted, found, strict=True)))


def train_in_forward(problem: Problem, implementation: str) -> Tensor:
    loss, _ = linear_token_loss(
        problem.hidden, problem.weight, problem.actions, TEMPERATURE, problem.case.wanted,
        lambda stats, rows: (problem.loss(stats, rows), {}), implementation=implementation,
    )  # fmt: skip
    loss.backward()
    return loss.detach()


class Floor:
    """logits = h W^T, dH = dz W, dW = dz^T h, with the logits for dz: values take no time."""

    def __init__(self, problem: Problem):
        hidden, weight = problem.hidden, problem.weight
        self.logits = hidden.new_empty(len(hidden), len(weight))
        self.gradients = torch.empty_like(hidden), torch.empty_like(weight)

    @torch.no_grad()
    def __call__(self, problem: Problem) -> None:
        hidden, weight, (of_hidden, of_weight) = problem.hidden, problem.weight, self.gradients
        torch.mm(hidden, weight.T, out=self.logits)
        torch.mm(self.logits, weight, out=of_hidden)
        torch.mm(self.logits.T, hidden, out=of_weight)


@contextmanager
def onednn() -> Iterator[None]:
    """fp32 products on CPU through oneDNN. It may round operands to bf16, and does with AMX."""
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def onednn_error() -> float:
    """Relative error of an fp32 product through oneDNN: 1e-7, or 2e-3 if it rounds to bf16."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=draw)
    exact = a.double() @ b.double()
    with onednn():
        return ((a @ b - exact).norm() / exact.norm()).item()


def floor_best(floor: Floor, problem: Problem) -> Contestant:
    if problem.hidden.is_cuda:
        raise Skip("CPU only")
    if problem.hidden.dtype != torch.float32:
        raise Skip(f"the same as floor in {problem.hidden.dtype}")
    if not torch.backends.mkldnn.is_available():
        raise Skip("this torch has no oneDNN")
    if (error := onednn_error()) > 1e-5:
        raise Skip(f"oneDNN rounds fp32 operands here: relative error {error:.0e}")
    return Contestant(under(onednn, floor))


def under(context: Callable, run: Callable) -> Callable:
    def inside(problem: Problem):
        with context():
            return run(problem)

    return inside


def only_logps_and_entropy(problem: Problem) -> None:
    if set(problem.case.wanted) - {"logps", "entropy"}:
        raise Skip("has logps and entropy only")


def trl(problem: Problem, cast_to_fp32: bool) -> Contestant:
    only_logps_and_entropy(problem)
    if cast_to_fp32 and problem.hidden.dtype == torch.float32:
        raise Skip("the same as trl in float32")
    try:
        from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE, ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK
    except ImportError as error:
        raise Skip(f"cannot be imported: {error}") from error

    def values(problem: Problem) -> TokenStats:
        hidden = problem.hidden.float() if cast_to_fp32 else problem.hidden
        logps, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, problem.weight, None, problem.actions, TEMPERATURE, CHUNK, None, 1.0,
            ("log_probs", "entropy"),
        )  # fmt: skip
        return TokenStats(logps=logps, entropy=entropy)

    def held(tokens: int, vocab: int) -> tuple[int, int]:
        return min(tokens, TOKEN_CHUNK_SIZE), CHUNK  # as wide also where the vocabulary is not

    return Contestant(partial(train, stats_of=values), held)


def liger(problem: Problem) -> Contestant:
    only_logps_and_entropy(problem)
    try:  # imports triton, also for its plain PyTorch fallback (512 tokens at a time)
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
    except Exception as error:
        raise Skip(f"cannot be imported: {error}") from error

    def values(problem: Problem) -> TokenStats:
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            problem.hidden, problem.weight, problem.actions, TEMPERATURE, -100, 1, True
        )
        return TokenStats(logps=-nll, entropy=entropy)

    return Contestant(
        partial(train, stats_of=values), lambda tokens, vocab: (min(tokens, 512), vocab)
    )


def ours(problem: Problem, way: str, implementation: str) -> Contestant:
    if implementation == "triton" and not problem.hidden.is_cuda:
        raise Skip("CUDA only")
    tiling = TILINGS[problem.weight.device.type]
    if way == "in_forward":
        run = partial(train_in_forward, implementation=implementation)
        recomputes = rounds_to_half(problem.hidden, problem.weight)
        tile = tiling.columns if recomputes else tiling.kept
    else:
        values = partial(stats_of, implementation=implementation)
        run, tile = partial(train, stats_of=values), tiling.columns
    return Contestant(run, lambda tokens, vocab: (tokens, min(vocab, tile)), tile)


WAYS = ("in_forward", "recompute")
OURS = {f"{way}.{kind}": (way, kind) for kind in ("compiled", "tiled", "triton") for way in WAYS}
CONTESTANTS: dict[str, Callable[[Floor, Problem], Contestant]] = {
    "floor": lambda floor, problem: Contestant(floor),
    "floor_best": floor_best,
    **{
        name: partial(lambda way, kind, floor, problem: ours(problem, way, kind), *key)
        for name, key in OURS.items()
    },
    "naive": lambda floor, problem: Contestant(
        partial(train, stats_of=partial(stats_of, implementation="naive"))
    ),
    "checkpoint": lambda floor, problem: Contestant(partial(train, stats_of=checkpointed)),
    "trl": lambda floor, problem: trl(problem, cast_to_fp32=False),
    "trl_fp32": lambda floor, problem: trl(problem, cast_to_fp32=True),
    "liger": lambda floor, problem: liger(problem),
}
FLOORS = ("floor", "floor_best")


# ------------------------------------------------------------------------- measuring


@dataclass
class Record:
    """What was measured of a contestant; lists have one entry per round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    page_faults: list[int] = field(default_factory=list)
    warm_up_s: float | None = None
    memory_bytes: int | None = None
    tile: int | None = None
    error: tuple[float, float] | None = None  # statistics (nats), gradients (relative)


def timed(run: Callable, problem: Problem, calls: int) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and page faults of a call."""
    problem.clear()
    precision = torch.backends.mkldnn.matmul.fp32_precision
    gc.collect()
    gc.disable()
    synchronize(problem)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        problem.hidden.grad = problem.weight.grad = None
        run(problem)
    synchronize(problem)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    gc.enable()
    if torch.backends.mkldnn.matmul.fp32_precision != precision:
        raise RuntimeError("a contestant left another precision of fp32 products behind")
    problem.clear()
    return wall / calls, cpu / calls, faults // calls


def synchronize(problem: Problem) -> None:
    if problem.hidden.is_cuda:
        torch.cuda.synchronize()


def working_memory(run: Callable, problem: Problem) -> int:
    """Peak bytes alive in a call beyond what was there before, dH and dW."""
    problem.clear()
    gc.collect()
    if problem.hidden.is_cuda:
        # Too small by up to dH and dW for those that form them after their peak (naive does).
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(problem)
        torch.cuda.synchronize()
        grads = sum(t.grad.nbytes for t in (problem.hidden, problem.weight) if t.grad is not None)
        return max(0, torch.cuda.max_memory_allocated() - before - grads)
    return _cpu_peak(run, problem)


def _cpu_peak(run: Callable, problem: Problem) -> int:
    """From the allocator's own events, so buffers of compiled code count; scratch space that BLAS
    libraries take from the system does not."""
    from torch._C._profiler import _EventType

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run(problem)

    def walk(events) -> Iterator:
        for event in events:
            yield event
            yield from walk(event.children)

    tree = profiler.profiler.kineto_results.experimental_event_tree()
    events = sorted(
        (event for event in walk(tree) if event.tag == _EventType.Allocation),
        key=lambda event: event.start_time_ns,
    )
    grads = [t.grad for t in (problem.hidden, problem.weight) if t.grad is not None]
    pointers = {g.untyped_storage().data_ptr() for g in grads}
    changes = [(event.extra_fields.ptr, event.extra_fields.alloc_size) for event in events]
    last = {pointer: i for i, (pointer, size) in enumerate(changes) if size > 0}
    gradients = {last[pointer] for pointer in pointers if pointer in last}
    live = peak = 0
    known = set()
    for i, (pointer, size) in enumerate(changes):
        if i in gradients or (size < 0 and pointer not in known):
            continue  # freed without having been allocated in here: it is not ours
        known.add(pointer)
        live += size
        peak = max(peak, live)
    return peak


def free_bytes(device: str) -> float:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))


@dataclass(frozen=True)
class Verdict:
    """Result of the comparison with float64 at `CHECKED_SHAPE`."""

    error: tuple[float, float]
    buffers: float  # peak over the bytes of the largest buffer


def contestant(name: str, floor: Floor, problem: Problem, fast_rivals: bool) -> Contestant:
    found = CONTESTANTS[name](floor, problem)
    if fast_rivals and name not in OURS:
        found = replace(found, run=under(onednn, found.run))
    return found


@cache
def verify(
    key: str, dtype: str, device: str, fast_rivals: bool, names: tuple[str, ...]
) -> dict[str, Verdict | Skip]:
    """Errors and memory of contestants at a small shape; `Skip` for those that are wrong."""
    problem = make_problem(CASES[key], CHECKED_SHAPE, DTYPES[dtype], device)
    exact = Problem(
        problem.case,
        problem.hidden.detach().double().requires_grad_(),
        problem.weight.detach().double().requires_grad_(),
        problem.actions,
        {name: value.double() for name, value in problem.upstream.items()},
        seen=[],
    )
    train(exact, partial(stats_of, implementation="naive"))
    floor = Floor(problem)
    found: dict[str, Verdict | Skip] = {}
    for name in [name for name in names if name not in FLOORS]:
        problem.clear()
        try:
            entry = contestant(name, floor, problem, fast_rivals)
            problem.seen = []
            entry.run(problem)
            error = errors(problem, exact)
            problem.seen = None
            if not all(e <= most for e, most in zip(error, TOLERANCE[dtype], strict=True)):
                raise Skip(
                    f"WRONG: differs from float64 by {error[0]:.1e} nats in the statistics and "
                    f"by {error[1]:.1e} (relative) in the gradients"
                )
            rows, columns = entry.held(*CHECKED_SHAPE[:2])
            buffers = working_memory(entry.run, problem) / (4 * rows * columns)
            found[name] = Verdict(error, buffers)
        except Skip as reason:
            found[name] = reason
        except Exception as error:  # a rival's, or a kernel that is not made for this device
            found[name] = Skip(failure(error))
    return found


def failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def errors(problem: Problem, exact: Problem) -> tuple[float, float]:
    stats = {n: torch.cat([part[n] for part in problem.seen]) for n in problem.seen[0]}
    of_stats = max(
        # Ranks are numbers, not nats; a relative error of them is one in nats.
        ((value.double() - want) / (want if name == "ranks" else 1)).abs().max().item()
        for name, value in stats.items()
        for want in [exact.seen[0][name]]
    )
    of_gradients = max(
        ((mine.grad.double() - want.grad).norm() / want.grad.norm()).item()
        for mine, want in ((problem.hidden, exact.hidden), (problem.weight, exact.weight))
    )
    return of_stats, of_gradients


@dataclass
class Result:
    """One table: contestants at one case, shape and type."""

    case: str
    shape: tuple[int, int, int]
    dtype: str
    device: str
    records: dict[str, Record] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    estimated_naive_bytes: float | None = None
    round_s: float | None = None

    def ratio(self, name: str, to: str, clock: str = "wall") -> float | None:
        """Median over the rounds of the time of `name` over that of `to`."""
        if name not in self.records or to not in self.records:
            return None
        pairs = zip(
            getattr(self.records[name], clock), getattr(self.records[to], clock), strict=True
        )
        return statistics.median(a / max(b, 1e-9) for a, b in pairs)

    def speed_up(self, name: str, over: str, clock: str = "wall") -> float | None:
        return self.ratio(over, name, clock)

    def naive_bytes(self) -> float | None:
        naive = self.records.get("naive")
        return (naive and naive.memory_bytes) or self.estimated_naive_bytes


def measure(
    key: str, shape: tuple[int, int, int], dtype: str, options: argparse.Namespace
) -> Result:
    gc.collect()
    gc.freeze()  # modules and the like: looking through them takes a second, before every call
    result = Result(key, shape, dtype, options.device)
    names = tuple(dict.fromkeys([*options.contestants, "naive"]))  # others are compared with it
    verdicts = verify(key, dtype, options.device, options.onednn, names)
    problem = make_problem(CASES[key], shape, DTYPES[dtype], options.device)
    floor = Floor(problem)
    floor(problem)  # touches its buffers, so that what is free afterwards is free
    runs: dict[str, Callable] = {}
    if isinstance(verdicts["naive"], Verdict):
        result.estimated_naive_bytes = 4.0 * math.prod(shape[:2]) * verdicts["naive"].buffers
    for name in options.contestants:
        verdict = verdicts.get(name)
        try:
            if isinstance(verdict, Skip):
                raise verdict
            entry = contestant(name, floor, problem, options.onednn)
            if verdict is not None:
                fits(entry, verdict, shape, dtype, options.device)
            log(f"{key} {shape} {dtype}: warming up {name}")
            warm_up = timed(entry.run, problem, 1)[0]
        except Skip as reason:
            result.skipped[name] = str(reason)
        except (RuntimeError, MemoryError) as error:
            result.skipped[name] = failure(error)
        else:
            runs[name] = entry.run
            error = None if verdict is None else verdict.error
            result.records[name] = Record(warm_up_s=warm_up, tile=entry.tile, error=error)
    started = time.perf_counter()
    for turn in range(options.rounds):
        for name, run in runs.items():
            wall, cpu, faults = timed(run, problem, options.calls)
            record = result.records[name]
            record.wall.append(wall)
            record.cpu.append(cpu)
            record.page_faults.append(faults)
        log(f"{key} {shape} {dtype}: round {turn + 1} of {options.rounds}")
    result.round_s = (time.perf_counter() - started) / options.rounds
    if options.memory:
        for name, run in runs.items():
            if name not in FLOORS:
                result.records[name].memory_bytes = working_memory(run, problem)
    return result


def fits(
    entry: Contestant, verdict: Verdict, shape: tuple[int, int, int], dtype: str, device: str
) -> None:
    """Raise Skip where the memory will not do, by what was used at `CHECKED_SHAPE`."""
    rows, columns = entry.held(*shape[:2])
    n_weights = shape[1] * shape[2]
    # Half-precision weights may be there in fp32, too, and so may their gradients.
    need = 4.0 * (verdict.buffers * rows * columns + n_weights * (2 if dtype == "float32" else 4))
    free = free_bytes(device)
    if need > 0.95 * free:
        raise Skip(f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")


# ---------------------------------------------------------------------------- goals


@dataclass(frozen=True)
class Goal:
    what: str
    value: float
    must: float | None
    aim: float | None
    at_most: bool  # else at least
    by_cpu: float | None = None  # the same ratio by CPU seconds

    def met(self, limit: float | None) -> str:
        if limit is None:
            return ""
        if math.isnan(self.value):
            return "not measured"
        return "met" if (self.value <= limit) == self.at_most or self.value == limit else "NOT met"


def goals(result: Result) -> Iterator[tuple[str, Goal]]:
    """`(contestant of ours, goal)` for all that is asked of it at this case, shape and type."""
    tokens, vocab, width = result.shape
    fp32 = result.dtype == "float32"
    large = tokens >= 1024 and vocab == VOCAB

    def times(name: str, what: str, must: float, aim: float | None) -> Goal:
        value = result.ratio(name, "floor") or math.nan
        return Goal(what, value, must, aim, True, result.ratio(name, "floor", "cpu"))

    for name, (way, _) in OURS.items():
        if name not in result.records:
            continue
        record = result.records[name]
        if "floor" in result.records:
            if CASES[result.case].kl:
                yield name, times(name, "max-target KL, × floor", 0.85, 0.70)
            elif result.device == "cuda":
                if width == 4096:
                    limits = (1.4, 1.15) if way == "in_forward" else (1.8, 1.45)
                    yield name, times(name, "× floor", *limits)
            elif way == "recompute":
                yield name, times(name, "× floor", 1.65, 1.40)
            elif large:
                yield name, times(name, "× floor", 1.30, 1.10 if tokens >= 4096 else None)
        for rival, (must, aim), asked in (
            ("naive", (2, 2.5) if fp32 else (3, 4), True),
            ("trl", (2, 3), result.case == "logps_entropy"),
        ):
            faster = result.speed_up(name, rival)
            if faster is not None and asked:
                by_cpu = result.speed_up(name, rival, "cpu")
                yield name, Goal(f"faster than {rival}, ×", faster, must, aim, False, by_cpu)
        if record.memory_bytes is not None:
            per_tile = record.memory_bytes / (4 * tokens * min(record.tile, vocab))
            yield name, Goal("memory / (T tile 4 B)", per_tile, 1.2, None, True)
            naive = result.naive_bytes()
            if tokens >= 2048 and naive:
                measured = "naive" in result.records
                what = "memory below naive, ×" + ("" if measured else " (naive estimated)")
                yield name, Goal(what, naive / record.memory_bytes, None, 50, False)


# --------------------------------------------------------------------------- reports


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(result: Result) -> str:
    tokens, vocab, width = result.shape
    parts = [
        f"## {CASES[result.case].title}\n\n"
        f"T = {tokens:,}, V = {vocab:,}, H = {width:,}, {result.dtype}, {result.device}"
    ]
    rows = []
    for name, record in result.records.items():
        memory, tiles = record.memory_bytes, record.tile and min(record.tile, vocab)
        rows.append(
            [
                name,
                number(statistics.median(record.wall), 3),
                number(statistics.median(record.cpu), 3),
                number(result.ratio(name, "floor")),
                number(result.ratio(name, "floor", "cpu")),
                number(result.ratio(name, "floor_best")),
                number(result.speed_up(name, "naive")),
                number(result.speed_up(name, "trl")),
                "" if memory is None else number(memory / (4 * tokens * vocab), 3),
                "" if memory is None or not tiles else number(memory / (4 * tokens * tiles)),
                "" if record.error is None else f"{record.error[0]:.0e} / {record.error[1]:.0e}",
            ]
        )
    head = [
        "", "wall s", "CPU s", "× floor", "× floor (CPU)", "× floor_best", "faster than naive, ×",
        "faster than trl, ×", "memory / (T V 4 B)", "memory / (T tile 4 B)",
        "error (nats / gradient)",
    ]  # fmt: skip
    parts.append(markdown(head, rows))
    if result.skipped:
        parts.append("\n".join(f"- {name} skipped: {why}" for name, why in result.skipped.items()))
    rows = [
        [
            name, goal.what, number(goal.value), number(goal.by_cpu),
            number(goal.must), goal.met(goal.must), number(goal.aim), goal.met(goal.aim),
        ]
        for name, goal in goals(result)
    ]  # fmt: skip
    if rows:
        parts.append(markdown(["", "goal", "wall", "CPU", "must", "", "aim", ""], rows))
    return "\n\n".join(parts)


def summary(results: Sequence[Result]) -> str:
    """Range of every goal's value over the tables, and in how many it is met."""
    found: dict[tuple[str, str, float | None, float | None], list[Goal]] = {}
    for result in results:
        for name, goal in goals(result):
            key = (f"{name}, {result.dtype}", goal.what, goal.must, goal.aim)
            found.setdefault(key, []).append(goal)

    def count(reached: Sequence[Goal], limit: str) -> str:
        met = sum(goal.met(getattr(goal, limit)) == "met" for goal in reached)
        return f"{met} of {len(reached)}" if getattr(reached[0], limit) is not None else ""

    def span(reached: Sequence[Goal]) -> str:
        values = [goal.value for goal in reached]
        return f"{min(values):,.2f}–{max(values):,.2f}"

    rows = [
        [
            name, what, span(reached),
            number(must), count(reached, "must"), number(aim), count(reached, "aim"),
        ]
        for (name, what, must, aim), reached in found.items()
    ]  # fmt: skip
    head = ["", "goal", "least to most", "must", "met", "aim", "met"]
    return "## Goals\n\n" + markdown(head, rows)


def environment(options: argparse.Namespace) -> dict[str, str]:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "missing"

    cpu = "unknown CPU"
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        cpu = found.group(1) if found else platform.machine()
    packages = ("torch", "trl", "liger-kernel", "triton")
    return {
        "CPU": f"{cpu} ({torch.backends.cpu.get_cpu_capability()})",
        **({"GPU": torch.cuda.get_device_name()} if options.device == "cuda" else {}),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(torch.get_num_threads()),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "default"),
        "malloc": "keeps what is freed" if options.keep_pages else "default",
        "rivals' fp32 products": "oneDNN" if options.onednn else "torch's default",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "rounds": f"{options.rounds} of {options.calls} call(s) each",
    }


def profile(options: argparse.Namespace) -> str:
    """Where the time of the first case goes: matrix products, the rest, and its largest parts."""
    key, dtype = options.cases[0], options.dtype[0]
    shape = (options.tokens[0], options.vocab, options.hidden[0])
    problem = make_problem(CASES[key], shape, DTYPES[dtype], options.device)
    floor = Floor(problem)
    is_product = re.compile(r"::_?(add|b|baddb|addb|scaled_)?mm(_|$)|linear|matmul|gemm")
    parts = [f"## Profile: {key}, T, V, H = {shape}, {dtype}, {options.device}"]
    for name in options.contestants:
        if name not in (*OURS, *FLOORS):
            continue
        try:
            run = CONTESTANTS[name](floor, problem).run
        except Skip as reason:
            parts.append(f"{name} skipped: {reason}")
            continue
        timed(run, problem, 1)  # compiles
        kinds = torch.profiler.ProfilerActivity
        activities = [kinds.CPU, *([kinds.CUDA] if options.device == "cuda" else [])]
        problem.clear()
        with torch.profiler.profile(activities=activities) as profiler:
            start = time.perf_counter()
            run(problem)
            synchronize(problem)
            wall = time.perf_counter() - start
        own = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
        spent = {e.key: getattr(e, own) / 1e6 for e in profiler.key_averages()}
        products = sum(s for op, s in spent.items() if is_product.search(op))
        others = sorted(
            ((s, op) for op, s in spent.items() if not is_product.search(op)), reverse=True
        )
        lines = [
            f"{name}: {wall:.3f} s, of which products {products:.3f} s ({products / wall:.0%})"
        ]
        lines += [f"    {s:8.3f} s  {op}" for s, op in others[:8] if s > 0]
        parts.append("\n".join(lines))
        problem.clear()
    return "\n\n".join(parts)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 2560])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, help="per round and contestant; 1, on CUDA 10")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of OpenMP; the affinity's by default")
    parser.add_argument(
        "--onednn", action="store_true", help="fp32 products of rivals and floor through oneDNN"
    )
    parser.add_argument(
        "--keep-pages", action="store_true",
        help="glibc keeps what is freed: no page faults for new gradients",
    )  # fmt: skip
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--profile", action="store_true", help="of the first case, nothing else")
    parser.add_argument("--json", type=Path, help="file for the raw numbers")
    options = parser.parse_args(arguments)
    options.calls = options.calls or (10 if options.device == "cuda" else 1)
    if options.onednn and (options.device != "cpu" or onednn_error() > 1e-5):
        parser.error("--onednn: oneDNN does not keep fp32 here")
    return options


def needed_environment(options: argparse.Namespace) -> dict[str, str]:
    """What has to be set before OpenMP and glibc start.

    Passive: threads that spin while others work would be counted as CPU time, and slow down
    whatever comes next.
    """
    wanted = {"OMP_WAIT_POLICY": "passive", "KINETO_LOG_LEVEL": "99"}
    if options.threads:
        wanted["OMP_NUM_THREADS"] = str(options.threads)
    if options.keep_pages:
        wanted |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        wanted |= {"MALLOC_TOP_PAD_": str(2**26), "MALLOC_ARENA_MAX": "1"}
    return wanted


def raw(result: Result) -> dict:
    return {
        **{k: v for k, v in vars(result).items() if k != "records"},
        "records": {name: vars(record) for name, record in result.records.items()},
        "ratios": {
            name: {
                f"{to}_{clock}": result.ratio(name, to, clock)
                for to in ("floor", "floor_best", "naive", "trl")
                if to in result.records
                for clock in ("wall", "cpu")
            }
            for name in result.records
        },
        "goals": [
            {"contestant": name, **vars(goal), "must_met": goal.met(goal.must)}
            | {"aim_met": goal.met(goal.aim)}
            for name, goal in goals(result)
        ],
    }


def main() -> None:
    options = parse()
    wanted = needed_environment(options)
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        arguments = [sys.executable, *sys.argv]
        os.execve(sys.executable, arguments, os.environ | wanted)
    facts = environment(options)
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()), flush=True)
    if options.profile:
        print("\n" + profile(options))
        return
    results = []
    for tokens in options.tokens:
        for width in options.hidden:
            for dtype in options.dtype:
                for key in options.cases:
                    result = measure(key, (tokens, options.vocab, width), dtype, options)
                    results.append(result)
                    print("\n" + report(result), flush=True)
                    if options.json:  # after each, so that a run that is stopped leaves something
                        content = {"environment": facts, "results": [raw(r) for r in results]}
                        options.json.write_text(json.dumps(content, indent=1))
    print("\n" + summary(results))


if __name__ == "__main__":
    main()
