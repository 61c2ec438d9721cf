"""From a command line to a running trainer: compose, check, and only then load anything heavy."""

import logging
import os
import signal
import sys
import time
import traceback
from importlib.metadata import version
from importlib.util import find_spec

import hydra
from omegaconf import DictConfig, OmegaConf
from packaging.version import Version

from RL2.config import (
    ConfigError,
    DataError,
    Interrupted,
    RL2Error,
    apply_fallbacks,
    check_overrides,
    composition_error,
    register_schemas,
    validate,
)
from RL2.config.secrets import redact
from RL2.trainer.stop import follow_launcher
from RL2.trainer.sweep import name_run

logger = logging.getLogger("RL2")

_WAIT_FOR_RANK_0 = 10.0  # seconds; a process takes one to three to get to its checks
# As in pyproject.toml. Long before these, torch.load ran code even with weights_only (below 2.6).
FLOORS = {"torch": "2.13", "transformers": "5.19"}
# What torchrun sets for each process, and the least that it can be.
_LAUNCH_VARIABLES = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
_OPTIONAL = ("flash_attn", "liger_kernel", "peft", "sglang", "triton", "vllm")


def _fail(error: RL2Error) -> None:
    """One line, exit status 1.

    torchrun ends all processes as soon as one has failed, so the others leave the line to rank 0
    and wait for that; where it does not come, the error is theirs alone.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_WAIT_FOR_RANK_0)
    text = redact(str(error))
    if isinstance(error, (ConfigError, DataError)):  # a value or a row may hold anything
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    sys.stderr.write(f"{type(error).__name__}: {text}\n")
    sys.exit(1)


def run(config_name: str) -> None:
    """Run the trainer that `config/<config_name>.yaml` describes, with overrides from argv.

    A bad key or value ends the process with status 1 and one line on stderr, before a process
    group, tokenizer or model exists.
    """
    follow_launcher()  # first of all: whoever it is must be there still
    register_schemas()
    try:
        check_versions()
        check_launch_variables()
        check_overrides(config_name, sys.argv[1:])
    except RL2Error as error:
        _fail(error)

    @hydra.main(version_base="1.3", config_path="config", config_name=config_name)
    def task(config: DictConfig) -> None:
        try:
            name_run(config, sys.argv[1:])
            launch(config)
        except RL2Error as error:
            _fail(error)
        except Exception:
            # hydra would write the command line and a part of the traceback, as they are.
            sys.stderr.write(redact(traceback.format_exc()))
            sys.exit(1)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise what is wrong, do not write it
    try:
        task()
    except Exception as error:  # of yaml files and folders, so anything; `launch` is caught above
        _fail(composition_error(error, config_name))


def check_versions() -> None:
    """ConfigError where torch or transformers is older than what this library was written for."""
    for name, floor in FLOORS.items():
        found = version(name)
        if Version(found) < Version(floor):
            raise ConfigError(
                f"{name}=={found}: must be {floor} or newer; install it (pip install '{name}>="
                f"{floor}')"
            )


def check_launch_variables() -> None:
    """ConfigError where what torchrun tells a process about its place is not a number."""
    for name, least in _LAUNCH_VARIABLES.items():
        text = os.environ.get(name, str(least))
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise ConfigError(
                f"{name}={text}: must be a whole number from {least} on; torchrun sets it, "
                f"otherwise unset it"
            )


def launch(config: DictConfig) -> None:
    """Check a composed config, resolve what is `auto` on this machine, and train."""
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    main_rank = os.environ.get("RANK", "0") == "0"
    if not main_rank:
        logger.setLevel(logging.ERROR)
        # What happens to a rank's own servers and environments is told by no other.
        logging.getLogger("RL2.rollout").setLevel(logging.WARNING)

    import torch  # after the checks: it takes seconds
    import transformers

    from RL2.distributed import process_group
    from RL2.trainer.loop import Trainer
    from RL2.trainer.stop import stop_signals

    available = {name for name in _OPTIONAL if find_spec(name)}
    for line in apply_fallbacks(config, torch.cuda.is_available(), available):
        logger.warning(line)
    transformers.utils.logging.disable_progress_bar()  # one for each of our models, on each rank
    transformers.utils.logging.set_verbosity_error()  # tables; what counts is an error of ours
    OmegaConf.resolve(config)
    threads = config.trainer.num_threads or max(
        1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    )
    torch.set_num_threads(threads)
    with stop_signals() as stop, process_group(config.actor.device) as device:
        trainer = Trainer(config, device, stop)
        try:
            trainer.train()
        except Interrupted as end:
            logger.warning("%s", end)
            sys.exit(128 + (stop.number or signal.SIGTERM))  # as shells have it
        finally:
            trainer.close()
