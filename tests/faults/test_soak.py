"""A long run stays as it is: memory, open files, threads and processes."""

import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.faults.support import LONG, Run
from tests.trainer.support import rows_of, write_files

STEPS = 3000
WARM_UP = 1000  # steps in which caches fill
SETTINGS = {
    "trainer__n_epochs": STEPS, "trainer__max_steps": STEPS, "trainer__save_freq": 100,
    "trainer__keep_last": 2, "trainer__test_freq": 50, "test_data__max_examples": 4,
    "trainer__health__no_signal_steps": "null", "actor__lr": "1e-6",
}  # fmt: skip
KINDS = {
    "spo": {},
    "ahead, saved beside": {"rollout__staleness": 1, "trainer__async_save": "true"},
    "partial": {"rollout__partial_rollout": "true"},
}


def own_memory(pid):
    """Bytes of a process that no file stands behind: what other processes share does not count."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@pytest.mark.skipif(not LONG, reason="long: bash tests/run.sh faults")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_three_thousand_steps(tmp_path, kind):
    files = write_files(tmp_path)
    folder = tmp_path / "run"
    run = Run(
        files, "spo", folder, test_data__path=files / "rows.jsonl", **SETTINGS, **KINDS[kind]
    )  # fmt: skip
    process, seen = psutil.Process(run.ranks[0].pid), []
    while run.ranks[0].exitcode is None:
        time.sleep(0.25)
        try:
            steps = len(rows_of(folder))
            now = (own_memory(process.pid), process.num_fds(), process.num_threads(),
                   len(process.children(recursive=True)))  # fmt: skip
        except (
            OSError,
            ValueError,
            StopIteration,
            psutil.Error,
        ):
            continue  # not begun, half a row, just ended
        if steps >= WARM_UP:
            seen.append((steps, *now))
    run.finish()
    assert len(rows_of(folder)) == STEPS + 1  # and the evaluation before the first
    steps, memory, *others = map(np.array, zip(*seen, strict=True))
    slope = np.polyfit(steps, memory / 2**20, 1)[0] * 1000
    figures = {name: (values[: len(values) // 10].max(), values[-len(values) // 10 :].max())
               for name, values in zip(("descriptors", "threads", "processes"), others,
                                       strict=True)}  # fmt: skip
    print(f"{kind}: {slope:+.2f} MB per 1,000 steps, {figures}")
    assert slope < 1
    # Those of a save or an evaluation may just be open.
    assert all(last <= first + 2 for first, last in figures.values()), figures
