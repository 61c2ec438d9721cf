"""What a run that goes on may do otherwise than the run that wrote its checkpoint.

A checkpoint holds the config of its run (`config.yaml`). Each key that differs now is one line of
the log. `FIXED` lists the keys that have to stay, and why; every other key takes effect from the
next step on: nothing of it is read from the checkpoint. `NOTES` says what is worth knowing of some.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from RL2.config.flat import ABSENT, as_text, flat
from RL2.config.user_code import CODE_KEYS
from RL2.runtime.errors import CheckpointError
from RL2.runtime.folders import exists
from RL2.runtime.secrets import redact_config
from RL2.trainer.checkpoints import record

NAME = "config.yaml"
PACKAGES = ("rl2", "torch", "transformers")

_BATCHES = "steps, epochs and the learning rate's schedule are counted in batches of that size"
FIXED = {
    "actor.lora.rank": "it is the shape of what was trained",
    "actor.lora.alpha": "adapters count alpha / rank times, so the model would be another one",
    "actor.lora.target_modules": "other layers have the adapters that were trained",
    "train_data.prompts_per_rollout": _BATCHES,
    "data.batch_size": _BATCHES,
    "trainer.seed": "the rows are in its order already, and half of a run would have the other one",
}
"""Keys that may not change, and why. The rows of the data are compared as such
(`RL2.datasets.base`), as they may have moved."""

FIXED_INPUTS = {
    "actor.model_name": "its weights, config.json or code are not those of that run",
    "vocabulary": "the tokenizer gives tokens other numbers than those that were trained",
}
"""Fingerprints (`fingerprints.of_run`) that may not change, and why."""

OTHER_INPUTS = {
    "tokenizer": "its tokenizer makes other tokens of a text, or other ones are special",
    "chat template": "its chat template is another one",
    "end tokens": "its answers end with other tokens",
    "generation config": "its generation_config.json is another one",
    "ref_actor.model_name": "its weights, config.json or code are not those of before, and the KL "
    "is taken to them",
    **dict.fromkeys(
        ("rollout.env_path", *CODE_KEYS),
        "the file, or a module that it imports, is not what it was",
    ),
    "test_data.path": "its rows are not those of before, so scores of both do not compare",
}
"""Fingerprints that are told where they differ. Those that are no key's belong to
actor.model_name."""

_REPLANNED = "the learning rate goes on where the whole schedule of these keys is by now"
NOTES = {
    "actor.lora.seed": "without effect on adapters that are trained already",
    "train_data.path": "its rows have to be the same",
    "data.path": "its rows have to be the same",
    **dict.fromkeys(
        [
            "actor.lr",
            "actor.scheduler",
            "actor.warmup_ratio",
            "actor.update_per_rollout",
            "trainer.n_epochs",
            "trainer.max_steps",
        ],
        _REPLANNED,
    ),
}
_SOURCES = {"rows": "rows of a data set"}
_OF_RESUMING = {"trainer.load_ckpt_from"}  # which nobody needs to be told of
_UNKNOWN = (
    "{} holds no fingerprints of models, tokenizer and sources, so whether those are what they "
    "were is not known"
)


def write(folder: Path, config: DictConfig) -> None:
    """Put a run's resolved config, without secrets, into a folder."""
    (folder / NAME).write_text(yaml.safe_dump(_plain(config), sort_keys=False))


def is_of(checkpoint: Path, run: Path) -> bool:
    """Whether a checkpoint is of the run that has written to a folder: it lies there, or says so.

    Anything else there is of another run, whose steps this one would seem to have done.
    """
    if checkpoint.absolute().parent.parent.resolve() == run.resolve() or not exists(
        checkpoint / NAME
    ):
        return True
    config = yaml.safe_load((checkpoint / NAME).read_text())
    return Path(config["trainer"]["save_dir"]).resolve() == run.resolve()


