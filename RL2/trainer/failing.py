"""How a failing process ends: with status 1, and with one line if that says enough."""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from RL2.runtime.errors import ConfigError, DataError, RL2Error, TrainingError
from RL2.runtime.launcher_report import tell_launcher
from RL2.runtime.leaving import leave_at_once
from RL2.runtime.secrets import for_terminal, readable, redact

_WAIT_FOR_FIRST = 10.0  # seconds; a process takes one to three to get to its checks
# Files that call exit() to end a run.
_OWN_EXITS = (__file__, str(Path(__file__).with_name("main.py")))


@contextmanager
def report_errors(early: bool) -> Iterator[None]:
    """If the body raises, say why and end the process.

    early: the ranks have not met yet, and those of other machines would wait for this one.
    """
    try:
        yield
    except RL2Error as error:
        fail(error, early=early)
    except SystemExit as error:
        if (problem := unexpected_exit(error)) is None:
            raise
        fail(problem, early=early)
    except KeyboardInterrupt:  # a second one, while the first was handled
        leave_at_once("what was not in a checkpoint yet is lost")
    except BaseException as error:
        # hydra would write the command line and a part of the traceback, with secrets.
        text = for_terminal(traceback.format_exc())
        sys.stderr.write(text)
        tell_launcher(text)
        if early:
            _tell_other_machines(error)
        sys.exit(1)


def fail(error: RL2Error, own: bool = False, early: bool = False) -> NoReturn:
    """Write one line, and exit with status 1.

    torchrun ends all processes of a machine as soon as one has failed. So the others let the first
    one write the line, and write it themselves only if it does not.

    own: the error is of this rank alone, which writes it at once.
    early: the ranks have not met yet, and those of other machines would wait for this one.
    """
    first = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    if not first and not own:
        if early:
            _tell_other_machines(error)
        time.sleep(_WAIT_FOR_FIRST)
    text = redact(str(error))  # before anything is escaped
    if isinstance(error, (ConfigError, DataError)):  # a value or a row may hold anything
        text = readable(text)
    line = f"{type(error).__name__}: {for_terminal(text)}"
    sys.stderr.write(f"{line}\n")
    tell_launcher(line)
    if first and early:
        _tell_other_machines(error)
    sys.exit(1)


def _tell_other_machines(error: BaseException) -> None:
    n_ranks = os.environ.get("WORLD_SIZE", "1")
    of_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == n_ranks
    if n_ranks == "1" or of_one_machine and "TORCHELASTIC_RUN_ID" in os.environ:
        return
    from RL2.distributed.rendezvous import give_up  # torch takes seconds

    give_up(redact(f"{type(error).__name__}: {error}"))


def unexpected_exit(error: SystemExit) -> TrainingError | None:
    """The error for an exit() in user code; None for one of RL2's own.

    In user code, such as a model's, it must not look like the normal end of a run.
    """
    places = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    # exit() itself is Python's own code.
    place, line = [one for one in places if not one[0].startswith("<frozen")][-1]
    if place in _OWN_EXITS:
        return None
    return TrainingError(
        f"exit({'' if error.code is None else repr(error.code)}) was called at {place}:{line} "
        "during the run; have it raise an error instead"
    )
