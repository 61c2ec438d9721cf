"""How a process says why it ends: on stderr, and in the report that torchrun makes of it."""

import json
import os
import time
from pathlib import Path

from RL2.runtime.secrets import redact


def tell_launcher(text: str) -> None:
    """Put the reason into torchrun's report, which comes last and would else have none.

    torchrun names a file to each of its processes; what `torch.distributed.elastic` would write
    there is written here, without an import of torch, which takes seconds. The first process that
    has a reason gives the report its root cause.
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
        pass  # it stands on stderr all the same
