"""Presets: `algorithm=<name>` on the command line, a yaml file each.

`RL2/trainer/config/algorithm/<name>.yaml` holds the keys of one algorithm, which go over those of
the trainer's yaml file and under those of the command line. The comment at its top describes it:

    # @package _global_
    # what: the ratio of a sequence is clipped as a whole
    # paper: Zheng et al. 2025, "Group Sequence Policy Optimization", arXiv:2507.18071
    # equation: -min(A s, A clip(s, 1 - 3e-4, 1 + 4e-4)), s = exp(mean of logps - old_logps)
    # differs: nothing

A line that continues one begins with `#   `. `# trainer: dpo` names another trainer than ppo. Only
scale-free keys belong in it: no learning rate, no lengths, no batch sizes.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

import RL2
from RL2.config.flat import as_text, flat
from RL2.runtime.errors import ConfigError

GROUP = "algorithm"
FOLDER = Path(RL2.__file__).parent / "trainer" / "config" / GROUP
CHOICES = {"adv.estimator": "adv.", "actor.loss.name": "actor.loss."}
"""Keys that choose a function, and how the keys of its options begin."""
_PARTS = ("what", "paper", "equation", "differs")


@dataclass(frozen=True)
class Preset:
    """An algorithm by the name of its yaml file: what its comment says, and its keys.

    Attributes:
        differs: what is not as in the paper, and why.
        overrides: `key=value` of each key.
        trainer: the trainer that it is for.
    """

    name: str
    what: str
    paper: str
    equation: str
    differs: str
    overrides: tuple[str, ...]
    trainer: str = "ppo"


def preset_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def read_preset(name: str) -> Preset:
    """The preset of a file that exists."""
    path = FOLDER / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    said = dict(_parts(text))
    if missing := [part for part in _PARTS if part not in said]:
        raise ValueError(f"{path.name}: its comment does not say {', '.join(missing)}")
    tree = OmegaConf.to_container(OmegaConf.load(path))
    overrides = tuple(f"{key}={as_text(value)}" for key, value in flat(tree))
    return Preset(name, overrides=overrides, **said)


def left_over(names: Iterable[str], given: Mapping[str, str]) -> list[str]:
    """The options that presets set for an estimator or loss which a later one, or the command line,
    replaces by another, and that nothing sets anew: they are not meant for that one. And the clips
    that they set, if the command line sets `actor.clip`.

    names: the presets, in the order in which they apply. given: the keys of the command line.
    """
    layers = [dict(one.split("=", 1) for one in read_preset(name).overrides) for name in names]
    found = []
    for choice, start in CHOICES.items():
        chosen, options, dropped = None, set(), set()
        for layer in [*layers, given]:
            new = layer.get(choice, chosen)
            if chosen not in (None, new):
                dropped |= options
            own = {key for key in layer if key.startswith(start) and key != choice}
            chosen, options, dropped = new, options | own, dropped - own
        found += sorted(dropped)
    if "actor.clip" in given:  # it sets both sides, which a preset may have set
        both = ("actor.loss.clip_high", "actor.loss.clip_low")
        found += [
            key for key in both if key not in (*given, *found) and any(key in x for x in layers)
        ]
    return found


def _parts(text: str) -> Iterator[tuple[str, str]]:
    name, words = "", []
    for line in text.splitlines():
        if not line.startswith("#") or line.startswith("# @"):
            continue
        part, colon, rest = line.removeprefix("# ").partition(": ")
        if line.startswith("#   "):
            words.append(line[1:].strip())
        elif colon and part in (*_PARTS, "trainer"):
            if name:
                yield name, " ".join(words)
            name, words = part, [rest.strip()]
        else:
            raise ValueError(f"{line}: not one of {', '.join(_PARTS)}, trainer")
    yield name, " ".join(words)


def check_preset(name: str | None, trainer: str) -> None:
    """ConfigError if no preset has this name, or the one that has is for another trainer."""
    names = preset_names()
    if name is None:
        raise ConfigError(f"{GROUP}=null: names no algorithm; leave it out")
    if name not in names:
        close = difflib.get_close_matches(str(name).replace("-", "_"), names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        own = [one for one in names if read_preset(one).trainer == trainer]
        use = f"use {', '.join(own)}" if own else f"{trainer} has none; leave it out"
        raise ConfigError(
            f"{GROUP}={name}: unknown algorithm; {hint}{use} (python -m RL2.trainer.algorithms "
            "says what they are)"
        )
    if (needed := read_preset(name).trainer) != trainer:
        raise ConfigError(
            f"{GROUP}={name}: is for the trainer {needed}, not for {trainer}; run "
            f"`-m RL2.trainer.{needed} {GROUP}={name}`"
        )
