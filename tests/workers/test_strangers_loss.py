"""A stranger's loss inside of an update: what it returns, where it returns it, and how it fails."""

import re

import pytest
import torch

from RL2.algorithms import resolve_loss
from RL2.algorithms.contract import RESERVED
from RL2.distributed import rank
from RL2.runtime.errors import TrainingError
from RL2.workers import Actor
from tests.ranks import run_on_ranks
from tests.workers.test_actor import actor_config, make_batch, make_model, whole

NLL = "def f(logps, advantages):\n    return -logps * advantages"
HEAD = "import os, sys, torch\nimport torch.distributed as dist\n\n\n"
# Not in the trial, which has three tokens.
RUNS = "len(logps) > 3 and dist.is_initialized()"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def written(folder, body):
    path = folder / "my_loss.py"
    path.write_text(HEAD + body + "\n")
    return f"{path}:f"


def make_actor(model, import_path, **changes):
    loss = resolve_loss({"name": None, "import_path": import_path})
    config = actor_config(model, **{"avg_level": "token", "max_length_per_device": 24} | changes)
    actor = Actor(config, torch.device("cpu"), loss, max_bad_steps=2)
    actor.prepare_scheduler(10)
    return actor


def one_update(model, import_path, changes, batch):
    return update(make_actor(model, import_path, **changes), batch)


def update(actor, batch):
    """Metrics, or the error and whether nothing has changed."""
    before = whole(actor)
    try:
        return actor.update(batch if rank() == 0 else None, 1)
    except TrainingError as error:
        after = whole(actor)
        same = all(torch.equal(after[name], value) for name, value in before.items())
        return str(error), same and not actor.optimizer.state


# Names that exist where the data, the rank or the part of a batch ask for them.
SOMEWHERE = """
def f(logps, advantages):
    metrics = {"everywhere": torch.ones_like(logps)}
    if (advantages > 0).any():
        metrics["aaa"] = (advantages > 0) & (logps < 0)
    if (advantages < 0).all():
        metrics["zzz"] = torch.ones_like(logps)
    return -logps * advantages, metrics
"""
SPREADS = [(1, {}), (2, {}), (2, {"ddp_size": 2}), (2, {"tp_size": 2}), (2, {"sp_size": 2})]


@pytest.mark.parametrize(("n_ranks", "changes"), SPREADS)
@pytest.mark.parametrize("how", ["naive", "tiled"])
def test_metrics_that_only_some_have_shift_nobody(tmp_path, model, n_ranks, changes, how):
    if how == "naive" and "tp_size" in changes:
        return
    batch = make_batch(n_rows=5, correct=[True, True, False, False, False])
    changes = changes | {"token_stats": how}
    (plain,) = run_on_ranks(1, one_update, model, written(tmp_path, NLL), {}, batch)
    found = run_on_ranks(n_ranks, one_update, model, written(tmp_path, SOMEWHERE), changes, batch)
    for metrics in found:
        for name, value in plain.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        mask = batch["action_mask"]
        share = (mask * (batch["advantages"] > 0)).sum() / mask.sum()
        # By token: without those, 0, however the batch was cut.
        assert metrics["actor/aaa"] == pytest.approx(float(share))
        assert metrics["actor/everywhere"] == pytest.approx(1)


