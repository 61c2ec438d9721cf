"""From a command line to a running trainer: compose, check, and only then load anything heavy."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig, OmegaConf
from packaging.version import Version

from RL2 import __version__
from RL2.config import (
    apply_fallbacks,
    check_names,
    check_overrides,
    composition_error,
    expand_argv,
    expand_paths,
    register_schemas,
    validate,
)
from RL2.config.engines import SERVERS
from RL2.config.launcher import check_gpu, check_launch_variables
from RL2.config.paths import check_working_directory
from RL2.config.user_code import runs_user_code
from RL2.runtime.errors import ConfigError, Interrupted, RL2Error
from RL2.runtime.leaving import end_in_time, one_line_for_ctrl_c
from RL2.runtime.stop import follow_launcher
from RL2.runtime.streams import hurry_streams, keep_streams
from RL2.trainer.failing import fail, report_errors
from RL2.trainer.registries import registry_of
from RL2.trainer.startup.help import asks_for_help, help_text
from RL2.trainer.startup.sweep import settle_run

if TYPE_CHECKING:
    from RL2.distributed.same_start import Facts

logger = logging.getLogger("RL2")

# As in pyproject.toml, which a test compares. The package's metadata cannot be used: with
# PYTHONPATH there is none, and an editable install keeps that of its first day. (Below 2.6,
# torch.load runs code even with weights_only.)
FLOORS = {"torch": "2.13", "transformers": "5.19"}
# Each rank warns about its own servers and environments, which no other rank knows.
_WARN_ON_EACH_RANK = ("engines", "environments", "rollout")
_OPTIONAL = ("flash_attn", "liger_kernel", "peft", "triton", *SERVERS)


def run(config_name: str) -> None:
    """Run the trainer that `config/<config_name>.yaml` describes, with overrides from argv.

    A bad key or value ends the process with status 1 and one line on stderr, before a process
    group, tokenizer or model exists. `--help` explains the keys and does nothing else.
    """
    gc.disable()  # of what imports make it would find nothing, and that takes a second
    one_line_for_ctrl_c()
    keep_streams()
    if asks_for_help(sys.argv[1:]):
        sys.stdout.write(help_text(config_name, sys.argv[1:]))
        return
    if "--version" in sys.argv[1:]:  # hydra would print its own version
        sys.stdout.write(f"RL2 {__version__}\n")
        return
    follow_launcher()  # early, while the launcher is still there
    register_schemas()
    try:
        check_launch_variables()
    except RL2Error as error:
        fail(error, own=True)
    try:
        check_working_directory()
        check_versions()
        sys.argv[1:] = check_overrides(config_name, expand_argv(sys.argv[1:]), registry_of)
    except RL2Error as error:
        fail(error, early=True)

    @hydra.main(version_base="1.3", config_path="config", config_name=config_name)
    def task(config: DictConfig) -> None:
        with report_errors(early=True):
            settle_run(config, sys.argv[1:])
            facts = prepare(config)
        with report_errors(early=False):
            train(config, facts)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise errors instead of printing them
    with end_in_time():
        try:
            task()
        except Exception as error:  # yaml files and folders may raise anything
            fail(composition_error(error, config_name), early=True)


def check_versions() -> None:
    """ConfigError if torch or transformers is older than RL2 needs."""
    for name, floor in FLOORS.items():
        found = version(name)
        if Version(found) < Version(floor):
            raise ConfigError(
                f"{name}=={found}: must be {floor} or newer; install it (pip install '{name}>="
                f"{floor}')"
            )


def launch(config: DictConfig) -> None:
    """Check a composed config, resolve its `auto` values on this machine, and train."""
    train(config, prepare(config))


def prepare(config: DictConfig) -> Facts:
    """Check a composed config and resolve its `auto` values on this machine, in place; returns
    what must be the same on all ranks."""
    expand_paths(config)
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    if os.environ.get("RANK", "0") != "0":
        logger.setLevel(logging.ERROR)
        for package in _WARN_ON_EACH_RANK:
            logging.getLogger(f"RL2.{package}").setLevel(logging.WARNING)

    import torch  # after the other checks: it takes seconds
    import transformers

    from RL2.trainer.sinks.registry import check_trackers
    from RL2.trainer.startup.started_with import started_with

    if torch.version.cuda and config.actor.device == "auto" and not torch.cuda.is_available():
        logger.info("actor.device=auto: no GPU found, though torch is built for one; using the CPU")
    check_names(config, registry_of)
    if os.environ.get("RANK", "0") == "0":  # only rank 0 has trackers
        check_trackers(config)
    available = {name for name in _OPTIONAL if find_spec(name)}
    for line in apply_fallbacks(config, torch.cuda.is_available(), available):
        logger.warning(line)
    if config.actor.device == "cuda":
        check_gpu(torch.cuda.device_count())
    transformers.utils.logging.disable_progress_bar()  # one per model and rank
    transformers.utils.logging.set_verbosity_error()  # tables; RL2 raises its own errors
    facts = started_with(config)
    OmegaConf.resolve(config)
    return facts


def train(config: DictConfig, facts: Facts) -> None:
    """Train with the config and facts of `prepare`; all ranks must have the same facts."""
    import torch

    from RL2.distributed import process_group
    from RL2.runtime.children import children_end
    from RL2.runtime.stop import StopRequest, stop_signals
    from RL2.trainer.loop import Trainer

    if not gc.isenabled():  # see `run`; what is imported stays
        gc.freeze()
        gc.enable()
    threads = config.trainer.num_threads or max(
        1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    )
    torch.set_num_threads(threads)
    group = process_group(config.actor.device, config.trainer.rank_timeout, facts)
    with children_end(runs_user_code(config)), ExitStack() as handlers, group as device:
        stop = StopRequest()
        stop.call(hurry_streams)  # a terminal paused by Ctrl-S must not block the checkpoint
        trainer = Trainer(config, device, stop)
        # Only now: before this there is nothing to save, and a signal may end the process at once.
        # Until the group is left, which a second signal must not interrupt.
        handlers.enter_context(stop_signals(stop))
        try:
            trainer.train()
        except Interrupted as end:
            logger.warning("%s", end)
            sys.exit(128 + (stop.number or signal.SIGTERM))  # the convention of shells
        finally:
            trainer.close()
