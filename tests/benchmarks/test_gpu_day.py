"""The GPU's checks, as far as a CPU goes: what is started, what is kept, what the table says."""

import os
import subprocess
import sys

import pytest

from benchmarks import gpu_checks, gpu_day, update

ANSWER = {
    "device": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "attention": "flash_attention_2",
    "head": "auto", "peak_gib": 20.0, "loss": 0.25, "grad_norm": 0.5,
}  # fmt: skip


def answers(*seconds):
    return {"first": ANSWER, "answers": [ANSWER | {"seconds": s} for s in seconds], "why": ""}


def test_every_part_names_programs_and_options_that_there_are():
    """Parsing is all that can be tried of a part for CUDA here."""
    for command in gpu_day.PARTS.values():
        program, *rest = command.split()
        if program == "-m":
            assert rest[0] == "pytest"
            continue
        assert (gpu_day.ROOT / program).is_file()
        if "update" in program:
            options = update.parser().parse_args(rest)
            assert all(n_tokens % options.row == 0 for n_tokens in options.tokens)
        if "gpu_checks" in program:
            assert rest[0] in gpu_checks.CHECKS


def test_the_keys_of_every_variant_of_an_update_are_there(tmp_path):
    pytest.importorskip("triton")
    for name, changes in update.VARIANTS.items():
        node, said = update.actor_node(tmp_path, 512, "cuda", changes)
        found = {key: str(node[key.removeprefix("actor.")]).lower() for key in changes}
        assert found == changes or said, name  # said: what the package that is missing changes


def test_the_table_counts_tokens_and_shares_of_the_peak():
    found = {"auto": answers(0.5, 1.0, 2.0), "naive": answers(4.0)}
    found["liger"] = {"answers": [], "why": "needs CUDA"}
    n, tokens, row = 600_000_000, 16_384, 4_096
    text = update.table(found, "0.6B", n, tokens, row)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    (auto,) = [cells for cells in rows if cells[0] == "| auto"]
    assert auto[2:5] == ["1.000 (0.500–2.000)", "16,384", "4.00"]
    products = 6 * n * tokens
    attention = 6 * 28 * 16 * 128 * row**2 * 4
    assert auto[5:7] == [f"{products / 989e12:.1%}", f"{(products + attention) / 989e12:.1%}"]
    assert text.endswith("- liger: needs CUDA")


def test_parts_that_are_done_are_not_done_again_and_a_failure_is_kept_apart(tmp_path, monkeypatch):
    parts = {"good": "-c print(6*7)", "bad": "-c raise", "slow": "-m http.server 0"}
    states = {
        name: gpu_day.run_part(name, command, tmp_path, 1.0 if name == "slow" else 60.0)
        for name, command in parts.items()
    }
    assert states["good"] == "done" and "42" in (tmp_path / "good.md").read_text()
    assert states["bad"].startswith("failed with 1") and states["slow"].startswith(
        "longer than 1 s"
    )
    assert sorted(path.name for path in tmp_path.glob("*.md")) == ["good.md"]
    monkeypatch.setattr(gpu_day, "PARTS", {"good": parts["good"]})
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(tmp_path)])
    before = (tmp_path / "good.md").stat().st_mtime_ns
    assert gpu_day.main() == 0
    assert (tmp_path / "good.md").stat().st_mtime_ns == before
    assert "42" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu(tmp_path):
    """The script as it is called on a GPU machine, with an interpreter that is there already."""
    done = subprocess.run(
        ["bash", str(gpu_day.ROOT / "benchmarks/gpu_day.sh"), "--device", "cpu",
         "--out", str(tmp_path), "machine", "update-0.6B", "step"],
        env=os.environ | {"RL2_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report.md").read_text()
    assert "| auto | float32, sdpa_varlen, auto |" in report and "2 steps of `spo`" in report
