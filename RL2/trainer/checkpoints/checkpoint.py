"""Checkpoints that a run continues from, and model folders that transformers loads.

<save_dir>/checkpoints/step000020/   model and optimizer of each learner by its name
                                     (torch.distributed.checkpoint), trainer.json, rank0.pt …
                                     (RNG and data position), config.yaml, and manifest.json (the
                                     learners, and sizes and SHA-256 of all files); with LoRA only
                                     the adapters, as frozen weights come from actor.model_name
<save_dir>/checkpoints/latest        name of the newest complete one
<save_dir>/checkpoints/damaged-…     checkpoints that contradict their manifests
<save_dir>/final, <save_dir>/best    plain `save_pretrained` folders, adapters merged; the adapters
                                     themselves in `adapter`, as peft saves them
<save_dir>/before1 …                 what earlier runs left in the folder and this one does not
                                     continue
<save_dir>/.lock                     held by the run that writes here

A folder is written under a temporary name that begins with a dot, synced to disk, and renamed. So
a name without a dot is always a complete folder.
"""

import logging
from concurrent import futures
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from RL2.distributed import broadcast, rank, second_group, world_size
from RL2.runtime.errors import CheckpointError
from RL2.runtime.event_loop import in_thread
from RL2.runtime.folders import clean, exists
from RL2.trainer.checkpoints import contents, integrity, listing, manifest, resume, writing
from RL2.trainer.checkpoints.aside import set_aside
from RL2.trainer.checkpoints.contents import Learners
from RL2.trainer.checkpoints.integrity import use_on_all_ranks
from RL2.trainer.startup import machine

logger = logging.getLogger(__name__)

_STAGING = StagingOptions(
    use_pinned_memory=torch.cuda.is_available(),
    use_shared_memory=False,
    use_async_staging=False,
    use_non_blocking_copy=False,
)


