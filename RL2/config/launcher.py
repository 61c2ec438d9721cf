"""The variables that give a process its place in a run, set by torchrun or by hand."""

import errno
import os
import socket
import time
from collections.abc import Mapping

from RL2.runtime.errors import ConfigError

# The smallest and the largest value of each.
_NUMBERS = {
    "RANK": (0, None),
    "LOCAL_RANK": (0, None),
    "WORLD_SIZE": (1, None),
    "LOCAL_WORLD_SIZE": (1, None),
    "MASTER_PORT": (1, 65535),
}
_NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # besides RANK
# The number of processes, as mpirun, srun and jsrun set it. Not SLURM_NTASKS, which is also set in
# the script of a job, a single process.
_OTHER_LAUNCHERS = (
    "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE",
    "SLURM_STEP_NUM_TASKS",
)  # fmt: skip
_REACH_TIMEOUT = 10.0  # seconds in which rank 0 must reach itself at its address
_WAY_OUT = "start it with torchrun, which sets all of them, or unset it"


def check_launch_variables(environ: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError if the variables that give a process its place cannot be right.

    It would wait for processes that never start, or be one of several that each train alone. Needs
    no torch; looks up an address and tries a port.
    """
    environ = os.environ if environ is None else environ
    numbers = {name: _number(name, environ[name]) for name in _NUMBERS if name in environ}
    if "RANK" not in environ:
        _check_alone(environ, numbers)
        return
    for name in _NEEDED:
        if not environ.get(name):
            raise ConfigError(f"RANK={environ['RANK']} without {name}: {_WAY_OUT}")
    for name, size, less in (
        ("RANK", "WORLD_SIZE", 1),
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE", 1),
        ("LOCAL_WORLD_SIZE", "WORLD_SIZE", 0),
    ):
        most = numbers.get(size, numbers.get(name, 0) + less) - less
        if numbers.get(name, 0) > most:
            raise ConfigError(
                f"{name}={numbers[name]}: must be at most {most} with {size}={numbers[size]}; "
                "start it with torchrun, which numbers the processes"
            )
    _check_address(environ["MASTER_ADDR"], numbers["MASTER_PORT"], hosts_store(environ))


def hosts_store(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this process hosts the store of all ranks (else torchrun or rank 0 does)."""
    environ = os.environ if environ is None else environ
    return environ["RANK"] == "0" and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def check_gpu(n_gpus: int, environ: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError if this machine has no GPU for the process's LOCAL_RANK."""
    local_rank = (os.environ if environ is None else environ).get("LOCAL_RANK", "0")
    if int(local_rank) >= n_gpus:
        raise ConfigError(
            f"LOCAL_RANK={local_rank}: uses the GPU of that number, but this machine has {n_gpus} "
            f"(CUDA_VISIBLE_DEVICES may hide some); start at most {n_gpus} processes on it "
            f"(--nproc_per_node={n_gpus}), or train with actor.device=cpu"
        )


def _number(name: str, text: str) -> int:
    least, most = _NUMBERS[name]
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if str(number) != text:  # 007, which other programs do not read as 7
        number = -1
    if number < least or most is not None and number > most:
        upto = "on" if most is None else f"to {most}"
        raise ConfigError(
            f"{name}={text}: must be a whole number from {least} {upto}; torchrun sets it, "
            f"otherwise unset it"
        )
    return number


def _check_alone(environ: Mapping[str, str], numbers: dict[str, int]) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if numbers.get(name, 1) > 1:
            raise ConfigError(
                f"{name}={numbers[name]} without RANK: this process would train alone; {_WAY_OUT}"
            )
    # These launchers must start torchrun, once per machine.
    for name in _OTHER_LAUNCHERS:
        if environ.get(name, "1") not in ("", "1"):
            raise ConfigError(
                f"{name}={environ[name]} without RANK: each of these processes would train alone; "
                "have each machine start one torchrun (--nnodes, --node-rank, --master-addr)"
            )


def _check_address(address: str, port: int, hosts: bool) -> None:
    try:
        families = {found[0] for found in socket.getaddrinfo(address, port)}
    except (OSError, UnicodeError) as error:  # the latter for an invalid name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"MASTER_ADDR={address}: no machine of that name is known here ({reason}); "
            "give the name or number of the machine where rank 0 runs"
        ) from error
    if not hosts:
        return
    family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            reason = "in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise ConfigError(
                f"MASTER_PORT={port}: rank 0 cannot listen there ({reason}); choose another port "
                "for all ranks"
            ) from error
        _check_reached(probe, address, port)


def _check_reached(probe: socket.socket, address: str, port: int) -> None:
    """Raise ConfigError if a connection to the address of rank 0 does not reach `probe`, which
    listens at its port: all ranks would wait for a long time."""
    end = time.monotonic() + _REACH_TIMEOUT
    probe.settimeout(_REACH_TIMEOUT / 5)
    while True:  # it may take a moment until the address is reachable
        reason = None
        try:
            with socket.create_connection((address, port), timeout=_REACH_TIMEOUT / 5):
                reason = "another process answers"
                probe.accept()[0].close()
                return
        except OSError as error:
            reason = reason or error.strerror or str(error)
        if time.monotonic() > end:
            break
        time.sleep(_REACH_TIMEOUT / 50)
    raise ConfigError(
        f"MASTER_ADDR={address}: rank 0 listens at port {port}, but is not reached at that address "
        f"({reason}); give the name or number of the machine where rank 0 runs"
    )
