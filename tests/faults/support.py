"""Runs that come to an end before their time.

Ranks are forked from a server that has imported everything, so that a run takes about a second.
"""

import gc
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch

from RL2.engines.servers.addresses import free_port
from RL2.runtime.errors import RL2Error
from RL2.trainer.checkpoints.checkpoint import Checkpoints
from RL2.trainer.checkpoints.integrity import damage
from RL2.trainer.loop import Trainer  # noqa: F401  what the server has to have imported
from RL2.trainer.main import launch
from tests.trainer.support import composed, lasting, overrides, rows_of, same_weights, weights

# `bash tests/run.sh faults` asks for many more points than a change has to pass.
LONG = os.environ.get("RL2_FAULTS") == "long"

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])

_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}


def assert_nothing_half(folder: Path) -> None:
    """Whatever has a name in a run's folder is whole."""
    for checkpoint in Checkpoints(folder).steps():
        assert damage(checkpoint) is None
    for model in ("final", "best"):
        if (folder / model).exists():
            weights(folder / model)


def assert_same_run(folder: Path, expected: Path) -> None:
    """Metrics, answers and models of two runs are equal to the last bit."""
    rows, others = ([lasting(row) for row in rows_of(run)] for run in (folder, expected))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        names = {name for name in {*row, *other} if row.get(name) != other.get(name)}
        assert row == other, {name: (row.get(name), other.get(name)) for name in names}
    for model in ("final", "best"):
        assert (folder / model).exists() is (expected / model).exists()
        if (folder / model).exists():
            assert same_weights(weights(folder / model), weights(expected / model))
    answers, others = (
        {path.name: path.read_text() for path in (run / "rollouts").glob("*")}
        for run in (folder, expected)
    )
    assert answers.keys() == others.keys()
    for name in answers:
        assert answers[name] == others[name], name


def points(few: int, many: int) -> range:
    return range(many if LONG else few)


class Run:
    """A run of a trainer on `n_ranks` processes, which may kill itself.

    Args:
        die_at: the rank `mortal` kills itself, as `kill -9` does, when it asks the system for
            the so manyth time to open, make, rename or remove something below `folder`.
        logs: where its output goes, if not beside `folder`.
        environ: variables beside those of torchrun.
        of_rank: what single ranks are started with beside that, by number.
        changes: of the tiny run of `tests.trainer.support.overrides`.
    """

    def __init__(
        self, files: Path, trainer: str, folder: Path, n_ranks: int = 1, *,
        die_at: int | None = None, mortal: int = 0, logs: Path | None = None,
        environ: dict[str, str] | None = None, of_rank: dict[int, dict] | None = None, **changes,
    ):  # fmt: skip
        self.folder = folder
        self.log = (logs or folder.parent) / f"{folder.name}.log"
        port = free_port()
        self.ranks = []
        for rank in range(n_ranks):
            environment = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_ranks,
                "LOCAL_WORLD_SIZE": n_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            } | (environ or {})  # fmt: skip
            own = changes | (of_rank or {}).get(rank, {})
            lines = overrides(files, trainer, folder, **own)
            dies = die_at if rank == mortal else None
            arguments = (
                trainer,
                lines,
                folder,
                environment,
                self.log,
                self.log.with_suffix(f".{rank}"),
                dies,
            )
            self.ranks.append(_CONTEXT.Process(target=_rank, args=arguments, daemon=True))
        for process in self.ranks:
            process.start()

    def wait(self, timeout: float = 120, end_others: bool = True) -> list[int]:
        """Exit codes of all ranks. As torchrun does, ends the others when one has failed, unless
        it has been told to stop itself."""
        end = time.monotonic() + timeout
        while any(process.exitcode is None for process in self.ranks):
            failed = end_others and any(process.exitcode for process in self.ranks)
            if failed or time.monotonic() > end:
                self.kill()
            time.sleep(0.01)
        if time.monotonic() > end:
            raise TimeoutError(f"a run of {timeout} s; its output:\n{self.output()}")
        return [process.exitcode for process in self.ranks]

    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.ranks)

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()

    def kill_at(self, path: Path, timeout: float = 120) -> None:
        """Kill it as soon as something appears."""
        end = time.monotonic() + timeout
        while not path.exists():
            assert time.monotonic() < end and any(process.is_alive() for process in self.ranks), (
                self.output()
            )
            time.sleep(0.005)
        self.kill()

    def finish(self) -> None:
        """Wait for the good end of the run."""
        codes = self.wait()
        assert not any(codes), f"exit codes {codes}; output:\n{self.output()}"

    def events(self, rank: int = 0) -> int:
        """How often a rank of a finished run asked, see `die_at`."""
        return int(self.log.with_suffix(f".{rank}").read_text())

    def output(self) -> str:
        return self.log.read_text()


def _rank(
    trainer: str, lines: list[str], folder: Path, environment: dict, log: Path, count: Path,
    die_at: int | None,
) -> None:  # fmt: skip
    gc.freeze()  # what is imported
    os.environ |= {name: str(value) for name, value in environment.items()}
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    seen = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in _EVENTS and any(f"{folder}/" in str(x) for x in arguments[:2]):
            seen += 1
            if seen == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        launch(composed(trainer, lines))
    except RL2Error as error:  # as the command does
        sys.exit(f"{type(error).__name__}: {error}")
    count.write_text(str(seen))
