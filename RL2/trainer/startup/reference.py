"""docs/config.md, docs/algorithms.md, names.yaml and the comments of the yaml files, made from
schema, registries and presets.

    python -m RL2.trainer.startup.reference

rewrites them in a checkout. A test compares them with the schema.
"""

import pkgutil
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import RL2
from RL2.config.presets import Preset, preset_names, read_preset
from RL2.config.schema import SCHEMAS, Key, all_keys, keys_of
from RL2.trainer.registries import REGISTRIES, registry_of
from RL2.trainer.startup.keys import (
    FOLDER,
    NAMES,
    Names,
    defaults,
    explanation,
    header,
    type_in_words,
)

PAGE = Path(RL2.__file__).parents[1] / "docs" / "config.md"
ALGORITHMS = PAGE.with_name("algorithms.md")
_WIDTH = 100

_INTRO = """\
# Configuration keys

Every key of every trainer. Set one with `key=value` on the command line. `--help` shows the same
for one trainer, and `--help WORD` the keys that mention WORD. `--cfg job` after a command prints
the config that the command results in.

`???` must be set. `${key}` follows another key until it is set. `${for_loss:name,value,…}` takes
the value after the name in `actor.loss.name`, else that after `others`, or null; `${twice:number}`
doubles. null means off, or that the library decides, as the explanation says.

A yaml file of your own begins with `defaults: [spo, _self_]` and holds the keys that differ.

This page is written by `python -m RL2.trainer.startup.reference`.
"""

_ALGORITHMS = """\
# Algorithms

`algorithm=<name>` on the command line of `ppo`, or of the trainer that the table names, sets the
loss, the advantage estimator and other keys of one algorithm. They go over those of the trainer,
and under those of the command line: `algorithm=gspo actor.loss.clip_high=1e-3` changes one of them,
and `algorithm=grpo,gspo,cispo --multirun` compares three. `algorithm=[grpo,icepop]` applies both,
the second one over the first: a loss or an estimator that replaces that of an earlier one, also on
the command line, leaves the options of that one behind, so `algorithm=[dapo,gspo]` has the clips of
GSPO. Learning rates, batch sizes and lengths are left to you.
`python -m RL2.trainer.algorithms` prints this list, with `--json` for programs.

A is the advantage, ρ = exp(logps − old_logps) the ratio of a token, r the reward of a sample, G the
samples of a prompt, n the tokens of a sample, sg(x) is x without gradient.

This page is written by `python -m RL2.trainer.startup.reference` from the files in
`RL2/trainer/config/algorithm`, which can be copied for algorithms of your own.
"""


def registered_names() -> Names:
    """The names of all registries, each with the first words of its entry's docstring."""
    return {
        key: {name: _meaning(entry) for name, entry in registry_of(key).items()}
        for key in REGISTRIES
    }


def _meaning(entry: Any) -> str:
    """The first words of an entry's docstring. entry: the object, or its `module:name`."""
    entry = pkgutil.resolve_name(entry) if isinstance(entry, str) else entry
    said = getattr(entry, "help", "") or (entry and entry.__doc__) or ""
    said = said.partition("\n")[0]
    said = re.split(r"\. |: | \(", said)[0].rstrip(".,;")
    return said[:1].lower() + said[1:] if said[1:2].islower() else said


def page(names: Names) -> str:
    """The text of docs/config.md."""
    by_trainer = {trainer: defaults(trainer) for trainer in SCHEMAS}
    keys = all_keys()
    lines = [_INTRO, "## Trainers", ""]
    for trainer in SCHEMAS:
        said = header(FOLDER / f"{trainer}.yaml").partition(": ")[2]
        lines.append(f"- `{trainer}`: {' '.join(said.split())}")
    for group in [name for name in keys if "." not in name]:
        lines += ["", f"## {group}", "", _sentence(keys[group].help), ""]
        lines += ["| key | type and range | default | meaning |", "| --- | --- | --- | --- |"]
        for name, key in sorted_by_group(group, keys):
            if key.is_group:
                continue
            found = {
                trainer: values.get(name)
                for trainer, values in by_trainer.items()
                if group in keys_of(SCHEMAS[trainer])
            }
            cells = (
                f"`{name}`",
                _values(name, key, names),
                _default(found),
                explanation(name, key, names),
            )
            lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def algorithms_page() -> str:
    """The text of docs/algorithms.md."""
    head = ["| `algorithm=` | what it is | equation | overrides | what differs from the paper |"]
    lines = [_ALGORITHMS, *head, "| --- | --- | --- | --- | --- |"]
    lines += [_row(_cells(read_preset(name))) for name in preset_names()]
    return "\n".join(lines) + "\n"


def _cells(one: Preset) -> tuple[str, ...]:
    name = f"`{one.name}`" + f" (of `{one.trainer}`)" * (one.trainer != "ppo")
    keys = " ".join(f"`{override}`" for override in one.overrides)
    what = _sentence(one.what) + f" {one.paper}"
    return name, what, one.equation, keys or "none: the trainer's defaults", one.differs


def sorted_by_group(group: str, keys: dict[str, Key]) -> list[tuple[str, Key]]:
    """The keys of a group: its own before those of the groups in it."""
    inside = [(name, key) for name, key in keys.items() if name.startswith(f"{group}.")]
    return sorted(inside, key=lambda one: one[0].count(".") > 1)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _values(name: str, key: Key, names: Names) -> str:
    said = type_in_words(name, key, names)
    return said if key.within is None else f"{said}; {re.sub('^(be|lie) ', '', key.within.must)}"


def _default(found: dict[str, str | None]) -> str:
    """The default of the first trainer that has the key, and those of others where they differ."""
    first = next(value for value in found.values() if value is not None)
    others = [
        f"not in {name}" if value is None else f"{name}: `{value}`"
        for name, value in found.items()
        if value != first
    ]
    return "; ".join([f"`{first}`", *others])


def commented(text: str, keys: dict[str, Key], names: Names) -> str:
    """The text of a yaml file, with the explanation of each key above it."""
    body, mark, hydra = text.partition("\nhydra:")
    lines, parents = [], []
    for line in body.splitlines():
        code = line.strip()
        depth = (len(line) - len(line.lstrip())) // 2
        if depth and code.startswith("#"):
            continue  # written again below
        name, colon, _ = code.partition(":")
        if colon and name.isidentifier():
            parents = [*parents[:depth], name]
            key = keys.get(".".join(parents))
            if key is not None and not key.is_group:
                indent = "  " * depth
                lines += textwrap.wrap(
                    explanation(".".join(parents), key, names), _WIDTH,
                    initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ",
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
        lines.append(line)
    return "\n".join(lines) + "\n" * (not mark) + ("\n" if mark else "") + mark + hydra


def written() -> dict[Path, str]:
    """Each file that is made from the schema, with the text that it should have."""
    names = registered_names()
    head = "# The names that keys take, with meanings. Written by RL2.trainer.startup.reference.\n"
    found = {
        PAGE: page(names),
        ALGORITHMS: algorithms_page(),
        NAMES: head + OmegaConf.to_yaml(OmegaConf.create(names)),
    }
    for trainer, schema in SCHEMAS.items():
        path = FOLDER / f"{trainer}.yaml"
        found[path] = commented(path.read_text(encoding="utf-8"), keys_of(schema), names)
    return found


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
