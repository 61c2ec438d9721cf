"""What the last bits of a run's results depend on besides its config: threads, and the machine.

Each thread adds up a part of a long sum, so the number of threads decides the order of additions.
It is the same on all ranks, as copies of a parameter would drift apart otherwise, and checkpoints
keep it.
"""

import logging
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from RL2.distributed import world_size
from RL2.distributed.agreement import of_all
from RL2.ops.token_stats import has_compiler
from RL2.trainer.startup.started_with import VARIABLES

logger = logging.getLogger(__name__)

Machine = dict[str, str]


def use_threads(asked: int | None, about: Mapping[str, Any]) -> int:
    """Set the same number of threads on all ranks (a collective); returns that number.

    asked: `trainer.num_threads`.
    about: what the resumed checkpoint's manifest says about its run. Its number of threads is kept
        if the number of ranks is the same.
    """
    own = min(of_all(asked or torch.get_num_threads()))
    saved = about.get("threads") if about.get("world_size") == world_size() else None
    threads = own if asked is not None or not saved else saved
    if threads != own:
        logger.info(
            "trainer.num_threads=%d as in the checkpoint, for the same bits; this machine would "
            "get %d, which trainer.num_threads=%d gives it", threads, own, own,
        )  # fmt: skip
    torch.set_num_threads(threads)
    return threads


def this_machine(device: torch.device) -> Machine:
    """What this rank computes with."""
    found = {
        "CPU": f"{_cpu()} ({torch.backends.cpu.get_cpu_capability()})",
        "C++ compiler": "found" if has_compiler() else "none",  # decides on the kernels
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    return found | ({"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def all_machines(device: torch.device) -> list[Machine]:
    """The machines of all ranks, each kind once (a collective). Warns if there are several."""
    kinds = [dict(one) for one in sorted({tuple(m.items()) for m in of_all(this_machine(device))})]
    if len(kinds) > 1:
        logger.warning(
            "the ranks run on machines of %d kinds (%s), so the last bits of results depend on "
            "which rank computes what", len(kinds), _differences(kinds[0], kinds[1]),
        )  # fmt: skip
    return kinds


def changes(about: Mapping[str, Any], threads: int, machines: Sequence[Machine]) -> list[str]:
    """A line on why the last bits may differ from those of the run that wrote a checkpoint; empty
    if there is no reason. (With another number of ranks they differ in any case.)

    about: what the checkpoint's manifest says about its run.
    threads, machines: those of this run.
    """
    if about.get("world_size") != world_size() or not about.get("machines"):
        return []
    reasons = []
    if threads != about["threads"]:
        reasons.append(f"threads {threads}, was {about['threads']}")
    new = [machine for machine in machines if machine not in about["machines"]]
    if new:
        reasons.append(_differences(about["machines"][0], new[0]))
    return [f"from here on the last bits may differ: {', '.join(reasons)}"] if reasons else []


def _differences(one: Machine, other: Machine) -> str:
    return ", ".join(
        f"{name} {other.get(name, 'none')}, was {one.get(name, 'none')}"
        for name in one | other
        if one.get(name) != other.get(name)
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
