"""All ranks write one checkpoint, which gets its name only when all of it is on disk."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.utils.serialization.config  # noqa: F401 - torch.save's; else imported during a run
from omegaconf import DictConfig

from RL2.distributed import broadcast, rank, sum_over_ranks
from RL2.distributed.agreement import of_all, on_all_ranks
from RL2.runtime.errors import CheckpointError
from RL2.runtime.folders import TEMPORARY, cannot_write, publish
from RL2.trainer.checkpoints import manifest, resume
from RL2.trainer.checkpoints.contents import TRAINER, Generators, n_bytes
from RL2.trainer.startup.shared_folder import PATIENCE


@dataclass(frozen=True)
class Content:
    """What one rank gives to a checkpoint.

    Attributes:
        tensors: this rank's parts of the tensors, see `contents.collect`.
        generators: this rank's random generators.
        position: the source's position, as this rank has it.
        state: the trainer's state, as plain JSON values.
        config: the run's config.
        about: what the manifest says about the run.
    """

    tensors: dict[str, Any]
    generators: Generators
    position: dict[str, Any]
    state: dict[str, Any]
    config: DictConfig | None
    about: dict[str, Any]


def write(
    final: Path, content: Content, tidy: Callable[[], None], group: dist.ProcessGroup | None
) -> None:
    """Write a checkpoint durably under the name `final` (a collective).

    Args:
        tidy: called on rank 0 when the checkpoint is there.
        group: a process group of all ranks.

    Raises:
        CheckpointError: on every rank, if one of them cannot write its part. Earlier checkpoints
            are unchanged.
    """
    folder = final.parent
    needed = int(sum_over_ranks(torch.tensor(n_bytes(content.tensors)), group))

    def failed(reason: str) -> CheckpointError:
        problem = cannot_write(folder.parent, final, reason, needed)
        return CheckpointError(f"{problem}; earlier checkpoints are unchanged")

    def unseen(reason: str) -> CheckpointError:
        return CheckpointError(
            f"trainer.save_dir={folder.parent}: rank 0 does not find in {final} what all "
            f"ranks wrote ({reason}); give a folder that all machines share; earlier "
            "checkpoints are unchanged"
        )

    def first(action: Callable[[], Any]) -> Callable[[], Any]:
        return action if rank() == 0 else lambda: None

    temporary = broadcast(
        on_all_ranks(first(lambda: _new_folder(final, needed)), failed, group), group
    )
    try:
        # All positions in one file: the next run may have another number of ranks.
        others = of_all(None if rank() == 0 else content.position, group)
        own = {"rng": content.generators}
        own |= {"source": [content.position, *others[1:]]} if rank() == 0 else {}
        part = on_all_ranks(
            lambda: _write_part(temporary, content.tensors, own, group), failed, group
        )
        parts = of_all(part, group)
        on_all_ranks(first(lambda: _write_rest(temporary, content, parts)), failed, group)
        on_all_ranks(first(lambda: _wait_for_files(temporary)), unseen, group)
        on_all_ranks(first(lambda: _give_name(temporary, final, tidy)), failed, group)
    except CheckpointError:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _new_folder(final: Path, needed: int) -> Path:
    """Rank 0: a new folder that nothing else writes to; OSError if there is no room."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(final.parent).free < needed:
        raise OSError("too little space")
    return Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{final.name}-", dir=final.parent))


def _write_part(
    temporary: Path, tensors: Any, own: dict[str, Any], group: dist.ProcessGroup | None
) -> manifest.Files:
    """Write this rank's part durably; returns the fingerprints of its files."""
    # Given, as dcp would search for writers and import them during a run. It syncs its files.
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), process_group=group)
    # One file per rank: a plain value under one key would be stored once for all ranks.
    path = temporary / f"rank{rank()}.pt"
    with path.open("wb") as file:
        torch.save(own, file)
        file.flush()
        os.fsync(file.fileno())
    return manifest.fingerprints([path, *temporary.glob(f"__{rank()}_*")], temporary)  # DCP's names


def _write_rest(temporary: Path, content: Content, parts: list[manifest.Files]) -> None:
    """Rank 0: write what only one rank can write, the manifest last."""
    (temporary / TRAINER).write_text(json.dumps(content.state))
    if content.config is not None:
        resume.write(temporary, content.config)
    listed = {name: entry for part in parts for name, entry in part.items()}
    others = [
        path
        for path in temporary.rglob("*")
        if path.is_file() and path.relative_to(temporary).as_posix() not in listed
    ]
    listed |= manifest.fingerprints(others, temporary)
    manifest.write(temporary, listed, content.about)


def _wait_for_files(temporary: Path) -> None:
    """Rank 0: wait until all files in the manifest are there. Network file systems show the files
    of other machines late."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            manifest.read(temporary)
            return
        except manifest.Damaged:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


def _give_name(temporary: Path, final: Path, tidy: Callable[[], None]) -> None:
    """Rank 0: give the checkpoint its name. From now on it counts."""
    temporary.chmod(0o755)  # mkdtemp's mode is for its owner only
    publish(temporary, final)
    tidy()
