"""NaN and Inf on one rank: all ranks skip the update together, and it is as if the batch had never
been there."""

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor

from RL2.algorithms import resolve_loss
from RL2.distributed import rank
from RL2.runtime.errors import TrainingError
from RL2.trainer.checkpoints.checkpoint import Checkpoints
from RL2.trainer.checkpoints.integrity import damage
from RL2.workers import Actor
from tests.faults.support import LONG, Run
from tests.ranks import run_on_ranks
from tests.trainer.support import rows_of, train, write_files
from tests.workers.test_actor import actor_config, make_batch, make_model

NAN, INF = float("nan"), float("inf")
LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear", "seed": 0}
SPREADS = {
    "fsdp2": (2, {}),
    "ddp2": (2, {"ddp_size": 2}),
    "tp2": (2, {"tp_size": 2}),
    "sp2": (2, {"sp_size": 2}),
    "lora-fsdp2": (2, {"lora": LORA}),
}
MORE = {
    "fsdp4": (4, {}),
    "ddp2-fsdp2": (4, {"ddp_size": 2}),
    "ddp4": (4, {"ddp_size": 4}),
    "tp2-ddp2": (4, {"tp_size": 2, "ddp_size": 2}),
    "tp2-fsdp2": (4, {"tp_size": 2}),
    "tp2-sp2": (4, {"tp_size": 2, "sp_size": 2}),
    "sp2-ddp2": (4, {"sp_size": 2, "ddp_size": 2}),
    "lora-tp2": (2, {"lora": LORA, "tp_size": 2}),
}


@dataclass(frozen=True)
class Plant:
    """
    Attributes:
        where: "loss" of a token, "activation" (a number of the gradient that flows back through a
            layer), "gradient" (a number of a parameter's, as it was reduced), or a field of the
            batch.
        at: which optimizer step, from 0.
        micro_batch: of the step, for the loss; -1 is every one.
        parameter: whose gradient, by a part of its name.
    """

    where: str
    value: float = NAN
    at: int = 1
    micro_batch: int = -1
    parameter: str = "norm.weight"


PLANTS = (
    Plant("loss"),
    Plant("loss", INF),
    Plant("loss", -INF, at=0),
    Plant("loss", micro_batch=1),
    Plant("activation", at=0),
    Plant("activation", INF),
    Plant("gradient"),
    Plant("gradient", -INF, at=0),
    Plant("gradient", parameter="o_proj"),
    Plant("advantages", NAN),
    Plant("old_logps", -INF),
)
N_STEPS = 3
planted = SimpleNamespace(value=None, micro_batch=-1, current=-1)


def loss(logps, old_logps, advantages):
    """Policy gradient, with what is planted in one token of it."""
    losses = -advantages * (logps - old_logps).exp()
    if planted.value is not None and planted.micro_batch in (-1, planted.current):
        losses = losses.clone()
        losses[:1] = losses[:1] * planted.value
    return losses


def local(tensor):
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def state_of(actor):
    """This rank's parts of weights and moments, and where the schedule stands."""
    weights = {name: local(p) for name, p in actor.model.named_parameters()}
    moments = {
        (number, name): local(value)
        for number, of_one in enumerate(actor.optimizer.state.values())
        for name, value in of_one.items()
    }
    return weights | moments, actor.scheduler.state_dict()


def equal(one, other):
    tensors = one[0].keys() == other[0].keys() and all(
        torch.equal(tensor, other[0][name]) for name, tensor in one[0].items()
    )
    return tensors and one[1] == other[1]


def break_number(tensor, value):
    local_part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local_part.numel():
        local_part.view(-1)[0] = value


