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
from concurrent import futures
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.utils.serialization.config  # noqa: F401 - torch.save's; else imported in mid-run
from omegaconf import DictConfig
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from RL2.config import CheckpointError, RL2Error
from RL2.distributed import broadcast, rank, second_group, sum_over_ranks, world_size
from RL2.distributed.agreement import first_reason, of_all, reason_of, together
from RL2.rollout.event_loop import in_thread
from RL2.trainer import manifest, record, resume
from RL2.trainer.folders import TEMPORARY, cannot_write, clean, free_name, fsync, publish, remove
from RL2.workers import Actor

logger = logging.getLogger(__name__)

_RUN_FILES = (
    "checkpoints", "best", "final", "rollouts", "metrics.jsonl",
    record.CONFIG, record.RUN, record.EARLIER,
)  # fmt: skip
_PACKAGES = ("rl2", "torch", "transformers")
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


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # RL2 run from a checkout
            found[name] = None
    return found


def _step_of(checkpoint: Path) -> int:
    return int(_STEP.fullmatch(checkpoint.name)[1])


def _best_step(checkpoint: Path) -> int:
    """Of the best evaluation that it knows; 0 where there is none, or the file is damaged."""
    try:
        return json.loads((checkpoint / "trainer.json").read_bytes())["best"]["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return 0


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
        model: fingerprint of the model's files, to be kept, too.
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
        self.model: str | None = None
        self.versions = _versions()  # of the code that runs, whatever is installed later on
        # A thread that writes while another trains needs a group of its own. The copies stay for
        # the next save.
        self._group = second_group() if background else None
        self._stager = DefaultStager(_STAGING) if background else None
        self._writing: futures.Future[None] | None = None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, once it is complete."""
        return self.folder / f"step{step:06d}"

    def steps(self) -> list[Path]:
        """Complete checkpoints, newest first. Copies of other names are not the run's: they are
        neither resumed from nor pruned."""
        found = (path for path in self.folder.glob("step*") if _STEP.fullmatch(path.name))
        return sorted(found, key=_step_of, reverse=True)

    def set_aside(self, step: int) -> None:
        """Rank 0: move what this run does not continue out of its way, never delete it.

        A run that starts anew (`step` 0) continues nothing that lies in its folder; a resumed one
        nothing beyond `step`. Left in place, those checkpoints would count as newer than this
        run's own: `latest` would resume from them and `keep_last` would keep them. With them go the
        models that came of them; metrics and later rollouts are copied, as what is resumed may
        have written some of those itself (`rollout.staleness=1`).
        """
        run = self.folder.parent
        clean(run)
        clean(self.folder)
        shared = []
        if step == 0:
            old = [run / name for name in _RUN_FILES]
        else:
            old = [path for path in self.steps() if _step_of(path) > step]
            if old:
                models = ["final", "best"] if _best_step(old[0]) > step else ["final"]
                rollouts = sorted((run / "rollouts").glob("step*.jsonl"))
                shared = [path for path in rollouts if path.name > f"step{step + 1:06d}"]
                shared.append(run / "metrics.jsonl")
                old += [run / name for name in models]
        old = [path for path in old if path.exists()]
        if not old:
            return
        aside = next(path for n in count(1) if not (path := run / f"before{n}").exists())
        for path in (*shared, *old):
            target = aside / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in old:
                path.rename(target)
            elif path.exists():
                shutil.copy2(path, target)
        what = "an earlier run" if step == 0 else f"checkpoints beyond step {step}"
        logger.warning("%s: %s moved aside to %s", run, what, aside)

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
            "updates_per_rollout": actor.config.update_per_rollout,
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

        temporary = broadcast(together(lambda: self._begin(final, needed), failed, group), group)
        try:
            # All positions in one file: the next run may have another number of ranks.
            others = of_all(None if rank() == 0 else position, group)
            own = {"rng": rng} | ({"source": [position, *others[1:]]} if rank() == 0 else {})
            written = together(lambda: _write_part(temporary, tensors, own, group), failed, group)
            files = of_all(written, group)
            together(lambda: self._end(temporary, final, files, state, step), failed, group)
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

    def _end(
        self, temporary: Path, final: Path, files: list[manifest.Files], state: str, step: int
    ) -> None:
        """Rank 0: what only one can write, and the names under which all of it is found."""
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
            "model": self.model,
        }  # fmt: skip
        listed |= manifest.fingerprints(others, temporary)
        manifest.write(temporary, listed, about)
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

    def check(self, which: str, model: str) -> None:
        """What `load` will say of keys that may not change, before a model is there.

        Args:
            model: fingerprint of its files.

        Raises:
            CheckpointError: the run's config has another value of such a key.
        """
        for folder in self._candidates(which)[:1]:
            with suppress(manifest.Damaged):  # `load` goes on to the one before
                self._compare(folder, model)

    def _candidates(self, which: str) -> list[Path]:
        return broadcast(self.steps() if which == "latest" else [Path(which)])

    def _compare(self, folder: Path, model: str | None) -> list[str]:
        if self.config is None:
            return []
        content = manifest.read(folder)
        config = {name: entry for name, entry in content["files"].items() if name == resume.NAME}
        manifest.verify(folder, {"files": config})
        return resume.compare(folder, self.config, model, content["about"])

    def load(self, which: str, actor: Actor, source: Any) -> dict[str, Any] | None:
        """Restore `latest` or the folder `which`.

        With `latest`, a checkpoint that is not what its manifest says is renamed to `damaged-…`,
        and one that does not load is left; both are named, and the one before is tried.

        Returns:
            The saved state, or None where there is nothing to resume (`latest` only).

        Raises:
            CheckpointError: a named folder, or every one there is, cannot be loaded, or the run's
                config has another value of a key that may not change.
            DataError: the data set is another one.
        """
        latest = which == "latest"
        folders = self._candidates(which)
        for folder in folders:
            state, changes = None, []
            reason = damaged = first_reason(damage(folder))
            if damaged is None:
                try:
                    changes = self._compare(folder, self.model)
                    state = self._load(folder, actor, source)
                except RL2Error:
                    raise  # not the checkpoint's fault: the one before would say the same
                except (Exception, CheckpointException) as error:  # may raise anything
                    reason = reason_of(error)
                reason = first_reason(reason)
            if reason is None:
                logger.info("resumed from %s", folder)
                for change in changes:
                    logger.info("%s", change)
                return state
            message = f"trainer.load_ckpt_from={which}: {folder} does not load ({reason})"
            if not latest:
                raise CheckpointError(f"{message}; name another checkpoint, or use latest")
            if damaged is not None:
                message += f"; it is {_set_apart(folder)} now"
            logger.warning("%s; trying the one before", message)
        if folders:
            raise CheckpointError(
                f"trainer.load_ckpt_from=latest: none of {len(folders)} checkpoints under "
                f"{self.folder} loads; move them away to start anew"
            )
        logger.info("trainer.load_ckpt_from=latest: nothing under %s, starting anew", self.folder)
        return None

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
        actor.prepare_scheduler(actor.n_updates, _updates(state, actor.config.update_per_rollout))
        actor.bad_steps = state["bad_steps"]
        own = folder / f"rank{rank()}.pt"
        if own.exists():
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


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; ranks share the work."""
    try:
        content = manifest.read(folder, (".metadata", "trainer.json"))
        for other in range(content["about"]["world_size"]):
            if f"rank{other}.pt" not in content["files"]:
                raise manifest.Damaged(f"rank{other}.pt is missing")
        manifest.verify(folder, content, slice(rank(), None, world_size()))
    except (manifest.Damaged, OSError, KeyError, TypeError) as error:
        return reason_of(error)
    return None


def _set_apart(folder: Path) -> str:
    """Rename a damaged checkpoint, so that it is not tried again (a collective); its new name."""
    name = broadcast(free_name(folder, "damaged-"))
    together(
        lambda: folder.rename(folder.with_name(name)) if rank() == 0 else None,
        lambda reason: CheckpointError(
            f"{folder} is damaged and cannot be renamed to {name} ({reason}); move it away"
        ),
    )
    return name
