"""What a resumed run may change against the run that wrote its checkpoint.

A checkpoint holds the config of its run (`config.yaml`). Each key that differs now is one line of
the log, unless it only follows another one, as `critic.scheduler` follows `actor.scheduler`.
`FIXED` lists the keys that may not change, and why. Every other key takes effect from the next step
on: its old value is not used. `NOTES` has remarks on some keys.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from RL2.config.flat import ABSENT, as_text, flat
from RL2.config.schema import Key, keys_of, schema_of
from RL2.config.user_code import CODE_KEYS
from RL2.runtime.errors import CheckpointError
from RL2.runtime.folders import exists
from RL2.runtime.secrets import redact_config
from RL2.trainer.checkpoints import record

NAME = "config.yaml"
PACKAGES = ("rl2", "torch", "transformers")

_BATCHES = "steps, epochs and the learning rate's schedule are counted in batches of that size"
FIXED = {
    **{
        f"{name}.lora.{key}": why
        for name in ("actor", "critic")
        for key, why in {
            "rank": "it is the shape of what was trained",
            "alpha": "adapters are scaled by alpha / rank, so the model would change",
            "target_modules": "other layers have the adapters that were trained",
        }.items()
    },
    "train_data.prompts_per_rollout": _BATCHES,
    "data.batch_size": _BATCHES,
    "data.test_ratio": "it decides which rows are trained on",
    "trainer.seed": "it decides the order of the rows, which cannot change during a run",
}
"""Keys that may not change, and why. The rows of the data are compared by content
(`RL2.datasets.base`), as the files may have moved."""

_OTHER_TESTS = "its rows have changed, so scores do not compare with earlier ones"
FIXED_INPUTS = {
    "actor.model_name": "its weights, config.json or code have changed",
    "critic.model_name": "its weights, config.json or code have changed",
    "vocabulary": "the tokenizer gives tokens other numbers than those that were trained",
}
"""Fingerprints (`fingerprints.of_run`) that may not change, and why."""

OTHER_INPUTS = {
    "tokenizer": "its tokenizer splits text in another way, or has other special tokens",
    "chat template": "its chat template has changed",
    "end tokens": "its answers end with other tokens",
    "generation config": "its generation_config.json has changed",
    "ref_actor.model_name": "its weights, config.json or code have changed, and the KL is measured "
    "from them",
    "teacher.model_name": "its weights, config.json or code have changed, and it teaches other "
    "things",
    **dict.fromkeys(
        ("rollout.env_path", *CODE_KEYS),
        "the file, or a module that it imports, is not what it was",
    ),
    "test_data.path": _OTHER_TESTS,
    "data.test_path": _OTHER_TESTS,
}
"""Fingerprints whose changes are logged. Those whose names are not keys belong to
actor.model_name."""

_REPLANNED = "the learning rate continues at this step of the new schedule"
NOTES = {
    "actor.lora.seed": "without effect on adapters that are trained already",
    "critic.lora.seed": "without effect on adapters that are trained already",
    "train_data.path": "its rows must be the same",
    "data.path": "its rows must be the same",
    "ref_actor.renew_every": "a renewed reference stays as it is in the checkpoint until then",
    **dict.fromkeys(
        [
            "actor.lr",
            "critic.lr",
            "critic.scheduler",
            "critic.warmup_ratio",
            "critic.decay_ratio",
            "critic.min_lr_ratio",
            "critic.update_per_rollout",
            "critic.epochs_per_rollout",
            "actor.scheduler",
            "actor.warmup_ratio",
            "actor.decay_ratio",
            "actor.min_lr_ratio",
            "actor.update_per_rollout",
            "actor.epochs_per_rollout",
            "trainer.n_epochs",
            "trainer.max_steps",
        ],
        _REPLANNED,
    ),
}
_SOURCES = {"rows": "rows of a data set"}
_NOT_LOGGED = {"trainer.load_ckpt_from"}  # not worth a line
_UNKNOWN = (
    "{} holds no fingerprints of models, tokenizer and sources, so it is not known whether those "
    "have changed"
)


def write(folder: Path, config: DictConfig) -> None:
    """Put a run's resolved config, without secrets, into a folder."""
    (folder / NAME).write_text(yaml.safe_dump(_plain(config), sort_keys=False))


