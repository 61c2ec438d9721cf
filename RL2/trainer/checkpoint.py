"""Checkpoints that a run continues from, and model folders that transformers loads.

<save_dir>/checkpoints/step000020/   model and optimizer (torch.distributed.checkpoint),
                                     trainer.json, rank0.pt … (RNG and data position)
<save_dir>/checkpoints/latest        name of the newest complete one
                                     where adapters are trained (LoRA) those alone: what is frozen
                                     comes from actor.model_name
<save_dir>/final, <save_dir>/best    plain `save_pretrained` folders, adapters merged; the adapters
                                     themselves in `adapter`, as peft saves them
<save_dir>/before1 …                 what earlier runs left in the folder and this one does not
                                     continue
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from RL2.config import CheckpointError, RL2Error
from RL2.distributed import broadcast, rank, sum_over_ranks
from RL2.workers import Actor
from RL2.workers.lora import has_adapters, merged, save_adapters

logger = logging.getLogger(__name__)

_PREFIX = "model."  # TokenStatsModel's name for the transformers model inside
_RUN_FILES = ("checkpoints", "best", "final", "rollouts", "metrics.jsonl")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, final: Path) -> None:
    """Make a finished folder appear under its name: durable first, then one rename."""
    for path in temporary.rglob("*"):
        _fsync(path)
    _fsync(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _fsync(final.parent)


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _trained(actor: Actor, state: dict[str, Any]) -> dict[str, Any]:
    """A model's state without its frozen parameters."""
    parameters = actor.model.named_parameters(remove_duplicate=False)  # a tied head, too
    frozen = {name for name, parameter in parameters if not parameter.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


class Checkpoints:
    """Saves and loads everything that decides a run's next step.

    Args:
        save_dir: the run's folder.
        keep_last: how many checkpoints stay; None keeps all.
    """

    def __init__(self, save_dir: str, keep_last: int | None = None):
        self.folder = Path(save_dir) / "checkpoints"
        self.keep_last = keep_last

    def steps(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        return sorted(self.folder.glob("step[0-9]*"), reverse=True)

    def set_aside(self, step: int) -> None:
        """Rank 0: move what this run does not continue out of its way, never delete it.

        A run that starts anew (`step` 0) continues nothing that lies in its folder; a resumed one
        nothing beyond `step`. Left in place, those checkpoints would count as newer than this
        run's own: `latest` would resume from them and `keep_last` would keep them.
        """
        run = self.folder.parent
        if step == 0:
            old = [run / name for name in _RUN_FILES]
        else:
            old = [path for path in self.steps() if path.name > f"step{step:06d}"]
        old = [path for path in old if path.exists()]
        if not old:
            return
        number = 1 + sum(1 for _ in run.glob("before[0-9]*"))
        aside = run / f"before{number}"
        for path in old:
            target = aside / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        what = "an earlier run" if step == 0 else f"checkpoints beyond step {step}"
        logger.warning("%s: %s moved aside to %s", run, what, aside)

    def save(self, step: int, actor: Actor, source: Any, state: dict[str, Any]) -> Path:
        """Write one checkpoint; it becomes visible only when all of it is on disk."""
        final = self.folder / f"step{step:06d}"
        temporary = self.folder / f".writing-step{step:06d}"
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        # get_state_dict, not optimizer.state_dict(): DCP drops AdamW's moments of the latter
        model, optimizer = get_state_dict(actor.model, actor.optimizer)
        model = _trained(actor, model)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=temporary)
        # One file a rank: a plain value under one key would be stored once for all ranks.
        torch.save(
            {"rng": _rng_state(actor.device), "source": source.state_dict()},
            temporary / f"rank{rank()}.pt",
        )
        dist.barrier()
        if rank() == 0:
            state = state | {
                "step": step,
                "scheduler": actor.scheduler.state_dict(),
                "bad_steps": actor.bad_steps,
            }
            (temporary / "trainer.json").write_text(json.dumps(state))
            _publish(temporary, final)
            pointer = self.folder / ".latest"
            pointer.write_text(final.name)
            _fsync(pointer)
            pointer.replace(self.folder / "latest")
            for old in self.steps()[self.keep_last :] if self.keep_last else []:
                shutil.rmtree(old)
        dist.barrier()
        return final

    def load(self, which: str, actor: Actor, source: Any) -> dict[str, Any] | None:
        """Restore `latest` or the folder `which`.

        With `latest`, a checkpoint that does not load is named and the one before it is tried.

        Returns:
            The saved state, or None where there is nothing to resume (`latest` only).

        Raises:
            CheckpointError: a named folder, or every one there is, cannot be loaded.
            DataError: the data set is another one.
        """
        latest = which == "latest"
        folders = broadcast(self.steps() if latest else [Path(which).expanduser()])
        for folder in folders:
            try:
                failed, problem = 0, None
                state = self._load(folder, actor, source)
            except RL2Error:
                raise  # not the checkpoint's fault: the one before would say the same
            except (Exception, CheckpointException) as error:  # damaged files raise anything
                failed, problem = 1, error
            if not sum_over_ranks(torch.tensor(failed)):
                logger.info("resumed from %s", folder)
                return state
            reason = str(problem).strip().splitlines()[-1:] or ["failed on another rank"]
            message = f"trainer.load_ckpt_from={which}: {folder} does not load ({reason[0]})"
            if not latest:
                raise CheckpointError(f"{message}; name another checkpoint, or use latest")
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
        actor.scheduler.load_state_dict(state["scheduler"])
        actor.bad_steps = state["bad_steps"]
        own = folder / f"rank{rank()}.pt"
        if own.exists():
            rng = torch.load(own, weights_only=True)["rng"]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and actor.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], actor.device)
        # The position in the data is one and the same on all ranks, also on ranks that are new.
        source.load_state_dict(torch.load(folder / "rank0.pt", weights_only=True)["source"])
        return state


def save_model(actor: Actor, tokenizer: Any, folder: Path) -> None:
    """Write the whole model where `AutoModelForCausalLM.from_pretrained` finds it, adapters merged
    (collective). The adapters themselves go to `<folder>/adapter`."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(actor.model, options=options)
    if rank() == 0:
        temporary = folder.with_name(f".writing-{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        model = actor.hf_model
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
        weights = {name: tensor.to(actor.dtype) for name, tensor in merged(model, tensors.items())}
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        if has_adapters(model):
            save_adapters(model, tensors, temporary / "adapter")
        _publish(temporary, folder)
    dist.barrier()
