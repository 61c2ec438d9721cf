"""A trainer's command without the seconds that imports take: forked from a process that has done
them. All else is that of `python -m RL2.trainer.<name>`: a process of its own with its command
line, environment, folder and streams (files instead of pipes), which ends as an interpreter ends.
"""

import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

_TIMEOUT = 180.0  # seconds of a run


def run(
    module: str, words: list[str], env: dict[str, str], cwd: Path | str | None = None
) -> subprocess.CompletedProcess:
    """As `subprocess.run` of `python -m module *words` with text that is captured."""
    server = _server()
    argv = [sys.executable, "-m", module, *words]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        request = {"argv": argv, "env": env, "cwd": str(cwd or Path.cwd()), "files": files}
        server.stdin.write(json.dumps(request, default=str).encode() + b"\n")
        pid = int(server.stdout.readline())
        in_time = select.select([server.stdout], [], [], _TIMEOUT)[0]
        if not in_time:
            os.kill(pid, signal.SIGKILL)
        status = int(server.stdout.readline())
        done = subprocess.CompletedProcess(argv, status, *(file.read_text() for file in files))
    if not in_time:
        raise subprocess.TimeoutExpired(argv, _TIMEOUT, done.stdout, done.stderr)
    return done


@cache
def _server() -> subprocess.Popen:
    from tests.trainer.support import ROOT, environ

    return subprocess.Popen(
        [sys.executable, "-m", "tests.trainer.preloaded"], cwd=ROOT, env=environ(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
    )  # fmt: skip


def _request() -> dict[str, Any]:
    """Forks a process for each request, and returns in those: with what is asked for."""
    import torch._dynamo  # noqa: F401  what the first step of an optimizer imports
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import RL2.trainer.loop
    import RL2.trainer.main  # noqa: F401

    gc.freeze()
    # A lock that another thread holds would never be free in the forked process.
    assert threading.active_count() == 1
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


def _become(request: dict[str, Any]) -> None:
    modes = (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2)
    for fd, (path, mode) in enumerate(zip((os.devnull, *request["files"]), modes, strict=True)):
        opened = os.open(path, mode)
        os.dup2(opened, fd)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    sys.orig_argv = request["argv"]
    sys.argv = ["", *request["argv"][3:]]


if __name__ == "__main__":
    _asked = _request()
    _become(_asked)
    runpy.run_module(_asked["argv"][2], run_name="__main__", alter_sys=True)