LONG = {"max_length_per_device": 72}  # of a micro-batch with all rows
FAULTS = {
    "return (-logps)[:, None]": r"losses of \d+ tokens came back as \[\d+, 1\], expected a tensor ",
    "return -logps.mean()": r"losses of \d+ tokens came back as \[\], expected",
    "return -logps[:1]": r"losses of \d+ tokens came back as \[1\], expected",
    "return None": "losses of .* tokens came back as NoneType",
    "return (-logps).half()": "losses of .* tokens came back as float16, expected float32",
    "return ranks.long()": "losses of .* tokens came back as int64, expected float32",
    "return -logps.to('meta')": "losses of .* tokens came back on meta, expected cpu",
    "return -logps, {'x': logps.mean()}": r"x of \d+ tokens came back as \[\], expected",
    "return -logps, {'x': 1.0}": "x of .* tokens came back as float, expected",
    "return -logps, {'lr': logps}": "its metric lr has the name of one that every update writes",
    "return -logps, {}, {}": r"it returned \(Tensor, dict, dict\); return the losses, or",
    "return -logps, logps": r"it returned \(Tensor, Tensor\); return",
    "sys.exit(0)": r"it raised SystemExit: 0 \(my_loss.py:8\)",
    "raise GeneratorExit": r"it raised GeneratorExit \(my_loss.py:8\)",
    "raise KeyError('x')": r"it raised KeyError: 'x' \(my_loss.py:8\)",
    "torch.set_num_threads(7)": "it called torch.set_num_threads, which changes the whole run",
    "torch.set_default_dtype(torch.float64)": "it called torch.set_default_dtype, which",
    "advantages.mul_(2)": "it changed advantages in place, which others read; use advantages.clon",
}


def every_fault(model, folder, batch):
    """What comes of each, the last rank being the one with the fault."""
    paths = [f"{folder}/{number}/my_loss.py:f" for number in range(len(FAULTS) + 1)]
    actor, answers = make_actor(model, paths[0]), []
    for path in paths:
        actor.loss, actor.fault = resolve_loss({"name": None, "import_path": path}), None
        answers.append(update(actor, batch))
    return answers


SELECTION = """
def f(logps, selected, advantages):
    return -logps * selected * advantages

def chosen(old_logps, action_mask):
    if action_mask.shape[1] > 4:  # not in the trial
        raise RuntimeError("no such row")
    return action_mask.float()

f.select = chosen
"""


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_loss_that_goes_wrong_on_one_rank_ends_all_in_one_line(tmp_path, model, n_ranks):
    for number, line in enumerate(FAULTS):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        body = f"def f(logps, ranks, advantages):\n    if {RUNS}:"
        body += f"\n        if dist.get_rank() == {n_ranks - 1}:\n            {line}"
        written(folder, f"{body}\n    return -logps")
    last = tmp_path / f"{len(FAULTS)}"
    last.mkdir()
    written(last, SELECTION)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    batch = make_batch()
    batch["old_logps"] = torch.zeros(batch["action_mask"].shape)
    found = run_on_ranks(n_ranks, every_fault, model, tmp_path, batch)
    said_of = FAULTS | {"selection": "its selection: it raised RuntimeError: no such row"}
    for answers in found:
        for (line, said), answer in zip(said_of.items(), answers, strict=True):
            assert isinstance(answer, tuple), (line, answer)
            message, same = answer
            assert re.match(rf"actor.loss.import_path=\S*my_loss.py:f: {said}", message), line
            assert same and "\n" not in message, line
    assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())


OF_SEQUENCES = """
def f(logps, advantages, sequences):
    losses = -sequences.mean(logps * advantages)
    if len(logps) > 7 and dist.is_initialized():  # not in the trial
        LINE
    return losses, {"x": losses}
"""


@pytest.mark.parametrize("changes", [{}, {"sp_size": 2}])
def test_a_loss_of_sequences_that_goes_wrong_on_one_rank_ends_all_in_one_line(
    tmp_path, model, changes
):
    """The ranks that share a pack included, which wait for each other's tokens."""
    line = "if dist.get_rank() == 1: return losses.sum()"
    body = OF_SEQUENCES.replace("LINE", line)
    for answer in run_on_ranks(
        2, one_update, model, written(tmp_path, body), changes, make_batch()
    ):
        message, same = answer
        assert (
            re.search(r"f: losses of \d+ sequences came back as \[\], expected", message) and same
        )


