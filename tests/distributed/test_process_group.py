import os

import pytest
import torch.distributed as dist

from RL2.distributed import broadcast, process_group, rank, world_size
from RL2.runtime.errors import TrainingError
from tests.ranks import forking


def sweep(rank_of_this: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank_of_this), WORLD_SIZE="2", LOCAL_RANK=str(rank_of_this), LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    for run in range(4):
        with process_group("cpu") as device:
            assert broadcast(run if rank() == 0 else None) == run and device.type == "cpu"


def test_runs_of_a_sweep_share_the_store_of_one_torchrun():
    """The second run waited for ever on keys that the first had left in it. The store is what
    torchrun gives its ranks, which start faster without it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [forking().Process(target=sweep, args=(rank, store.port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0, 0]


def test_without_torchrun_a_group_of_one_that_leaves_nothing(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    before = dict(os.environ)
    for _ in range(2):
        with process_group("cpu") as device:
            assert (rank(), world_size(), device.type) == (0, 1, "cpu")
    assert not dist.is_initialized()
    assert dict(os.environ) == before
    assert (rank(), world_size()) == (0, 1)


def test_ranks_that_cannot_be_connected_say_so_in_one_line(monkeypatch):
    """As over an interface without an address, or with two ranks on one GPU."""

    def fails(*arguments, **options):
        raise RuntimeError("NCCL error in: x.cpp:9, invalid usage\nLast error:\nDuplicate GPU\n")

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(dist, "init_process_group", fails)
    with pytest.raises(TrainingError) as caught, process_group("cpu"):
        pass
    assert "cannot be connected (NCCL error in: x.cpp:9, invalid usage; Duplicate GPU); " in str(
        caught.value
    )
