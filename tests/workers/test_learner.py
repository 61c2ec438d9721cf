"""What holds for any learner, shown on one that is no policy and has another name."""

import torch

from RL2.algorithms.token_loss import TokenLoss
from RL2.distributed import rank
from RL2.workers import Learner
from tests.ranks import run_on_ranks
from tests.workers.test_actor import actor_config, make_batch, make_model, whole


def likelier(logps, rewards):
    return -rewards * logps, {"logps": logps}


LOSS = TokenLoss("likelier", likelier, ("logps", "rewards"))


class Believer(Learner):
    """Makes what was done likelier where `rewards` says so."""

    def learns(self, batch):
        return bool(batch["rewards"].any())


def believe(model, batch, changes):
    learner = Believer(actor_config(model, **changes), torch.device("cpu"), "critic", LOSS)
    learner.prepare_scheduler(4)
    nothing = batch | {"rewards": torch.zeros_like(batch["rewards"])}
    skipped = learner.update(nothing if rank() == 0 else None, 1)
    return skipped, learner.update(batch if rank() == 0 else None, 2), whole(learner)


def test_a_learner_is_its_losses_and_its_name(tmp_path):
    """Its keys are left out that only rollouts have; two ranks do as one."""
    model, batch = make_model(tmp_path), make_batch()
    batch["rewards"] = 1.0 * batch["action_mask"]
    ((skipped, metrics, weights),) = run_on_ranks(1, believe, model, batch, {})
    assert skipped == {"critic/skipped": 1.0, "critic/lr": 1e-3}
    assert metrics.keys() == {
        "critic/loss", "critic/grad_norm", "critic/skipped", "critic/nonfinite", "critic/lr",
        "critic/logps",
    }  # fmt: skip
    assert metrics["critic/loss"] > 0 > metrics["critic/logps"]
    for _, others, spread in run_on_ranks(2, believe, model, batch, {}):
        torch.testing.assert_close(others, metrics, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(spread, weights, rtol=1e-4, atol=2e-5)