def test_a_loss_of_sequences_may_do_on_each_rank_what_the_tokens_there_ask_for(tmp_path, model):
    """It sees those of whole packs, so that ranks that share one go the same way."""
    line = "if not (logps.detach()[:5] * advantages[:5] > 0).any(): return losses * 2"
    body = OF_SEQUENCES.replace("LINE", line)
    batch, path = make_batch(n_rows=3), written(tmp_path, body)
    (alone,) = run_on_ranks(1, one_update, model, path, LONG, batch)
    for metrics in run_on_ranks(2, one_update, model, path, {"sp_size": 2} | LONG, batch):
        assert metrics["actor/loss"] == pytest.approx(alone["actor/loss"], rel=1e-5)
        assert metrics["actor/grad_norm"] == pytest.approx(alone["actor/grad_norm"], rel=1e-5)


# ---- what a loss may do

QUIET = """
def f(logps, advantages, rewards):
    logps.max()  # fails on nothing
    if not (advantages > 0).any():
        return torch.zeros_like(logps)  # nothing to learn from these tokens
    return -logps * advantages.clamp(min=0), {"x": (rewards - 1).log(), "y": logps}
"""


@pytest.mark.parametrize("how", ["naive", "tiled"])
@pytest.mark.parametrize(("n_ranks", "changes"), [SPREADS[0], SPREADS[1], SPREADS[4]])
def test_no_part_is_empty_and_one_without_a_gradient_is_no_fault(
    tmp_path, model, n_ranks, changes, how, caplog
):
    batch = make_batch(n_rows=3, correct=[True, False, False])  # ranks and slices without tokens
    changes = changes | {"token_stats": how}
    (plain,) = run_on_ranks(
        1, one_update, model, written(tmp_path, NLL + ".clamp(min=0)"), {}, batch
    )
    for metrics in run_on_ranks(
        n_ranks, one_update, model, written(tmp_path, QUIET), changes, batch
    ):
        assert metrics["actor/loss"] == pytest.approx(plain["actor/loss"], rel=1e-5)
        assert metrics["actor/grad_norm"] == pytest.approx(plain["actor/grad_norm"], rel=1e-5)
        assert "actor/x" not in metrics and "actor/y" in metrics
    if n_ranks == 1:
        (line,) = caplog.messages
        assert line.endswith("of its metric x is nan, which is left out of the step's metrics")


NEVER_FINITE = f"""
def f(logps):
    return -logps / (not ({RUNS}))
"""


def test_what_was_not_finite_is_the_loss_where_it_was(tmp_path, model, caplog):
    ((message, same),) = run_on_ranks(1, twice, model, written(tmp_path, NEVER_FINITE))
    n_tokens = int(make_batch()["action_mask"].sum())
    said = f"my_loss.py:f returned {n_tokens} losses that were not"
    (line,) = caplog.messages
    assert said in line and line.endswith("; this update was left out (actor/nonfinite)")
    assert said in message and "trainer.max_bad_steps" in message


def twice(model, import_path):
    actor = make_actor(model, import_path)
    actor.update(make_batch(), 1)
    try:
        actor.update(make_batch(), 2)
    except TrainingError as error:
        return str(error), True


def names_of_an_update(model):
    changes = {
        "tis_coef": 2.0,
        "tis_type": "mask",
        "kl": {"coef": 0.1, "type": "loss"},
        "max_ratio": 10.0,
    }
    actor = Actor(
        actor_config(model, **changes), torch.device("cpu"), resolve_loss({"name": "nll"})
    )
    actor.prepare_scheduler(10)
    batch = make_batch()
    return actor.update(batch | {"ref_logps": batch["old_logps"]}, 1).keys()


def test_every_name_of_an_update_is_reserved(model):
    (names,) = run_on_ranks(1, names_of_an_update, model)
    own = {name.removeprefix("actor/") for name in names if name.startswith("actor/")}
    assert own == set(RESERVED)
