"""A sink in a process of its own: nobody waits for it."""

import os
import signal

from RL2.runtime.process_tree import descendants
from RL2.trainer.sinks.metrics import Metrics
from tests.trainer.sinks.support import config_of


def test_a_sink_that_reads_nothing_is_not_waited_for(tmp_path, caplog):
    """More pokes than a pipe holds; then it is killed, which is said once."""
    metrics = Metrics(config_of(tmp_path, "wandb"), 0, None)
    guard = metrics.trackers[0]._process.pid
    stopped = [guard, *descendants(guard)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    for _ in range(100_000):
        metrics.trackers[0].notify()
    for pid in reversed(stopped):
        os.kill(pid, signal.SIGKILL)
    metrics.trackers[0]._process.wait()
    for step in (1, 2):
        metrics.log(step, 2, {})
    metrics.close()
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "status -9" in line and str(tmp_path / "metrics.jsonl") in line
