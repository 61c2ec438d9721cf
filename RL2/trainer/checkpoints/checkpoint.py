"""Checkpoints that a run continues from, and model folders that transformers loads.

<save_dir>/checkpoints/step000020/   model and optimizer (torch.distributed.checkpoint),
                                     trainer.json, rank0.pt … (RNG and data position),
                                     config.yaml, and manifest.json: what all of that has to be;
                                     where adapters are trained (LoRA) those alone: what is frozen
                                     comes from actor.model_name
<save_dir>/checkpoints/latest        name of the newest complete one
<save_dir>/checkpoints/damaged-…     what was found not to be what its manifest says
<save_dir>/final, <save_dir>/best    plain `save_pretrained` folders, adapters merged; the adapters
                                     themselves in `adapter`, as peft saves them
<save_dir>/before1 …                 what earlier runs left in the folder and this one does not
                                     continue
<save_dir>/.lock                     held by the run that writes here

A folder is written under a name of its own that begins with a dot, made durable, and renamed: at
any moment a name without a dot stands for something whole, or for nothing.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import time
from concurrent import futures
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.utils.serialization.config  # noqa: F401 - torch.save's; else imported in mid-run
from omegaconf import DictConfig
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from RL2.distributed import broadcast, rank, second_group, sum_over_ranks, world_size
from RL2.distributed.agreement import of_all, on_all_ranks
from RL2.runtime.errors import CheckpointError
from RL2.runtime.event_loop import in_thread
from RL2.runtime.folders import (
    TEMPORARY,
    cannot_write,
    clean,
    exists,
    free_name,
    fsync,
    publish,
    remove,
)
from RL2.trainer.checkpoints import integrity, manifest, resume
from RL2.trainer.checkpoints.aside import set_aside
from RL2.trainer.checkpoints.integrity import on_all
from RL2.trainer.startup import machine
from RL2.trainer.startup.shared_folder import PATIENCE
from RL2.workers import Actor

logger = logging.getLogger(__name__)

_DAMAGED = "damaged-"
_STEP = re.compile(r"step(\d{6,})")
_STAGING = StagingOptions(
    use_pinned_memory=torch.cuda.is_available(),
    use_shared_memory=False,
    use_async_staging=False,
    use_non_blocking_copy=False,
)


def n_bytes(state: Any) -> int:
    """Of the tensors in nested dicts and lists, this rank's part."""
    if isinstance(state, DTensor):
        state = state.to_local()
    if isinstance(state, torch.Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state
    return sum(map(n_bytes, values)) if isinstance(state, (dict, list, tuple)) else 0


def _step_of(checkpoint: Path) -> int:
    return int(_STEP.fullmatch(checkpoint.name)[1])


def _updates(state: dict[str, Any], per_rollout: int) -> int:
    """How many updates lie behind, where `per_rollout` of them are made on each rollout now."""
    if "scheduler" in state:  # as version 0.1 has it
        return state["scheduler"]["last_epoch"]
    return state["updates"] * per_rollout // state["updates_per_rollout"]


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of this rank's generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Undo what was drawn since `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _trained(actor: Actor, state: dict[str, Any]) -> dict[str, Any]:
    """A model's state without its frozen parameters."""
    parameters = actor.model.named_parameters(remove_duplicate=False)  # a tied head, too
    frozen = {name for name, parameter in parameters if not parameter.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


class Checkpoints:
    """Saves and loads everything that decides a run's next step. Made on every rank (a collective).

    Args:
        save_dir: the run's folder.
        keep_last: how many checkpoints stay; None keeps all.
        config: of the run, to be kept in its checkpoints.
        background: whether `save` only copies, and a thread of its own writes.

    Attributes:
        inputs: fingerprints of what the run is made of, to be kept, too (`fingerprints.of_run`).
        threads, machines: what the run computes with (`startup.machine`), to be kept, too.
    """

    def __init__(
        self,
        save_dir: str,
        keep_last: int | None = None,
        config: DictConfig | None = None,
        background: bool = False,
    ):
        self.folder = Path(save_dir) / "checkpoints"
        self.keep_last = keep_last
        self.config = config
        self.inputs: dict[str, str] = {}
        self.threads, self.machines = 0, []
        self.versions = resume.versions()  # of the code that runs, whatever is installed later
        # A thread that writes while another trains needs a group of its own. The copies stay for
        # the next save.
        self._group = second_group() if background else None
        self._stager = DefaultStager(_STAGING) if background else None
        self._writing: futures.Future[None] | None = None
        self._resumed: Path | None = None  # the checkpoint that was loaded

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, once it is complete."""
        return self.folder / f"step{step:06d}"

    def steps(self) -> list[Path]:
        """Complete checkpoints, newest first. Copies of other names are not the run's: they are
        neither resumed from nor pruned."""
        found = (self.folder / name for name in self._names() if _STEP.fullmatch(name))
        return sorted(found, key=_step_of, reverse=True)

    def _names(self) -> list[str]:
        """In the folder, if there is one. A folder that cannot be looked into is no empty one."""
        return os.listdir(self.folder) if exists(self.folder) else []

    def set_aside(self, step: int) -> None:
        """Rank 0: move what this run does not continue out of its way, see `aside.set_aside`."""
        clean(self.folder.parent)
        clean(self.folder)
        beyond = [path for path in self.steps() if _step_of(path) > step]
        own = self._resumed is None or resume.is_of(self._resumed, self.folder.parent)
        set_aside(self.folder.parent, beyond, step if own else 0)

    def save(
        self, step: int, actor: Actor, position: dict[str, Any], state: dict[str, Any]
    ) -> Path:
        """Write one checkpoint; it becomes visible only when all of it is on disk. With
        `background` that is so after `wait`; an earlier one is waited for.

        Args:
            position: the source's `state_dict`. state: of the trainer, as JSON has it.

        Raises:
            CheckpointError: on every rank, where one of them cannot write its part. Earlier
                checkpoints are as they were.
        """
        self.wait()
        # get_state_dict, not optimizer.state_dict(): DCP drops AdamW's moments of the latter
        model, optimizer = get_state_dict(actor.model, actor.optimizer)
        tensors = {"model": _trained(actor, model), "optimizer": optimizer}
        scalars = state | {
            "step": step,
            "updates": actor.scheduler.last_epoch,
            "updates_per_rollout": actor.updates_per_rollout,
            "bad_steps": actor.bad_steps,
        }
        if self._stager is not None:
            tensors = self._stager.stage(tensors)
        write = partial(
            self._write, self.path(step), tensors, rng_state(actor.device), position,
            json.dumps(scalars), step,
        )  # fmt: skip
        if self._stager is None:
            write()
        else:
            self._writing = in_thread(write, "checkpoint")
        return self.path(step)

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise already. Ranks learn it one after the other."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def wait(self) -> None:
        """Return when what `save` was given is on disk; raises as `save` does (a collective)."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self, timeout: float = 30.0) -> None:
        """Give what is being written some seconds to be complete; says so if it fails."""
        if self._writing is not None:
            futures.wait([self._writing], timeout)
            if self.failed:
                logger.error("%s", self._writing.exception())

    def _write(
        self,
        final: Path,
        tensors: Any,
        rng: dict[str, torch.Tensor],
        position: dict[str, Any],
        state: str,
        step: int,
    ) -> None:
        group = self._group
        needed = int(sum_over_ranks(torch.tensor(n_bytes(tensors)), group))

        def failed(reason: str) -> CheckpointError:
            problem = cannot_write(self.folder.parent, final, reason, needed)
            return CheckpointError(f"{problem}; earlier checkpoints are as they were")

        def unseen(reason: str) -> CheckpointError:
            return CheckpointError(
                f"trainer.save_dir={self.folder.parent}: rank 0 does not find in {final} what all "
                f"ranks wrote ({reason}); give a folder that all machines share; earlier "
                "checkpoints are as they were"
            )

        temporary = broadcast(
            on_all_ranks(lambda: self._begin(final, needed), failed, group), group
        )
        try:
            # All positions in one file: the next run may have another number of ranks.
            others = of_all(None if rank() == 0 else position, group)
            own = {"rng": rng} | ({"source": [position, *others[1:]]} if rank() == 0 else {})
            written = on_all_ranks(
                lambda: _write_part(temporary, tensors, own, group), failed, group
            )
            files = of_all(written, group)
            on_all_ranks(lambda: self._describe(temporary, files, state, step), failed, group)
            on_all_ranks(lambda: self._look_at(temporary), unseen, group)
            on_all_ranks(lambda: self._show(temporary, final), failed, group)
        except CheckpointError:
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _begin(self, final: Path, needed: int) -> Path | None:
        """Rank 0: a folder that nobody else writes to, where there is room for it."""
        if rank() != 0:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free < needed:
            raise OSError("too little space")
        return Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{final.name}-", dir=self.folder))

    def _describe(
        self, temporary: Path, files: list[manifest.Files], state: str, step: int
    ) -> None:
        """Rank 0: what only one can write, the manifest last."""
        if rank() != 0:
            return
        (temporary / "trainer.json").write_text(state)
        if self.config is not None:
            resume.write(temporary, self.config)
        listed = {name: entry for of_rank in files for name, entry in of_rank.items()}
        others = [
            path
            for path in temporary.rglob("*")
            if path.is_file() and path.relative_to(temporary).as_posix() not in listed
        ]
        about = {
            "step": step, "world_size": world_size(), "versions": self.versions,
            "inputs": self.inputs,
            "threads": self.threads, "machines": self.machines,
        }  # fmt: skip
        listed |= manifest.fingerprints(others, temporary)
        manifest.write(temporary, listed, about)

    def _look_at(self, temporary: Path) -> None:
        """Rank 0: all that its manifest lists has to be there. Network file systems show late what
        others wrote."""
        end = time.monotonic() + PATIENCE
        while rank() == 0:
            try:
                manifest.read(temporary)
                return
            except manifest.Damaged:
                if time.monotonic() > end:
                    raise
            time.sleep(0.2)

    def _show(self, temporary: Path, final: Path) -> None:
        """Rank 0: the names under which all of it is found."""
        if rank() != 0:
            return
        temporary.chmod(0o755)  # mkdtemp's is for its owner alone
        publish(temporary, final)
        self.tidy()

    def tidy(self) -> None:
        """Rank 0: have `latest` name the newest checkpoint; keep the newest `keep_last` alone."""
        for newest in self.steps()[:1]:
            pointer = self.folder / ".latest"
            pointer.write_text(newest.name)
            fsync(pointer)
            pointer.replace(self.folder / "latest")
        for old in self.steps()[self.keep_last :] if self.keep_last else []:
            remove(old)

    def check(self, which: str) -> None:
        """What `load` will say of `inputs` and keys that may not change, before a model is there.

        Raises:
            CheckpointError: one of them is another one, or the checkpoint cannot be read.
        """
        key = f"trainer.load_ckpt_from={which}"
        for folder in self._candidates(which)[:1]:
            with suppress(manifest.Damaged):  # `load` goes on to the one before
                on_all(lambda folder=folder: self._compare(folder), key, folder)

    def about(self, which: str | None) -> dict[str, Any]:
        """What is said of the checkpoint that `load` will take, as far as one looks whole; empty
        where there is none (a collective)."""
        found: dict[str, Any] = {}
        for folder in [] if which is None else self._candidates(which):
            with suppress(manifest.Damaged, OSError):  # `load` says it
                found = manifest.read(folder)["about"]
                break
        return broadcast(found)

    def _candidates(self, which: str) -> list[Path]:
        def listed() -> list[Path]:
            return self.steps() if which == "latest" and rank() == 0 else [Path(which)]

        return broadcast(on_all(listed, f"trainer.load_ckpt_from={which}", self.folder))

    def _compare(self, folder: Path) -> list[str]:
        if self.config is None:
            return []
        content = manifest.read(folder)
        config = {name: entry for name, entry in content["files"].items() if name == resume.NAME}
        manifest.verify(folder, {"files": config})
        about = content["about"]
        lines = resume.compare(folder, self.config, self.inputs, about)
        return lines + machine.changes(about, self.threads, self.machines)

    def load(self, which: str, actor: Actor, source: Any) -> dict[str, Any] | None:
        """Restore `latest` or the folder `which`.

        With `latest`, checkpoints that are not what their manifests say are named, and the newest
        good one is loaded; only then are they renamed to `damaged-…`.

        Returns:
            The saved state, or None where there is nothing to resume (`latest` only).

        Raises:
            CheckpointError: a named folder, or every one there is, is damaged; the newest one that
                is not damaged cannot be read or loaded; or the run's config has another value of a
                key that may not change. Nothing is renamed then.
            DataError: the data set is another one.
        """
        key, bad = f"trainer.load_ckpt_from={which}", []
        for folder in self._candidates(which):
            if (reason := integrity.judge(folder, key)) is not None:
                if which != "latest":
                    raise CheckpointError(
                        f"{key}: {folder} does not load ({reason}); name another checkpoint, or "
                        "use latest"
                    )
                bad.append((folder, reason))
                continue

            def restore(folder: Path = folder) -> tuple[list[str], dict[str, Any]]:
                return self._compare(folder), self._load(folder, actor, source)

            changes, state = on_all(restore, key, folder)
            for damaged, reason in bad:
                logger.warning(
                    "%s: %s does not load (%s); it is %s now; trying the one before",
                    key, damaged, reason, _set_apart(damaged),
                )  # fmt: skip
            self._resumed = folder
            logger.info("resumed from %s", folder)
            for change in changes:
                logger.info("%s", change)
            return state
        if (lost := broadcast(self._lost(bad) if rank() == 0 else None)) is not None:
            raise CheckpointError(f"{key}: {lost}; move all of {self.folder} away to start anew")
        logger.info("%s: nothing under %s, starting anew", key, self.folder)
        return None

    def _lost(self, bad: list[tuple[Path, str]]) -> str | None:
        """Rank 0: what shows that there was a run to go on with, of which nothing is left that
        loads. It stays so however often the command is repeated: a run that began at step 1 then
        would set all of it aside."""
        names = sorted({*(folder.name for folder, _ in bad), *self._apart()})
        if names:
            why = f" ({bad[0][0].name}: {bad[0][1]})" if bad else ""
            return f"none of {len(names)} checkpoints under {self.folder} loads{why}"
        pointer = self.folder / "latest"
        if "latest" in self._names():
            return f"{pointer} names {pointer.read_text():.80}, which is not there"
        return None

    def _apart(self) -> list[str]:
        """Of checkpoints that were found to be damaged before."""
        return [name for name in self._names() if name.startswith(_DAMAGED)]

    @staticmethod
    def _load(folder: Path, actor: Actor, source: Any) -> dict[str, Any]:
        state = json.loads((folder / "trainer.json").read_text())
        model, optimizer = get_state_dict(actor.model, actor.optimizer)
        trained = _trained(actor, model)
        dcp.load({"model": trained, "optimizer": optimizer}, checkpoint_id=folder)
        model |= trained
        set_state_dict(
            actor.model, actor.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )
        actor.prepare_scheduler(actor.n_updates, _updates(state, actor.updates_per_rollout))
        actor.bad_steps = state["bad_steps"]
        own = folder / f"rank{rank()}.pt"
        if exists(own):
            set_rng_state(torch.load(own, weights_only=True)["rng"], actor.device)
        # The positions of all ranks, also for ranks that are new.
        source.load_state_dict(torch.load(folder / "rank0.pt", weights_only=True)["source"])
        return state


def _write_part(
    temporary: Path, tensors: Any, own: dict[str, Any], group: dist.ProcessGroup | None
) -> manifest.Files:
    """This rank's part, durable; returns what it has written."""
    # Named, as dcp would look for other writers, and import them, in mid-run. It syncs its files.
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), process_group=group)
    # One file a rank: a plain value under one key would be stored once for all ranks.
    path = temporary / f"rank{rank()}.pt"
    with path.open("wb") as file:
        torch.save(own, file)
        file.flush()
        os.fsync(file.fileno())
    return manifest.fingerprints([path, *temporary.glob(f"__{rank()}_*")], temporary)  # DCP's names


def _set_apart(folder: Path) -> str:
    """Rename a damaged checkpoint, so that it is not tried again (a collective); its new name."""
    name = broadcast(free_name(folder, _DAMAGED))
    on_all_ranks(
        lambda: folder.rename(folder.with_name(name)) if rank() == 0 else None,
        lambda reason: CheckpointError(
            f"{folder} is damaged and cannot be renamed to {name} ({reason}); move it away"
        ),
    )
    return name
