"""From a command line to a running trainer: compose, check, and only then load anything heavy."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

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
from RL2.runtime.errors import ConfigError, DataError, Interrupted, RL2Error, TrainingError
from RL2.runtime.last_words import tell_launcher
from RL2.runtime.leaving import end_in_time, leave_at_once, one_line_for_ctrl_c
from RL2.runtime.secrets import for_terminal, readable, redact
from RL2.runtime.stop import follow_launcher
from RL2.runtime.streams import hurry_streams, keep_streams
from RL2.trainer.registries import registry_of
from RL2.trainer.startup.help import asks_for_help, help_text
from RL2.trainer.startup.sweep import name_run

if TYPE_CHECKING:
    from RL2.distributed.same_start import Facts

logger = logging.getLogger("RL2")

_WAIT_FOR_FIRST = 10.0  # seconds; a process takes one to three to get to its checks
# As in pyproject.toml. Long before these, torch.load ran code even with weights_only (below 2.6).
FLOORS = {"torch": "2.13", "transformers": "5.19"}
_OPTIONAL = ("flash_attn", "liger_kernel", "peft", "triton", *SERVERS)


def _fail(error: RL2Error, own: bool = False, early: bool = False) -> NoReturn:
    """One line, exit status 1.

    torchrun ends all processes of a machine as soon as one has failed, so the others leave the line
    to its first and wait for that; where it does not come, the error is theirs alone. own: it is.
    early: the ranks have not met yet, and those of other machines would wait for this one.
    """
    first = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    if not first and not own:
        if early:
            _tell_other_machines(error)
        time.sleep(_WAIT_FOR_FIRST)
    text = redact(str(error))  # whole, before anything is escaped
    if isinstance(error, (ConfigError, DataError)):  # a value or a row may hold anything
        text = readable(text)
    line = f"{type(error).__name__}: {for_terminal(text)}"
    sys.stderr.write(f"{line}\n")
    tell_launcher(line)
    if first and early:
        _tell_other_machines(error)
    sys.exit(1)


def _tell_other_machines(error: Exception) -> None:
    n_ranks = os.environ.get("WORLD_SIZE", "1")
    of_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == n_ranks
    if n_ranks == "1" or of_one_machine and "TORCHELASTIC_RUN_ID" in os.environ:
        return
    from RL2.distributed.rendezvous import give_up  # torch takes seconds

    give_up(redact(f"{type(error).__name__}: {error}"))


def run(config_name: str) -> None:
    """Run the trainer that `config/<config_name>.yaml` describes, with overrides from argv.

    A bad key or value ends the process with status 1 and one line on stderr, before a process
    group, tokenizer or model exists. `--help` explains the keys and does nothing else.
    """
    one_line_for_ctrl_c()
    keep_streams()
    if asks_for_help(sys.argv[1:]):
        sys.stdout.write(help_text(config_name, sys.argv[1:]))
        return
    if "--version" in sys.argv[1:]:  # hydra would say its own
        sys.stdout.write(f"RL2 {__version__}\n")
        return
    follow_launcher()  # early: whoever it is must be there still
    register_schemas()
    try:
        check_launch_variables()
    except RL2Error as error:
        _fail(error, own=True)
    try:
        check_working_directory()
        check_versions()
        sys.argv[1:] = check_overrides(config_name, expand_argv(sys.argv[1:]), registry_of)
    except RL2Error as error:
        _fail(error, early=True)

    @hydra.main(version_base="1.3", config_path="config", config_name=config_name)
    def task(config: DictConfig) -> None:
        facts = None
        try:
            name_run(config, sys.argv[1:])
            facts = prepare(config)
            train(config, facts)
        except RL2Error as error:
            _fail(error, early=facts is None)
        except SystemExit as error:
            if (problem := exit_of_others(error)) is None:
                raise
            _fail(problem, early=facts is None)
        except KeyboardInterrupt:  # a second one, while the first was heeded
            leave_at_once("what was not in a checkpoint yet is lost")
        except BaseException as error:
            # hydra would write the command line and a part of the traceback, as they are.
            text = for_terminal(traceback.format_exc())
            sys.stderr.write(text)
            tell_launcher(text)
            if facts is None:
                _tell_other_machines(error)
            sys.exit(1)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise what is wrong, do not write it
    with end_in_time():
        try:
            task()
        except Exception as error:  # of yaml files and folders, so anything; the rest is above
            _fail(composition_error(error, config_name), early=True)


def exit_of_others(error: SystemExit) -> TrainingError | None:
    """What to say of an exit() that is not called here; None of one that is.

    In a stranger's code, such as a model's, it must not look like the end of a run, nor be without
    a word.
    """
    places = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    # exit() itself is Python's own code.
    place, line = [one for one in places if not one[0].startswith("<frozen")][-1]
    if place == __file__:
        return None
    return TrainingError(
        f"exit({'' if error.code is None else repr(error.code)}) was called at {place}:{line} in "
        "the midst of the run; have it raise an error instead"
    )


def check_versions() -> None:
    """ConfigError where torch or transformers is older than what this library was written for."""
    for name, floor in FLOORS.items():
        found = version(name)
        if Version(found) < Version(floor):
            raise ConfigError(
                f"{name}=={found}: must be {floor} or newer; install it (pip install '{name}>="
                f"{floor}')"
            )


def launch(config: DictConfig) -> None:
    """Check a composed config, resolve what is `auto` on this machine, and train."""
    train(config, prepare(config))


def prepare(config: DictConfig) -> Facts:
    """Check a composed config and resolve what is `auto` on this machine, in place; returns what
    has to be the same on all ranks."""
    expand_paths(config)
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    main_rank = os.environ.get("RANK", "0") == "0"
    if not main_rank:
        logger.setLevel(logging.ERROR)
        # What happens to a rank's own servers and environments is told by no other.
        logging.getLogger("RL2.rollout").setLevel(logging.WARNING)

    import torch  # after the other checks: it takes seconds
    import transformers

    from RL2.trainer.startup.started_with import started_with

    if torch.version.cuda and config.actor.device == "auto" and not torch.cuda.is_available():
        logger.info("actor.device=auto: no GPU found, though torch is built for one; using the CPU")
    check_names(config, registry_of)
    available = {name for name in _OPTIONAL if find_spec(name)}
    for line in apply_fallbacks(config, torch.cuda.is_available(), available):
        logger.warning(line)
    if config.actor.device == "cuda":
        check_gpu(torch.cuda.device_count())
    transformers.utils.logging.disable_progress_bar()  # one for each of our models, on each rank
    transformers.utils.logging.set_verbosity_error()  # tables; what counts is an error of ours
    facts = started_with(config)
    OmegaConf.resolve(config)
    return facts


def train(config: DictConfig, facts: Facts) -> None:
    """Train as `prepare` has left the config, with all ranks that have the same facts."""
    import torch

    from RL2.distributed import process_group
    from RL2.runtime.children import children_end, runs_strangers
    from RL2.runtime.stop import StopRequest, stop_signals
    from RL2.trainer.loop import Trainer

    threads = config.trainer.num_threads or max(
        1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    )
    torch.set_num_threads(threads)
    group = process_group(config.actor.device, config.trainer.rank_timeout, facts)
    with children_end(runs_strangers(config)), ExitStack() as heard, group as device:
        stop = StopRequest()
        stop.call(hurry_streams)  # a terminal that Ctrl-S holds must not cost the checkpoint
        trainer = Trainer(config, device, stop)
        # Only now: who waits for other ranks, models or servers has nothing to save, and a signal
        # ends it at once. Until the group is left: what comes twice must not break that off.
        heard.enter_context(stop_signals(stop))
        try:
            trainer.train()
        except Interrupted as end:
            logger.warning("%s", end)
            sys.exit(128 + (stop.number or signal.SIGTERM))  # as shells have it
        finally:
            trainer.close()