class Checkpoints:
    """Saves and loads all that a run's next step depends on. Made on every rank (a collective).

    Args:
        save_dir: the run's folder.
        keep_last: how many checkpoints stay; None keeps all.
        config: the run's config, which its checkpoints keep.
        background: whether `save` only copies, and a thread writes.

    Attributes:
        inputs: fingerprints of the run's inputs (`fingerprints.of_run`), kept as well.
        threads, machines: what the run computes with (`startup.machine`), kept as well.
        references: frozen models by name, kept once they are renewed.
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
        self.references: contents.References = {}
        self.versions = resume.versions()  # of the running code, whatever is installed later
        # The thread that writes needs a process group of its own. The memory of the copies is kept
        # for the next save.
        self._group = second_group() if background else None
        self._stager = DefaultStager(_STAGING) if background else None
        self._writing: futures.Future[None] | None = None
        self._resumed: Path | None = None  # the checkpoint that was loaded

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, once it is complete."""
        return listing.of_step(self.folder, step)

    def steps(self) -> list[Path]:
        """Complete checkpoints, newest first, see `listing.complete`."""
        return listing.complete(self.folder)

    def tidy(self) -> None:
        """Rank 0: have `latest` name the newest checkpoint; keep only the newest `keep_last`."""
        listing.tidy(self.folder, self.keep_last)

    def set_aside(self, step: int) -> None:
        """Rank 0: move aside what this run does not continue, see `aside.set_aside`."""
        clean(self.folder.parent)
        clean(self.folder)
        beyond = [path for path in self.steps() if listing.step_of(path) > step]
        own = self._resumed is None or resume.is_of(self._resumed, self.folder.parent)
        set_aside(self.folder.parent, beyond, step if own else 0)

    def save(
        self, step: int, learners: Learners, position: dict[str, Any], state: dict[str, Any]
    ) -> Path:
        """Write one checkpoint; it becomes visible only when all of it is on disk. With
        `background` that is so after `wait`; an earlier save is finished first.

        Args:
            learners: the learners by name.
            position: the source's `state_dict`.
            state: the trainer's state, as plain JSON values.

        Raises:
            CheckpointError: see `writing.write`.
        """
        self.wait()
        tensors, numbers = contents.collect(learners, self.references)
        if self._stager is not None:
            tensors = self._stager.stage(tensors)
        device = next(iter(learners.values())).device
        content = writing.Content(
            tensors,
            contents.rng_state(device),
            position,
            state
            | {
                "step": step,
                "learners": numbers,
                "renewed": sorted(tensors.keys() - learners.keys()),
            },
            self.config,
            self._about(step, [*learners]),
        )
        write = partial(writing.write, self.path(step), content, self.tidy, self._group)
        if self._stager is None:
            write()
        else:
            self._writing = in_thread(write, "checkpoint")
        return self.path(step)

    def _about(self, step: int, learners: list[str]) -> dict[str, Any]:
        return {
            "step": step, "learners": learners, "world_size": world_size(),
            "versions": self.versions, "inputs": self.inputs,
            "threads": self.threads, "machines": self.machines,
        }  # fmt: skip

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise now. Ranks may differ for a moment."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def wait(self) -> None:
        """Wait until the last `save` is on disk; raises as `save` does (a collective)."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self, timeout: float = 30.0) -> None:
        """Give a save in progress some seconds to finish; logs an error if it fails."""
        if self._writing is not None:
            futures.wait([self._writing], timeout)
            if self.failed:
                logger.error("%s", self._writing.exception())

    def check(self, which: str) -> None:
        """Check `inputs` and the keys that may not change as `load` will, before a model loads.
        (Only `load` knows the learners.)

        Raises:
            CheckpointError: one of them differs, or the checkpoint cannot be read.
        """
        key = f"trainer.load_ckpt_from={which}"
        for folder in self._candidates(which)[:1]:
            with suppress(manifest.Damaged):  # `load` tries the one before
                use_on_all_ranks(lambda folder=folder: self._compare(folder), key, folder)

    def about(self, which: str | None) -> dict[str, Any]:
        """What the manifest of the checkpoint that `load` will take says about its run; empty if
        none looks whole (a collective)."""
        found: dict[str, Any] = {}
        for folder in [] if which is None else self._candidates(which):
            with suppress(manifest.Damaged, OSError):  # `load` reports it
                found = manifest.read(folder)["about"]
                break
        return broadcast(found)

    def _candidates(self, which: str) -> list[Path]:
        def listed() -> list[Path]:
            return self.steps() if which == "latest" and rank() == 0 else [Path(which)]

        return broadcast(use_on_all_ranks(listed, f"trainer.load_ckpt_from={which}", self.folder))

    def _compare(self, folder: Path, learners: Learners | None = None) -> list[str]:
        content = manifest.read(folder)
        config = {name: entry for name, entry in content["files"].items() if name == resume.NAME}
        manifest.verify(folder, {"files": config})
        about = content["about"]
        lines = []
        if self.config is not None:
            lines = resume.compare(folder, self.config, self.inputs, about)
            lines += machine.changes(about, self.threads, self.machines)
        if learners is not None:
            saved = about.get("learners", contents.ACTOR_ALONE)
            resume.check_learners(folder, saved, tuple(learners))
        return lines

    def load(self, which: str, learners: Learners, source: Any) -> dict[str, Any] | None:
        """Restore `latest` or the folder `which`.

        With `latest`, the newest good checkpoint is loaded. Newer ones that contradict their
        manifests are logged, and renamed to `damaged-…` only then.

        Returns:
            The saved state, or None if there is nothing to resume (`latest` only).

        Raises:
            CheckpointError: the named folder, or every one that exists, is damaged; the newest one
                that is not damaged cannot be read or loaded; or the run's config changes a key that
                may not change. Nothing is renamed then.
            DataError: the data set is not the same.
        """
        key, bad = f"trainer.load_ckpt_from={which}", []
        for folder in self._candidates(which):
            if (reason := integrity.damage_on_all_ranks(folder, key)) is not None:
                if which != "latest":
                    raise CheckpointError(
                        f"{key}: {folder} does not load ({reason}); name another checkpoint, or "
                        "use latest"
                    )
                bad.append((folder, reason))
                continue

            def restore(folder: Path = folder) -> tuple[list[str], dict[str, Any]]:
                changes = self._compare(folder, learners)
                return changes, self._restore(folder, learners, source)

            changes, state = use_on_all_ranks(restore, key, folder)
            for damaged, reason in bad:
                logger.warning(
                    "%s: %s does not load (%s); it is now %s; trying the one before",
                    key, damaged, reason, listing.rename_damaged(damaged),
                )  # fmt: skip
            self._resumed = folder
            logger.info("resumed from %s", folder)
            for change in changes:
                logger.info("%s", change)
            return state
        lost = broadcast(listing.lost(self.folder, bad) if rank() == 0 else None)
        if lost is not None:
            raise CheckpointError(f"{key}: {lost}; move all of {self.folder} away to start anew")
        logger.info("%s: nothing under %s, starting anew", key, self.folder)
        return None

    def _restore(self, folder: Path, learners: Learners, source: Any) -> dict[str, Any]:
        state = contents.restore(folder, learners, self.references)
        own = folder / f"rank{rank()}.pt"
        if exists(own):
            generators = torch.load(own, weights_only=True)["rng"]
            contents.set_rng_state(generators, next(iter(learners.values())).device)
        # Each rank gets the positions of all ranks, as their number may have changed.
        source.load_state_dict(torch.load(folder / "rank0.pt", weights_only=True)["source"])
        return state
