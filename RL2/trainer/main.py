"""From a command line to a running trainer: compose, check, and only then load anything heavy."""

import logging
import os
import signal
import sys
import time
from importlib.util import find_spec

import hydra
from omegaconf import DictConfig, OmegaConf

from RL2.config import (
    Interrupted,
    RL2Error,
    apply_fallbacks,
    check_overrides,
    register_schemas,
    validate,
)
from RL2.trainer.stop import follow_launcher

logger = logging.getLogger("RL2")

_WAIT_FOR_RANK_0 = 10.0  # seconds; a process takes one to three to get to its checks
_OPTIONAL = ("flash_attn", "liger_kernel", "peft", "sglang", "triton", "vllm")


def _fail(error: RL2Error) -> None:
    """One line, exit status 1.

    torchrun ends all processes as soon as one has failed, so the others leave the line to rank 0
    and wait for that; where it does not come, the error is theirs alone.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_WAIT_FOR_RANK_0)
    sys.stderr.write(f"{type(error).__name__}: {error}\n")
    sys.exit(1)


def run(config_name: str) -> None:
    """Run the trainer that `config/<config_name>.yaml` describes, with overrides from argv.

    A bad key or value ends the process with status 1 and one line on stderr, before a process
    group, tokenizer or model exists.
    """
    follow_launcher()  # first of all: whoever it is must be there still
    register_schemas()
    try:
        check_overrides(config_name, sys.argv[1:])
    except RL2Error as error:
        _fail(error)

    @hydra.main(version_base="1.3", config_path="config", config_name=config_name)
    def task(config: DictConfig) -> None:
        try:
            launch(config)
        except RL2Error as error:
            _fail(error)

    task()


def launch(config: DictConfig) -> None:
    """Check a composed config, resolve what is `auto` on this machine, and train."""
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    main_rank = os.environ.get("RANK", "0") == "0"
    if not main_rank:
        logger.setLevel(logging.ERROR)

    import torch  # after the checks: it takes seconds
    import transformers

    from RL2.distributed import process_group
    from RL2.trainer.loop import Trainer
    from RL2.trainer.stop import stop_signals

    available = {name for name in _OPTIONAL if find_spec(name)}
    for line in apply_fallbacks(config, torch.cuda.is_available(), available):
        logger.warning(line)
    transformers.utils.logging.disable_progress_bar()  # one for each of our models, on each rank
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
