"""The reason why a process ends, for torchrun's report."""

import json
import os
import time
from pathlib import Path

from RL2.runtime.secrets import redact


def tell_launcher(text: str) -> None:
    """Put the reason into torchrun's report, which is printed last and would otherwise have none.

    torchrun gives each of its processes the name of a file. This writes what
    `torch.distributed.elastic` would write there, without importing torch, which takes seconds. The
    first process with a reason becomes the root cause in the report.
    """
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not name:
        return
    now = str(int(time.time()))
    about = {"py_callstack": redact(text), "timestamp": now}
    content = {"message": {"message": redact(text), "extraInfo": about}}
    try:
        Path(name).write_text(json.dumps(content))
    except OSError:
        pass  # it is on stderr anyway
