"""`metrics.jsonl`: a row for each step. It is always written, and the trackers read it."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from RL2.runtime.folders import exists
from RL2.trainer.sinks.sink import TrackedRun


class Jsonl:
    """The file metrics.jsonl, which is always written.

    Rows beyond the resumed step are dropped at the start: a resumed run writes those steps again,
    and the file holds every step once.
    """

    module, install, afterwards = "json", "", ""

    def __init__(self, run: TrackedRun, tell: Callable[[str], None]):
        self._tell = tell
        self.path = Path(run.folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._lines_until(run.resumed_step)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(self.path)
        self._file = self.path.open("a+")
        self._left_out: set[str] = set()  # metrics reported as not finite

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write a row. Raises OSError if that fails."""
        self._restore_if_moved()
        row = self._finite(step, metrics)
        self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self, good: bool) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # a row that could not be written, which `log` has reported

    def _finite(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """The finite metrics. Others are reported once each: JSON has no such numbers, and jq and
        others fail on Python's NaN."""
        left_out = {name for name, value in metrics.items() if not math.isfinite(value)}
        for name in sorted(left_out - self._left_out):
            self._tell(
                f"{name} is {metrics[name]} in step {step}, which JSON cannot hold: left out of "
                f"{self.path.name}, now and later"
            )
        self._left_out |= left_out
        return {name: value for name, value in metrics.items() if name not in left_out}

    def _restore_if_moved(self) -> None:
        """Write the file again if it or its folder was deleted or moved; it is still open here."""
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return
            text = ""  # another file is there
        except (FileNotFoundError, NotADirectoryError):
            self._file.seek(0)
            text = self._file.read()
        except OSError:  # unknown; the next write will show
            return
        self._tell(f"{self.path} was deleted, moved or replaced; it is written there again")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.open("a+")
        new.write(text)
        self._file, old = new, self._file
        old.close()

    def _lines_until(self, step: int) -> list[str]:
        """Lines up to a step; a killed process may have left half of one."""
        text = self.path.read_text(errors="replace") if exists(self.path) else ""
        kept = []
        for line in text.splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, LookupError, TypeError):
                self._tell(f"{self.path}: a line that is not a step was dropped: {line:.80}")
        return kept