def compare(
    folder: Path, config: DictConfig, inputs: dict[str, str], about: dict[str, Any]
) -> list[str]:
    """What is otherwise than in the run that wrote the checkpoint `folder`, a line each.

    Args:
        inputs: fingerprints of now, see `fingerprints.of_run`.
        about: what the checkpoint's manifest says of its making.

    Raises:
        CheckpointError: a key that may not change.
    """
    path = folder / NAME
    if not exists(path):
        return [f"{folder.name} holds no config, so what was changed since is not known"]
    before, after = (_flat(tree) for tree in (yaml.safe_load(path.read_text()), _plain(config)))
    source, other_source = (_in_words(tree["trainer.source"]) for tree in (before, after))
    if source != other_source:
        raise CheckpointError(
            f"trainer.load_ckpt_from: {folder.name} does not load here, as it is of a run on "
            f"{source}; to go on from its weights only, give actor.model_name=<its final folder> "
            "and leave out trainer.load_ckpt_from"
        )
    changed = {
        key: (before.get(key, ABSENT), after.get(key, ABSENT))
        for key in [*after, *(key for key in before if key not in after)]
        if before.get(key, ABSENT) != after.get(key, ABSENT) and key not in _OF_RESUMING
    }
    refused = {key: FIXED[key] for key in changed if key in FIXED and ABSENT not in changed[key]}
    known = about.get("inputs", {})
    unknown = [] if "inputs" in about or not inputs else [_UNKNOWN.format(folder.name)]
    other = [name for name in inputs if known.get(name, inputs[name]) != inputs[name]]
    refused |= {_key(name): FIXED_INPUTS[name] for name in other if name in FIXED_INPUTS}
    if refused:
        key, why = next(iter(refused.items()))
        old, new = (as_text(tree.get(key)) for tree in (before, after))
        way_out = f"give {key}={old}" if old != new else "give the files as they were"
        raise CheckpointError(
            f"{key}={new}: {folder.name} does not load with it, it was written with {old} ({why}); "
            f"{way_out}, or leave out trainer.load_ckpt_from to start anew"
        )
    return (
        [
            f"{key}={as_text(new)} from here on, was {as_text(old)}"
            + (f" ({NOTES[key]})" if key in NOTES else "")
            for key, (old, new) in changed.items()
        ]
        + [
            f"{_key(name)}={as_text(after.get(_key(name)))}: {OTHER_INPUTS[name]}, from here on"
            for name in other
        ]
        + _of_versions(about)
        + unknown
    )


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """With the source of its run, which the config of version 0.1 does not name."""
    return {"trainer.source": "rollouts" if "rollout" in tree else "rows"} | dict(flat(tree))


def _in_words(source: str) -> str:
    return "a source of its own" if ":" in source else _SOURCES.get(source, source)


def check_learners(folder: Path, before: Sequence[str], now: Sequence[str]) -> None:
    """CheckpointError where a checkpoint holds other learners than the run has, by their names."""
    if {*before} != {*now}:
        raise CheckpointError(
            f"trainer.load_ckpt_from: {folder.name} does not load here, as it holds "
            f"{', '.join(before)}, and this run trains {', '.join(now)}; to go on from its weights "
            "only, give actor.model_name=<its final folder> and leave out trainer.load_ckpt_from"
        )


def versions() -> dict[str, str | None]:
    """Of the packages that decide what a run computes; None: used without being installed."""
    found = record.versions()
    return {name: found.get(name) for name in PACKAGES}


def _of_versions(about: dict[str, Any]) -> list[str]:
    now, before = versions(), about.get("versions") or {}
    return [
        f"{name} {now[name]} from here on, was {before[name]} (results may differ)"
        for name in PACKAGES
        if name in before and before[name] != now[name]
    ]


def _key(name: str) -> str:
    return name if "." in name else "actor.model_name"


def _plain(config: DictConfig) -> dict[str, Any]:
    return redact_config(OmegaConf.to_container(config, resolve=True, enum_to_str=True))
