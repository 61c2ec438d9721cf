"""Threads and machines, on which the last bits of numbers depend."""

import os

import pytest
import torch

from RL2.trainer.startup import machine
from RL2.trainer.startup.machine import changes, this_machine, use_threads
from tests.ranks import run_on_ranks
from tests.trainer.support import lasting, same_weights, train, weights, write_files, write_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("asked", "about", "expected"),
    [
        (None, {}, 2),
        (3, {}, 3),
        (None, {"threads": 1, "world_size": 1}, 1),
        (3, {"threads": 1, "world_size": 1}, 3),  # what somebody has asked for
        (None, {"threads": 1, "world_size": 2}, 2),  # other bits in any case
        (None, {"world_size": 1}, 2),  # a checkpoint that does not say it
    ],
)
def test_threads_of_a_run(asked, about, expected, caplog):
    torch.set_num_threads(2)
    caplog.set_level("INFO", logger="RL2")
    assert use_threads(asked, about) == torch.get_num_threads() == expected
    said = ["trainer.num_threads=1 as in the checkpoint, for the same bits; this machine would "]
    assert [line[: len(said[0])] for line in caplog.messages] == said * (expected == 1)


def _threads_of_rank():
    torch.set_num_threads(3 - torch.distributed.get_rank())
    try:
        return use_threads(None, {}), torch.get_num_threads()
    finally:
        torch.set_num_threads(1)  # for the other tests of this process


def test_all_ranks_have_the_same_number():
    """Copies of one parameter would get gradients that are clipped by norms of other last bits."""
    assert run_on_ranks(2, _threads_of_rank) == [(2, 2), (2, 2)]


def _machines_of_ranks():
    machine.this_machine = lambda device: {"CPU": f"kind {torch.distributed.get_rank()}"}
    try:
        return machine.all_machines(CPU)
    finally:
        machine.this_machine = this_machine


def test_machines_of_all_ranks():
    both = [{"CPU": "kind 0"}, {"CPU": "kind 1"}]
    assert run_on_ranks(2, _machines_of_ranks) == [both, both]
    assert machine.all_machines(CPU) == [this_machine(CPU)]


def test_why_the_last_bits_may_differ(monkeypatch):
    own = this_machine(CPU)
    about = {"threads": 2, "world_size": 1, "machines": [own]}
    assert changes(about, 2, [own]) == changes({"world_size": 1}, 2, [own]) == []
    assert changes(about | {"world_size": 2}, 1, [own]) == []  # as README says
    assert changes(about, 1, [own]) == ["from here on the last bits may differ: threads 1, was 2"]
    other = own | {"CPU": "another", "ATEN_CPU_CAPABILITY": "default"}
    assert changes(about, 2, [other]) == [
        f"from here on the last bits may differ: CPU another, was {own['CPU']}, "
        "ATEN_CPU_CAPABILITY default, was none"
    ]


def test_a_run_goes_on_with_the_threads_of_its_checkpoint(tmp_path, monkeypatch, caplog):
    """On another number of cores the last bits were others."""
    caplog.set_level("INFO", logger="RL2")
    files = write_files(tmp_path)
    write_model(files / "model", width=640)  # matrices that threads share
    common = {"trainer__num_threads": "null", "trainer__load_ckpt_from": "latest"}
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(1))
    rows = train(files, "sft", tmp_path / "whole", trainer__max_steps=3, **common)
    train(files, "sft", tmp_path / "run", trainer__max_steps=1, **common)
    caplog.clear()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(3))
    again = train(files, "sft", tmp_path / "run", trainer__max_steps=3, **common)
    assert [lasting(row) for row in again] == [lasting(row) for row in rows]
    assert same_weights(*(weights(tmp_path / name / "final") for name in ("run", "whole")))
    assert torch.get_num_threads() == 1
    said = [line for line in caplog.messages if "num_threads" in line]
    assert [line[:40] for line in said] == ["trainer.num_threads=1 as in the checkpoint"[:40]]
