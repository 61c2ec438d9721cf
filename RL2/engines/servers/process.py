"""An inference server as a child process."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from RL2.engines.protocol import MalformedReply
from RL2.engines.servers.http import Server, ServerRefused, ServerUnreachable
from RL2.runtime import guard
from RL2.runtime.errors import EngineError
from RL2.runtime.secrets import redact

logger = logging.getLogger(__name__)

_LOG_LINES = 12
_STOP_GRACE = 15.0  # seconds for the guard, which kills the server after three
_PROGRESS_EVERY = 10.0


# The folder of the modules that run inside servers.
SERVER_SIDE = Path(__file__).parents[1] / "server_side"


@dataclass(frozen=True)
class ServerOptions:
    """Options that a server is started with.

    dtype: "float32", "bfloat16" or "auto". device: "cpu" or "cuda". gpus: CUDA devices of this
    server, `tp_size` of them. context_length: None takes the model's. max_in_flight: most requests
    at a time. sleep: whether it must be able to release its memory. revision: commit of a hub
    model. allow_pickle: whether weights may be in other files than safetensors. python: interpreter
    of the environment in which the server is installed. extra_args: appended to its command line.
    """

    model_name: str
    dtype: str = "auto"
    device: str = "cpu"
    tp_size: int = 1
    context_length: int | None = None
    gpu_memory_utilization: float | None = None
    max_in_flight: int = 1024
    sleep: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    allow_pickle: bool = False
    seed: int = 0
    python: str = sys.executable
    extra_args: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()


def variables_of(options: ServerOptions) -> dict[str, str]:
    """Environment variables for any kind of server: the path of our modules, and its GPUs."""
    path = [str(SERVER_SIDE), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(path)}
    if options.device == "cuda":
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, options.gpus))
    return variables


class ServerProcess:
    """A server as a child process; it ends when this process ends, however that happens (`guard`).

    Starts at once, in the background.

    Args:
        command: argv of the server.
        environment: variables in addition to our own.
        log: file for its output, which is appended.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        # With torchrun's variables the server would take itself for one of our ranks. And no
        # server logs to wandb.
        inherited = {
            k: v for k, v in os.environ.items() if not _of_torchrun(k) and k != "WANDB_API_KEY"
        }
        self._secrets = environment
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=inherited | environment,
                # Signals from a terminal are for the trainer, which then stops its servers.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Pid of the guard, whose only child is the server."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs."""
        return self._process.poll()

    def end_of_log(self) -> str:
        """The last lines of its log, indented, as part of a message; or that there are none."""
        try:
            with self.log.open(errors="replace") as file:
                lines = deque(file, maxlen=_LOG_LINES)
        except OSError as error:
            return f"its log cannot be read ({error})"
        text = redact("".join(f"\n  | {line.rstrip():.300}" for line in lines), self._secrets)
        return f"the end of {self.log}:{text}" if lines else f"{self.log} is empty"

    async def stop(self) -> None:
        """End it and everything it started."""
        if self._process.poll() is None:
            self._process.terminate()
        deadline = time.monotonic() + _STOP_GRACE
        while self._process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if self._process.poll() is None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)


async def wait_until_healthy(
    server: Server, process: ServerProcess, path: str, name: str, timeout: float
) -> None:
    """Wait until `path` answers, with a progress line every ten seconds.

    Raises EngineError with the end of the log if the process ends, or is not ready in `timeout`
    seconds.
    """
    start = logged = time.monotonic()
    while True:
        if process.status is not None:
            raise EngineError(
                f"{name} ended with status {process.status} while it started; "
                f"{process.end_of_log()}"
            )
        try:
            await server.get(path, timeout=5.0)
            return
        except MalformedReply:
            return  # any answer will do
        except (ServerUnreachable, ServerRefused):
            now = time.monotonic()
        if now - start > timeout:
            raise EngineError(
                f"{name} was not ready after {timeout:g} s (rollout.server_start_timeout); "
                f"{process.end_of_log()}"
            )
        if now - logged >= _PROGRESS_EVERY:
            logged = now
            logger.info("%s: starting, %.0f s; log: %s", name, now - start, process.log)
        await asyncio.sleep(0.25)


def _of_torchrun(variable: str) -> bool:
    return variable.startswith("TORCHELASTIC_") or variable in {
        "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE",
        "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    }  # fmt: skip