@contextmanager
def plant_on_this_rank(actor, plant):
    handles = []
    if plant.where == "loss":
        planted.value, planted.micro_batch = plant.value, plant.micro_batch
    elif plant.where == "activation":

        def forward_hook(module, inputs, output):
            def backward_hook(gradient):
                gradient = gradient.clone()
                break_number(gradient, plant.value)
                return gradient

            output.register_hook(backward_hook)

        layer = actor.hf_model.get_submodule("model.layers.0.mlp")
        handles.append(layer.register_forward_hook(forward_hook))
    elif plant.where == "gradient":
        named = actor.model.named_parameters()
        parameters = [p for name, p in named if plant.parameter in name and p.requires_grad]
        parameters = parameters or [p for p in actor.model.parameters() if p.requires_grad][:1]
        handles.append(
            parameters[-1].register_post_accumulate_grad_hook(
                lambda parameter: break_number(parameter.grad, plant.value)
            )
        )
    try:
        yield
    finally:
        planted.value = None
        for handle in handles:
            handle.remove()


def new_actor(model, changes):
    node = {"name": None, "import_path": f"{__name__}:loss"}
    config = actor_config(model, avg_level="token", max_length_per_device=24, **changes)
    actor = Actor(config, torch.device("cpu"), resolve_loss(node), max_bad_steps=3)
    actor.prepare_scheduler(10)
    losses = actor.losses

    def counting(micro_batch):
        planted.current += 1
        return losses(micro_batch)

    actor.losses = counting
    return actor


def batches():
    made = [make_batch(n_rows=8, seed=seed) for seed in range(N_STEPS)]
    for batch in made:
        batch["old_logps"] = torch.full_like(batch["old_logps"], -4.0) * batch["action_mask"]
    return made


def step(actor, batch):
    planted.current = -1
    return actor.update(batch if rank() == 0 else None, 1)


def with_the_plant(model, changes, plant, where):
    """Whether the planted step left all as it was, its metrics, and the end."""
    actor = new_actor(model, changes)
    for number, batch in enumerate(batches()):
        if number != plant.at:
            step(actor, batch)
            continue
        before = state_of(actor)
        if plant.where in batch:
            token = tuple((batch["action_mask"] * (batch["advantages"] < 0)).nonzero()[0])
            batch[plant.where][token] = plant.value
        if rank() == where:
            with plant_on_this_rank(actor, plant):
                metrics = step(actor, batch)
        else:
            metrics = step(actor, batch)
        same = equal(before, state_of(actor))
    return same, metrics, state_of(actor)


def without_the_batch(model, changes, at):
    actor = new_actor(model, changes)
    for number, batch in enumerate(batches()):
        if number != at:
            metrics = step(actor, batch)
            assert metrics["actor/nonfinite"] == 0.0, metrics
    return state_of(actor)


def compare(model, changes, plants, where):
    """What was wrong with each plant, on this rank."""
    expected = {at: without_the_batch(model, changes, at) for at in {p.at for p in plants}}
    wrong = {}
    for plant in plants:
        same, metrics, end = with_the_plant(model, changes, plant, where)
        told = metrics.get("actor/nonfinite") == 1.0 and "actor/loss" not in metrics
        if not (told and same and equal(end, expected[plant.at])):
            wrong[str(plant)] = {"told": told, "unchanged": same, **metrics}
    return wrong


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("last", [True, False] if LONG else [True])
@pytest.mark.parametrize("spread", SPREADS | MORE if LONG else SPREADS)
def test_one_rank_is_not_finite_and_all_skip(model, spread, last):
    n_ranks, changes = (SPREADS | MORE)[spread]
    found = run_on_ranks(n_ranks, compare, model, changes, PLANTS, last * (n_ranks - 1))
    assert found == [{}] * n_ranks


def second_half(model, changes, plant_at):
    """Of a rollout with two updates, `plant_at` of all four is not finite on the last rank."""
    changes = changes | {"update_per_rollout": 2}
    plant = Plant("loss")
    actor, reference = new_actor(model, changes), new_actor(model, changes)
    own = actor._optimizer_step
    done = []

    def one_step(part):
        if len(done) == plant_at and rank() == 1:
            with plant_on_this_rank(actor, plant):
                done.append(own(part))
        else:
            done.append(own(part))
        return done[-1]

    actor._optimizer_step = one_step
    metrics = [step(actor, batch) for batch in batches()[:2]]
    kept = [batch for number, batch in enumerate(halves()) if number != plant_at]
    for part in kept:
        reference._optimizer_step(part if rank() == 0 else None)
    return [m["actor/nonfinite"] for m in metrics], equal(state_of(actor), state_of(reference))


