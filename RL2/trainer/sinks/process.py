"""The trainer's side of a sink that runs in a process of its own."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from RL2.runtime import guard
from RL2.trainer.sinks import runner
from RL2.trainer.sinks.sink import Sink, TrackedRun

logger = logging.getLogger(__name__)

_STOP_GRACE = 15.0  # seconds for the guard, which kills after 3 seconds


class SinkProcess:
    """A sink that follows `metrics.jsonl` in a process of its own (`runner`), under a guard.

    Only `wait` waits for it. A failure is reported once, and the sink is then left alone: the file
    has everything.

    Args:
        name: the sink's name in `SINKS`.
        path: the path of `metrics.jsonl`; the rows already in it are not sent.
    """

    def __init__(self, name: str, sink: type[Sink], run: TrackedRun, path: Path):
        self.name, self.path, self.given_up = name, path, False
        self._afterwards = sink.afterwards
        self._process = subprocess.Popen(
            [sys.executable, "-I", guard.__file__, str(os.getpid()),
             sys.executable, "-P", runner.__file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer
        )  # fmt: skip
        order = {
            "sink": [sink.__module__, sink.__name__],
            "sys_path": sys.path,
            "run": run._asdict(),
            "metrics": str(path),
            "offset": path.stat().st_size,
        }
        self._send(json.dumps(order).encode() + b"\n")
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)

    def notify(self) -> None:
        """Tell the sink that the file has grown, and pass on its messages."""
        self._send(runner.GROWN)
        self._pass_on()

    def finish(self, good: bool) -> None:
        """Let the sink send the rest and end. good: whether the run came to its end."""
        self._send(runner.GOOD if good else runner.BAD)
        self._process.stdin.close()

    def wait(self, deadline: float, seconds: float) -> None:
        """Wait until the sink has ended, or end it at the deadline, which is `seconds` after the
        run."""
        process = self._process
        try:
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()  # the guard ends all that the sink has started
            try:
                process.wait(_STOP_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            status = None
        self._pass_on()
        process.stdout.close()
        if status is None:
            self._warn(f"was not done {seconds:g} s after the run and was ended")
        elif status not in (0, runner.REPORTED):
            self._warn(f"its process ended with status {status}")

    def _send(self, words: bytes) -> None:
        try:
            os.write(self._process.stdin.fileno(), words)
        except BlockingIOError:
            pass  # it has thousands of notices, and reads the file when it can
        except BrokenPipeError:
            if self._process.poll() not in (None, runner.REPORTED):
                self._warn(f"its process ended with status {self._process.returncode}")

    def _pass_on(self) -> None:
        for line in (self._process.stdout.read() or b"").decode(errors="replace").splitlines():
            logger.warning("%s: %s", self.name, line)

    def _warn(self, what: str) -> None:
        """Warn once that the sink gets no more rows."""
        if not self.given_up:
            hint = f" ({self._afterwards})" if self._afterwards else ""
            logger.warning("%s: %s; %s has every step%s", self.name, what, self.path, hint)
        self.given_up = True
