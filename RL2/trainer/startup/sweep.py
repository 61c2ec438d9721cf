"""One run of a sweep: what only its own command tells, and a name, so that no two write to the same
folder."""

import re
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from RL2.config.overrides import take_back

_LONGEST = 80  # characters of a run's own part of the name


def settle_run(config: DictConfig, argv: Sequence[str]) -> None:
    """With `--multirun`, take back what presets leave over in this run, and put what the sweep
    varies into `trainer.experiment_name` and `save_dir`.

    argv: the command line, which tells a swept key from one that is set.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return
    take_back(config, list(hydra.overrides.task))
    words = [word for word in argv if "=" in word and not word.startswith("-")]
    given = OverridesParser.create().parse_overrides(words)
    swept = {one.key_or_group for one in given if one.is_sweep_override()}
    name = run_name(list(hydra.overrides.task), swept, hydra.job.num)
    if name is None:
        return
    trainer = config.trainer
    before = trainer.save_dir
    trainer.experiment_name = f"{trainer.experiment_name}-{name}"
    if trainer.save_dir == before:  # it does not follow experiment_name
        OmegaConf.update(config, "trainer.save_dir", f"{before.rstrip('/')}-{name}")


def run_name(overrides: Sequence[str], swept: set[str], number: int) -> str | None:
    """A name such as `lr_1e-4-seed_1`; None if the sweep names its runs itself.

    overrides: the `key=value` pairs of this run. number: the run's number in the sweep.
    """
    if swept & {"trainer.experiment_name", "trainer.save_dir"}:
        return None
    parts = [one.partition("=") for one in overrides]
    text = "-".join(f"{key.rpartition('.')[2]}_{value}" for key, _, value in parts if key in swept)
    name = re.sub(r"[^\w.+-]", "_", text, flags=re.ASCII)[:_LONGEST]
    # What was left out may have told two runs apart.
    return name if name and name == text else f"{name}-{number}".lstrip("-")