def halves():
    cut = [{name: field.split(4) for name, field in batch.items()} for batch in batches()[:2]]
    return [{name: parts[i] for name, parts in both.items()} for both in cut for i in (0, 1)]


@pytest.mark.parametrize("plant_at", range(4))
def test_one_of_two_updates_of_a_rollout(model, plant_at):
    counts = [float(plant_at < 2), float(plant_at >= 2)]
    assert run_on_ranks(2, second_half, model, {}, plant_at) == [(counts, True)] * 2


def in_a_row(model, changes, n_good):
    """Messages after three bad updates in a row, or as many as two before leave of them."""
    actor, (good, bad, *_) = new_actor(model, changes), batches()
    bad["advantages"][bad["action_mask"]] = NAN
    for batch in [bad, bad, *[good] * n_good]:
        step(actor, batch)
    try:
        for _ in range(3):
            step(actor, bad)
    except TrainingError as error:
        return actor.bad_steps, str(error)
    return None


def test_a_good_update_begins_the_count_anew(model):
    for answers in (run_on_ranks(2, in_a_row, model, {}, n_good) for n_good in (0, 1)):
        assert [count for count, _ in answers] == [3, 3]
        assert len({message for _, message in answers}) == 1


# ------------------------------------------------------------------------------ in a run

LOSS = """
import os
from pathlib import Path


def nll(logps):
    bad = os.environ["RANK"] == "1" and (Path(__file__).parent / "bad").exists()
    bad = bad and len(logps) > 3  # not in the trial of the loss, which would find it
    return -logps * (float("nan") if bad else 1.0)
"""


@pytest.fixture
def files(tmp_path):
    files = write_files(tmp_path)
    (files / "loss.py").write_text(LOSS)
    return files


@pytest.mark.parametrize("ddp_size", [1, 2])
def test_a_run_stops_on_all_ranks_and_counts_on_when_resumed(files, tmp_path, ddp_size):
    settings = {
        "actor__loss__import_path": f"{files / 'loss.py'}:nll", "trainer__max_bad_steps": 2,
        "trainer__n_epochs": 2, "actor__ddp_size": ddp_size,
    }  # fmt: skip
    folder = tmp_path / "run"
    (files / "bad").touch()
    Run(files, "sft", folder, 2, trainer__max_steps=1, **settings).finish()
    assert [row["actor/nonfinite"] for row in rows_of(folder)] == [1.0]
    resumed = {"trainer__load_ckpt_from": "latest"} | settings
    run = Run(files, "sft", folder, 2, **resumed)
    assert run.wait(end_others=False) == [1, 1]
    # a progress bar may stand before it
    lines = [line.partition("TrainingError: ")[2] for line in run.output().splitlines()]
    (line,) = {*lines} - {""}
    assert "2 updates in a row (trainer.max_bad_steps)" in line and "step 1 is in " in line
    assert "Traceback" not in run.output()
    (files / "bad").unlink()
    Run(files, "sft", folder, 2, **resumed).finish()
    assert [row["step"] for row in rows_of(folder)] == [1, 2, 3, 4, 5, 6]


def test_what_was_learned_before_is_saved(files, tmp_path, monkeypatch):
    """Finite in two steps, not in the next two; the one before the last was not saved yet."""
    own, calls = Actor.losses, []

    def losses(self, micro_batch):
        calls.append(None)
        loss, metrics = own(self, micro_batch)
        return loss * (1.0 if len(calls) < 3 else NAN), metrics

    folder, settings = tmp_path / "run", {"trainer__max_bad_steps": 2, "trainer__n_epochs": 2}
    with monkeypatch.context() as patch:
        patch.setattr(Actor, "losses", losses)
        with pytest.raises(TrainingError, match="2 updates in a row .*; step 3 is in ") as caught:
            train(files, "sft", folder, **settings)
    assert "\n" not in str(caught.value)
    (saved,) = Checkpoints(folder).steps()
    assert saved.name == "step000003" and damage(saved) is None
    rows = train(files, "sft", folder, trainer__load_ckpt_from="latest", **settings)
    assert [row["actor/nonfinite"] for row in rows] == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
