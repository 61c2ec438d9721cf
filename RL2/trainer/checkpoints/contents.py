"""What a checkpoint holds of each learner, by name, and of each rank's random generators.

    {<name>: {"model": ..., "optimizer": ...}}       the tensors, as torch.distributed.checkpoint
    {<name>: {"model": ...}}                         of a reference that was renewed
    trainer.json: {"learners": {<name>: ...}, ...}   numbers of each learner, and of the trainer

A learner's frozen parameters are in no checkpoint: they come from its model_name. Version 0.1 had
only the actor, without its name.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from RL2.workers import Learner, Reference

TRAINER = "trainer.json"
ACTOR_ALONE = ("actor",)
"""The learners of a checkpoint of version 0.1."""

Learners = Mapping[str, Learner]
References = Mapping[str, Reference]
Generators = dict[str, torch.Tensor]


def collect(
    learners: Learners, references: References | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of learners and renewed references, and the numbers of learners, by names."""
    tensors, numbers = {}, {}
    for name, learner in learners.items():
        # get_state_dict, not optimizer.state_dict(): DCP drops AdamW's moments of the latter
        model, optimizer = get_state_dict(learner.model, learner.optimizer)
        tensors[name] = {"model": _trained(learner, model), "optimizer": optimizer}
        numbers[name] = {
            "updates": learner.scheduler.last_epoch,
            "updates_per_rollout": learner.updates_per_rollout,
            "bad_steps": learner.bad_steps,
        }
    for name, reference in (references or {}).items():
        if reference.renewed:
            tensors[name] = {"model": get_model_state_dict(reference.model)}
    return tensors, numbers


def restore(
    folder: Path, learners: Learners, references: References | None = None
) -> dict[str, Any]:
    """Restore learners and references to what `collect` returned; returns the trainer's state (a
    collective)."""
    state = json.loads((folder / TRAINER).read_text())
    named = "learners" in state
    numbers = state.pop("learners") if named else {ACTOR_ALONE[0]: state}
    found = {
        name: get_state_dict(learner.model, learner.optimizer) for name, learner in learners.items()
    }
    tensors = {
        name: {"model": _trained(learners[name], model), "optimizer": optimizer}
        for name, (model, optimizer) in found.items()
    }
    dcp.load(tensors if named else tensors[ACTOR_ALONE[0]], checkpoint_id=folder)
    for name, learner in learners.items():
        set_state_dict(
            learner.model,
            learner.optimizer,
            model_state_dict=found[name][0] | tensors[name]["model"],
            optim_state_dict=tensors[name]["optimizer"],
        )
        updates = _updates(numbers[name], learner.updates_per_rollout)
        learner.prepare_scheduler(learner.n_updates, updates)
        learner.bad_steps = numbers[name]["bad_steps"]
    renewed = state.pop("renewed", ())
    for name, reference in (references or {}).items():
        if name in renewed:
            _restore(folder, name, reference)
    return state


def _restore(folder: Path, name: str, reference: Reference) -> None:
    reference.load()
    state = get_model_state_dict(reference.model)
    dcp.load({name: {"model": state}}, checkpoint_id=folder)
    set_model_state_dict(reference.model, state)
    reference.renewed = True
    reference.offload()


def _trained(learner: Learner, state: dict[str, Any]) -> dict[str, Any]:
    """A model's state without its frozen parameters."""
    parameters = learner.model.named_parameters(remove_duplicate=False)  # a tied head, too
    frozen = {name for name, parameter in parameters if not parameter.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def _updates(numbers: dict[str, Any], per_rollout: int) -> int:
    """How many updates were made, counted with `per_rollout` of them on each rollout."""
    if "scheduler" in numbers:  # version 0.1
        return numbers["scheduler"]["last_epoch"]
    return numbers["updates"] * per_rollout // numbers["updates_per_rollout"]


def rng_state(device: torch.device) -> Generators:
    """The state of this rank's generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Generators, device: torch.device) -> None:
    """Set this rank's generators to a state from `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def n_bytes(state: Any) -> int:
    """The bytes of this rank's part of the tensors in nested dicts and lists."""
    if isinstance(state, DTensor):
        state = state.to_local()
    if isinstance(state, torch.Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state
    return sum(map(n_bytes, values)) if isinstance(state, (dict, list, tuple)) else 0
