"""Mistakes that others made, put back one by one: does a test turn red?

    python -m tests.invariance.mutations [how names begin ...]

Each mutation is applied to a copy of the repository, in which its test is then run. It is red where
the test fails, or does not end: ranks whose collectives are out of step wait for ever. The exit
code is the number of mutations that survive. `test_mutations.py` holds that all still apply.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.invariance.mutations.mutation import ROOT, Mutation, apply
from tests.invariance.mutations.tables import MUTATIONS

COPIED = ("RL2", "tests", "envs", "examples", "benchmarks", "pyproject.toml")
TIMEOUT = 120  # seconds; a good run of one of the tests takes about a tenth of it


def is_red(mutation: Mutation) -> tuple[bool, str]:
    """Whether the test fails on a mutated copy, and how."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder, name)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, target)
        path = Path(folder, mutation.path)
        path.write_text(apply(mutation, path.read_text()))
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", mutation.test]
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return True, f"no end after {TIMEOUT} s"
        finally:
            try:  # the ranks, too
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    lines = [line for line in output.splitlines() if line.startswith("E  ")]
    broken = any(word in line for line in lines for word in ("NameError", "AttributeError"))
    if process.returncode not in (0, 1) or broken:  # no such test, or not the mistake it says
        raise RuntimeError(f"pytest ended with {process.returncode}:\n{output[-2000:]}")
    return process.returncode == 1, lines[0][1:].strip() if lines else "passed"


def main(names: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with all ranks
    chosen = [name for name in MUTATIONS if name.startswith(tuple(names) or "")]
    if not chosen:
        sys.exit(f"no mutation begins with {' or '.join(names)}")
    survivors = 0
    for name in chosen:
        red, how = is_red(MUTATIONS[name])
        survivors += not red
        test = MUTATIONS[name].test.rpartition("/")[2]
        print(f"{'red' if red else 'GREEN':6}{name:36}{test}\n{'':10}{how[:150]}", flush=True)
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
