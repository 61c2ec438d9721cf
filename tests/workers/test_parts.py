"""The optimizer batches of a step."""

import pytest
import torch

from RL2.distributed import rank
from RL2.workers.parts import order_of, split_batch
from tests.ranks import run_on_ranks
from tests.workers.test_actor import as_spo, make_actor, make_batch, make_model, whole


def test_split_batch_keeps_samples_whole():
    batch = make_batch(n_rows=6) | {"sample_ids": torch.tensor([0, 0, 1, 2, 2, 2])}
    parts = split_batch(batch, 2)
    assert [part["sample_ids"].tolist() for part in parts] == [[0, 0, 1], [2, 2, 2]]
    assert torch.equal(torch.cat([part["states"] for part in parts]), batch["states"])
    assert parts[0]["states"].data_ptr() == batch["states"].data_ptr()  # no copy
    assert [len(part["states"]) for part in split_batch(batch, 5)] == [2, 1, 3, 0, 0]


def test_split_batch_keeps_pairs_whole():
    batch = make_batch(n_rows=6) | {"pair_ids": torch.tensor([3, 1, 3, 2, 2, 1])}
    parts = split_batch(batch, 2, ("sequences", "pairs"))
    assert [part["sample_ids"].tolist() for part in parts] == [[0, 1, 2, 5], [3, 4]]


def test_a_shuffled_batch_is_cut_between_pairs_too():
    batch = make_batch(n_rows=12) | {"pair_ids": torch.arange(12) // 2}
    split = split_batch(batch, 3, ("sequences", "pairs"), order_of(0, 1, 0))
    rows = [part["sample_ids"].tolist() for part in split]
    assert sorted(sum(rows, [])) == [*range(12)] and rows[0] != [0, 1, 2, 3]
    for part in split:
        assert [part["pair_ids"].tolist().count(pair) for pair in part["pair_ids"]] == [2] * 4


def test_each_pass_has_an_order_of_its_own_and_always_the_same():
    def order(*numbers):
        return tuple(torch.randperm(50, generator=order_of(*numbers)).tolist())

    orders = {numbers: order(*numbers) for numbers in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0))}
    assert len({*orders.values()}) == 4
    assert order(0, 1, 1) == orders[0, 1, 1]


PASSES = {"update_per_rollout": 2, "epochs_per_rollout": 3, "avg_level": "token", "lr": 0.01}


def several_passes(model, batch):
    """One update of three passes, and the same as six updates by hand."""
    actor, by_hand = (make_actor(model, "ppo", **PASSES | more) for more in ({}, HAND))
    actor.seed = 7
    metrics = actor.update(batch if rank() == 0 else None, 4)
    for epoch in range(3):
        for part in split_batch(batch, 2, (), order_of(7, 4, epoch)):
            by_hand.update(part if rank() == 0 else None, 4)
    return metrics, actor.scheduler.last_epoch, whole(actor), whole(by_hand)


HAND = {"update_per_rollout": 1, "epochs_per_rollout": 1}


def test_several_passes_are_updates_on_shuffled_samples(tmp_path):
    model, batch = make_model(tmp_path), make_batch(n_rows=8)
    ((metrics, n_updates, weights, by_hand),) = run_on_ranks(1, several_passes, model, batch)
    assert n_updates == 6 and metrics["actor/skipped"] == 0
    assert all(torch.equal(weights[name], by_hand[name]) for name in weights)
    for others, n_updates, spread, _ in run_on_ranks(2, several_passes, model, batch):
        assert n_updates == 6
        torch.testing.assert_close(others, metrics, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(spread, weights, rtol=1e-3, atol=2e-4)


def guarded(model, batch, bound):
    actor = make_actor(model, "ppo", max_ratio=bound, update_per_rollout=2)
    before = whole(actor)
    metrics = actor.update(batch if rank() == 0 else None, 1)
    after = whole(actor)
    moved = any(not torch.equal(before[name], after[name]) for name in before)
    old = actor.scheduler.last_epoch, len(actor.optimizer.state)
    return metrics, moved, old


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_step_whose_mean_ratio_is_too_large_changes_nothing(tmp_path, n_ranks):
    """The tokens of half of the samples became e^5 times as likely, of the others they did not."""
    model, batch = make_model(tmp_path), as_spo(make_batch(n_rows=8))
    with_logps = run_on_ranks(1, logps_of, model, batch)[0]
    near = batch | {"old_logps": with_logps}
    far = near | {"old_logps": with_logps - 5.0 * (torch.arange(8) < 4)[:, None]}
    for metrics, moved, (n_updates, _) in run_on_ranks(n_ranks, guarded, model, far, 50.0):
        assert metrics["actor/ratio_skipped"] == 1 and metrics["actor/skipped"] == 0
        assert moved and n_updates == 1
        assert metrics["actor/mean_ratio"] == pytest.approx(1.0, rel=0.05)  # of the second half
    for metrics, _, (n_updates, _) in run_on_ranks(n_ranks, guarded, model, far, 200.0):
        assert metrics["actor/ratio_skipped"] == 0 and n_updates == 2
    far["old_logps"] = with_logps - 200.0  # the ratio is infinite, and so is the loss
    for metrics, moved, state in run_on_ranks(n_ranks, guarded, model, far, 10.0):
        assert metrics["actor/ratio_skipped"] == 2 and "actor/nonfinite" not in metrics
        assert not moved and state == (0, 0)


def logps_of(model, batch):
    actor = make_actor(model, "ppo")
    return actor.annotate(batch, {"old_logps": "logps"})["old_logps"] * batch["action_mask"]
