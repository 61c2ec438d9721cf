"""A check that all ranks see the same folder, and may write to it."""

import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

from RL2.distributed import broadcast, rank, world_size
from RL2.distributed.agreement import of_all
from RL2.runtime.errors import ConfigError
from RL2.runtime.folders import TOKEN

PATIENCE = 10.0  # seconds; network file systems show a new file late


def check_shared(save_dir: str, patience: float = PATIENCE) -> None:
    """Each rank writes a file that rank 0 must see, and the other way round (a collective).

    Otherwise parts of a checkpoint could go to the disks of other machines: the run would end well,
    but its checkpoints would not load.

    Raises:
        ConfigError: on every rank, naming the first one that sees another folder, or may not
            write there.
    """
    if world_size() == 1:
        return
    folder = Path(save_dir)
    is_new = rank() == 0 and not folder.exists()
    token = broadcast(secrets.token_hex(16))
    own = folder / f"{TOKEN}{token}-{rank()}"
    try:
        problems = of_all(_write(own, token))  # returns when all have closed theirs
        if not any(problems):
            wanted = range(world_size()) if rank() == 0 else [0]
            missing = [
                which
                for which in wanted
                if not _appears(folder / f"{TOKEN}{token}-{which}", token, patience)
            ]
            unseen = of_all(missing)
    finally:
        with suppress(OSError):
            own.unlink()
    # Returns when all ranks have removed their files.
    hosts = of_all(f"{socket.gethostname()}, there {folder.absolute()}")
    if is_new:  # a run that is refused later leaves no folder
        with suppress(OSError):
            folder.rmdir()
    for which, problem in enumerate(problems):
        if problem:
            raise ConfigError(
                f"trainer.save_dir={save_dir}: rank {which} ({hosts[which]}) cannot write to it "
                f"({problem}); give a folder that all machines share and in which this user may "
                "make files"
            )
    for which in range(1, world_size()):
        if unseen[which] or which in unseen[0]:
            raise ConfigError(
                f"trainer.save_dir={save_dir}: rank {which} ({hosts[which]}) does not see the "
                f"files of rank 0 ({hosts[0]}), or the other way round; give a folder on a file "
                "system that all machines share, by an absolute path"
            )


def _write(path: Path, token: str) -> str | None:
    """Write a file; returns why that failed, or None."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(token)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _appears(path: Path, token: str, patience: float) -> bool:
    end = time.monotonic() + patience
    while True:
        try:
            os.listdir(path.parent)  # some file systems refresh their cache only then
            if path.read_text() == token:
                return True
        except OSError:
            pass  # not yet
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