def is_of(checkpoint: Path, run: Path) -> bool:
    """Whether a checkpoint is of the run of a folder: it is in that folder, or its config names it.

    Otherwise the folder holds another run, whose steps this one would seem to have done.
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
    """What differs from the run that wrote the checkpoint `folder`, one line each.

    Args:
        inputs: the present fingerprints, see `fingerprints.of_run`.
        about: what the checkpoint's manifest says about its run.

    Raises:
        CheckpointError: a key that may not change has changed.
    """
    path = folder / NAME
    if not exists(path):
        return [f"{folder.name} holds no config, so it is not known what has changed"]
    trees = yaml.safe_load(path.read_text()), _plain(config)
    before, after = map(_flat, trees)
    source, other_source = (_in_words(tree["trainer.source"]) for tree in (before, after))
    if source != other_source:
        raise CheckpointError(
            f"trainer.load_ckpt_from: {folder.name} does not load here, as its run was on "
            f"{source}; to go on from its weights only, give actor.model_name=<its final folder> "
            "and leave out trainer.load_ckpt_from"
        )
    changed = {
        key: (before.get(key, ABSENT), after.get(key, ABSENT))
        for key in [*after, *(key for key in before if key not in after)]
        if before.get(key, ABSENT) != after.get(key, ABSENT) and key not in _NOT_LOGGED
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
    known_keys, trees = keys_of(schema_of(config)), [*map(OmegaConf.create, trees)]
    follow = {key for key in changed if _follows(key, known_keys, trees)}
    return (
        [
            f"{key}={as_text(new)} from here on, was {as_text(old)}"
            + (f" ({NOTES[key]})" if key in NOTES else "")
            for key, (old, new) in changed.items()
            if key not in follow
        ]
        + [
            f"{_key(name)}={as_text(after.get(_key(name)))}: {OTHER_INPUTS[name]}, from here on"
            for name in other
        ]
        + _version_changes(about)
        + unknown
    )


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """A flat config with its source, which the config of version 0.1 does not name."""
    return {"trainer.source": "rollouts" if "rollout" in tree else "rows"} | dict(flat(tree))


def _follows(key: str, known: Mapping[str, Key], configs: Sequence[DictConfig]) -> bool:
    """Whether a key has in all configs the value that its default takes from other keys."""
    default = known[key].default if key in known else None
    if "${" not in str(default):
        return False
    group, _, name = key.rpartition(".")
    try:
        nodes = [OmegaConf.select(config, group) for config in configs]
        followed = [OmegaConf.create({name: default}, parent=node)[name] for node in nodes]
        return [node[name] for node in nodes] == followed
    except OmegaConfBaseException:  # an older version's, without the other key
        return False


def _in_words(source: str) -> str:
    return "a source of its own" if ":" in source else _SOURCES.get(source, source)


def check_learners(folder: Path, before: Sequence[str], now: Sequence[str]) -> None:
    """CheckpointError if a checkpoint holds other learners than the run has, by their names."""
    if {*before} != {*now}:
        raise CheckpointError(
            f"trainer.load_ckpt_from: {folder.name} does not load here, as it holds "
            f"{', '.join(before)}, and this run trains {', '.join(now)}; to go on from its weights "
            "only, give actor.model_name=<its final folder> and leave out trainer.load_ckpt_from"
        )


def versions() -> dict[str, str | None]:
    """The versions of packages that decide what a run computes; None if not installed."""
    found = record.versions()
    return {name: found.get(name) for name in PACKAGES}


def _version_changes(about: dict[str, Any]) -> list[str]:
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
