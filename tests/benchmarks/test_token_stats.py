"""The benchmark of the token statistics at toy size: what it measures, refuses and writes."""

import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "token_stats.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_of_token_stats", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    gc.unfreeze()
    del sys.modules[spec.name]


@pytest.fixture
def small(bench, monkeypatch):
    """Without the contestants that compile, and with a smaller comparison."""
    slow = {name for name in bench.CONTESTANTS if "compiled" in name or "triton" in name}
    kept = {name: make for name, make in bench.CONTESTANTS.items() if name not in slow}
    monkeypatch.setattr(bench, "CONTESTANTS", kept)
    monkeypatch.setattr(bench, "CHECKED_SHAPE", (12, 301, 16))
    bench.verify.cache_clear()
    yield bench
    bench.verify.cache_clear()


def options(bench, *arguments):
    return bench.parse(["--vocab", "300", "--rounds", "2", *arguments])


def test_command(tmp_path):
    """The command itself, in a process whose OpenMP and malloc it sets up anew."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--tokens", "6", "--vocab", "300", "--hidden", "8"),
            *("--dtype", "float32", "--cases", "logps_entropy", "--rounds", "1", "--threads", "1"),
            *("--contestants", "floor", "naive", "in_forward.tiled", "in_forward.triton"),
            *("--json", str(tmp_path / "raw.json")),
        ],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "- OMP_WAIT_POLICY: passive" in done.stdout and "- threads: 1" in done.stdout
    assert "in_forward.triton skipped: CUDA only" in done.stdout
    assert "## Goals" in done.stdout
    raw = json.loads((tmp_path / "raw.json").read_text())
    (result,) = raw["results"]
    assert set(result["records"]) == {"floor", "naive", "in_forward.tiled"}
    assert len(result["records"]["naive"]["wall"]) == 1
    assert result["ratios"]["floor"]["floor_wall"] == 1


@pytest.mark.parametrize("key", ["logps_entropy", "all", "max_target_kl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everyone_is_timed_or_named(small, key, dtype):
    result = small.measure(key, (6, 300, 8), dtype, options(small))
    assert {*result.records, *result.skipped} == set(small.CONTESTANTS)
    assert {"floor", "naive", "checkpoint", "in_forward.tiled"} <= set(result.records)
    assert "recompute.tiled" in result.records
    for name, why in result.skipped.items():
        assert name in ("floor_best", "trl", "trl_fp32", "liger") and why
        assert "WRONG" not in why and "failed" not in why
    for name, record in result.records.items():
        assert len(record.wall) == len(record.cpu) == 2 and min(record.wall) > 0
        assert (record.memory_bytes is None) == (name in small.FLOORS)
    text = small.report(result)
    assert all(f"| {name} |" in text for name in result.records)
    assert all(f"- {name} skipped: " in text for name in result.skipped)


def test_a_wrong_contestant_is_not_timed(small, monkeypatch):
    def wrong(problem):
        stats = small.stats_of(problem, "naive")
        return type(stats)(logps=stats.logps, entropy=1.01 * stats.entropy)

    def broken(problem):
        raise RuntimeError("no kernel\nhere")

    entries = {
        "wrong": lambda floor, problem: small.Contestant(partial(small.train, stats_of=wrong)),
        "broken": lambda floor, problem: small.Contestant(broken),
    }
    monkeypatch.setattr(small, "CONTESTANTS", small.CONTESTANTS | entries)
    chosen = options(small, "--contestants", "floor", "wrong", "broken")
    result = small.measure("logps_entropy", (6, 300, 8), "float32", chosen)
    assert set(result.records) == {"floor"}
    assert result.skipped["wrong"].startswith("WRONG: differs from float64 by ")
    assert result.skipped["broken"] == "failed: RuntimeError: no kernel"


def test_who_does_not_fit_is_not_timed(small, monkeypatch):
    monkeypatch.setattr(small, "free_bytes", lambda device: 6 * 300 * 4 * 4)
    chosen = options(small, "--contestants", "floor", "naive")
    result = small.measure("logps_entropy", (6, 300, 8), "float32", chosen)
    assert result.skipped["naive"].startswith("needs about 0.0 GiB")
    assert result.naive_bytes() == pytest.approx(7.25 * 6 * 300 * 4, rel=0.05)


def test_working_memory_of_known_calls(bench):
    gc.freeze()
    hidden = torch.randn(64, 16, requires_grad=True)
    weight = torch.randn(8192, 16, requires_grad=True)
    problem = bench.Problem(bench.CASES["all"], hidden, weight, None, {})

    def products(problem):  # logits and their gradient; dH and dW are not counted
        (problem.hidden @ problem.weight.T).backward(torch.empty(64, 8192))

    logits = 64 * 8192 * 4
    assert bench.working_memory(products, problem) == pytest.approx(2 * logits, rel=0.01)

    def in_turn(problem):
        for _ in range(3):
            torch.empty(64, 8192).sum()

    assert bench.working_memory(in_turn, problem) == pytest.approx(logits, rel=0.01)

    problem = bench.make_problem(bench.CASES["all"], (64, 8192, 16), torch.float32, "cpu")
    naive = partial(bench.train, stats_of=partial(bench.stats_of, implementation="naive"))
    # Seven in fp32 and a mask of bytes, counted by hand.
    assert bench.working_memory(naive, problem) == pytest.approx(7.25 * logits, rel=0.01)


def test_ratios_are_medians_of_rounds(bench):
    result = bench.Result("all", (1024, bench.VOCAB, 8), "float32", "cpu")
    result.records["floor"] = bench.Record(wall=[1.0, 2.0, 4.0], cpu=[1.0, 1.0, 1.0])
    result.records["naive"] = bench.Record(wall=[4.0, 4.0, 4.0], cpu=[3.0, 3.0, 3.0])
    # A round in which the whole machine was slow leaves the ratio as it is.
    result.records["in_forward.tiled"] = bench.Record(wall=[1.2, 2.4, 5.2], cpu=[1.0, 1.5, 2.0])
    assert result.ratio("in_forward.tiled", "floor") == pytest.approx(1.2)
    assert result.ratio("in_forward.tiled", "floor", "cpu") == pytest.approx(1.5)
    assert result.speed_up("in_forward.tiled", "naive") == pytest.approx(4 / 2.4)
    assert result.ratio("in_forward.tiled", "trl") is None
    found = {goal.what: goal for _, goal in bench.goals(result)}
    floor, naive = found["× floor"], found["faster than naive, ×"]
    assert (floor.must, floor.met(floor.must), floor.aim) == (1.30, "met", None)
    assert (naive.must, naive.met(naive.must), naive.met(naive.aim)) == (2, "NOT met", "NOT met")


def test_goals_of_the_issue(bench):
    def asked(case, shape, dtype="float32", device="cpu", rival=None):
        result = bench.Result(case, shape, dtype, device)
        names = ["floor", "in_forward.tiled", "recompute.tiled", *([rival] if rival else [])]
        for name in names:
            memory = 4 * shape[0] * 4096
            result.records[name] = bench.Record([1.0], [1.0], memory_bytes=memory, tile=4096)
        return {(name, g.what): (g.must, g.aim) for name, g in bench.goals(result)}

    large, small = (4096, bench.VOCAB, 1024), (512, bench.VOCAB, 1024)
    times = ("in_forward.tiled", "× floor"), ("recompute.tiled", "× floor")
    assert [asked("all", large)[key] for key in times] == [(1.30, 1.10), (1.65, 1.40)]
    assert times[0] not in asked("all", small) and times[1] in asked("all", small)
    kl = asked("max_target_kl", large)
    assert kl["in_forward.tiled", "max-target KL, × floor"] == (0.85, 0.70)
    wide = asked("all", (8192, bench.VOCAB, 4096), "bfloat16", "cuda")
    assert [wide[key] for key in times] == [(1.4, 1.15), (1.8, 1.45)]
    for dtype, limits in (("float32", (2, 2.5)), ("bfloat16", (3, 4))):
        found = asked("all", large, dtype, rival="naive")
        assert found["recompute.tiled", "faster than naive, ×"] == limits
        assert found["recompute.tiled", "memory below naive, ×"] == (None, 50)
    assert asked("logps_entropy", large, rival="trl")["in_forward.tiled", "faster than trl, ×"] == (
        2,
        3,
    )
    assert asked("all", small)["recompute.tiled", "memory / (T tile 4 B)"] == (1.2, None)


def test_greedy_tokens_are_the_most_likely(bench):
    hidden, weight = torch.randn(9, 8), torch.randn(50, 8)
    want = (hidden @ weight.T).argmax(-1)
    assert torch.equal(bench.most_likely(hidden, weight, columns=7), want)
    case = bench.CASES["max_target_kl"]
    problem = bench.make_problem(case, (1000, 50, 8), torch.float32, "cpu")
    greedy = (problem.actions == bench.most_likely(problem.hidden, problem.weight)).float().mean()
    assert greedy.item() == pytest.approx(0.8 + 0.2 / 50, abs=0.05)


def test_onednn_is_exact_or_left_out(bench):
    before = torch.backends.mkldnn.matmul.fp32_precision
    error = bench.onednn_error()
    assert 0 < error < 0.01 and not math.isnan(error)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
