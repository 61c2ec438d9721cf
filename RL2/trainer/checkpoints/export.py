"""Model folders that transformers loads: `final` and `best`."""

import copy
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy.ctypeslib  # noqa: F401 - safetensors' save_file; else imported at the end of a run
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PretrainedConfig

from RL2.distributed import broadcast, rank
from RL2.distributed.agreement import on_all_ranks
from RL2.models.loading import model_fingerprint
from RL2.models.lora import has_adapters, merged, save_adapters
from RL2.runtime.errors import CheckpointError, ConfigError, first_line
from RL2.runtime.folders import TEMPORARY, cannot_write, exists, publish
from RL2.trainer.checkpoints.contents import n_bytes
from RL2.workers import Actor

logger = logging.getLogger(__name__)

_PREFIX = "model."  # HeadedModel's name for the transformers model inside


# What decides which evaluation is the best, and whether more of it is better (1) or less (-1).
BEST = {"test/score": 1, "test/loss": -1}


def value_of(metrics: Mapping[str, Any]) -> tuple[str, float] | None:
    """What decides how good an evaluation is, and its value; None if there is nothing of it, or
    no number."""
    name = next((name for name in BEST if name in metrics), None)
    return (name, metrics[name]) if name and math.isfinite(metrics[name]) else None


def existing_best(best: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The best evaluation that a resumed run may keep: none if `folder` does not hold that model,
    as the next model would have to beat it to be saved."""
    if not best.get("step"):  # step 0 is the initial model, which is not saved
        return best
    if not exists(folder):
        lost = "is not there"
    elif best.get("model") not in (None, fingerprint_of(folder)):  # None: by an older version
        lost = "is now another model"
    else:
        return best
    logger.warning(
        "%s %s, which held the best model so far (%s %g at step %d); the next evaluation "
        "counts as the best", folder, lost, *value_of(best), best["step"],
    )  # fmt: skip
    return {}


def fingerprint_of(folder: Path) -> str:
    """The fingerprint of a saved model; empty if there is none that can be read."""
    try:
        return model_fingerprint(str(folder))
    except Exception:  # broken files may raise anything
        return ""


class FilesInMemory:
    """What `thing.save_pretrained` writes now, to be written later: a tokenizer copies some files
    from where it was loaded, and those may have changed by then.

    Raises ConfigError if it cannot be saved, which a run would otherwise find out at its end.
    """

    def __init__(self, thing: Any, origin: str):
        try:
            with TemporaryDirectory() as folder:
                thing.save_pretrained(folder)
                found = [path for path in Path(folder).rglob("*") if path.is_file()]
                self._files = {path.relative_to(folder): path.read_bytes() for path in found}
        except Exception as error:  # odd values in its files may raise anything
            raise ConfigError(
                f"{origin}: {type(thing).__name__} cannot be saved as it was loaded "
                f"({first_line(error)}); correct its files, or copy or download the model again"
            ) from error

    def save_pretrained(self, folder: Path) -> None:
        """Write the files."""
        for name, data in self._files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def files_beside_weights(actor: Actor, tokenizer: Any) -> FilesInMemory | None:
    """Rank 0: the tokenizer's files; also checks that the model's config files can be saved."""
    if rank() != 0:
        return None
    origin = f"actor.model_name={actor.config.model_name}"
    for name in ("config", "generation_config"):  # a model that writes no text may lack the latter
        if (part := getattr(actor.hf_model, name, None)) is not None:
            FilesInMemory(part, origin)
    return FilesInMemory(tokenizer, origin)


def save_model(actor: Actor, tokenizer: Any, folder: Path, dtype: str) -> None:
    """Write the whole model, adapters merged, as `from_pretrained` of its head's `auto_class` loads
    it (a collective). The adapters themselves go to `<folder>/adapter`.

    tokenizer: the tokenizer, or its `FilesInMemory`.
    dtype: `trainer.save_dtype`; with `auto` every tensor keeps that of the checkpoint it came from.

    Raises:
        CheckpointError: on every rank, if it cannot be written. What was there before stays.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(actor.model, options=options)
    needed = broadcast(n_bytes(state))  # only rank 0 has it
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}")

    def write() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        model = actor.hf_model
        # Gathered, a tied head is a tensor of its own, and would be stored with the embedding.
        everything, once = (
            {name for name, _ in model.named_parameters(remove_duplicate=remove)}
            for remove in (False, True)
        )
        tensors = {
            name: tensor
            for name, tensor in ((key.removeprefix(_PREFIX), x) for key, x in state.items())
            if name not in everything - once
        }
        weights = dict(merged(model, tensors.items()))
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                weights[name] = tensor.to(actor.dtypes.saved(name, dtype))
        model.save_pretrained(temporary, state_dict=weights)
        _save_config(model.config, actor.dtypes.saved("", dtype), temporary)
        tokenizer.save_pretrained(temporary)
        with torch.random.fork_rng(devices=[]):  # `best` is written during a run
            auto_class = actor.model.head.auto_class
            _check(temporary, weights, auto_class, actor.config.trust_remote_code)
        if has_adapters(model):
            save_adapters(model, tensors, temporary / "adapter")
        publish(temporary, folder)

    def failed(reason: str) -> CheckpointError:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        return CheckpointError(cannot_write(folder.parent, folder, reason, needed))

    on_all_ranks(write if rank() == 0 else lambda: None, failed)


def _check(
    folder: Path, weights: dict[str, torch.Tensor], auto_class: Any, trust_remote_code: bool
) -> None:
    """RuntimeError unless transformers loads from the folder what was to be saved: if it does not
    find a name, it fills the weight with noise and goes on."""
    model, found = auto_class.from_pretrained(
        folder, dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, found[kind])):
            raise RuntimeError(f"transformers does not load it as it was, {kind}: {names[0]}")
    for name, tensor in model.state_dict().items():
        meant = weights.get(name)
        if meant is not None and not torch.equal(
            tensor.nan_to_num(), meant.to(tensor.dtype).nan_to_num()
        ):
            raise RuntimeError(f"transformers loads other values for {name} than were saved")


def _save_config(config: PretrainedConfig, dtype: torch.dtype, folder: Path) -> None:
    """Write config.json with the dtype of the saved weights: save_pretrained writes that of the
    weights in memory."""
    config = copy.deepcopy(config)
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        if part is not None:
            part.dtype = dtype
    config.save_pretrained(folder)
