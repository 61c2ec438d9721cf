"""The loop's own arithmetic: what must be computed before an update, and where the KL goes."""

import runpy
from dataclasses import replace
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from RL2.algorithms.advantages import reinforce, spo
from RL2.algorithms.losses import LOSSES
from RL2.algorithms.token_loss import TokenLoss, resolve_loss
from RL2.runtime.errors import ConfigError, TrainingError
from RL2.trainer.checkpoints.integrity import damage
from RL2.trainer.loop import add_advantages, check_loss, required_fields
from RL2.trainer.main import _fail, exit_of_others
from tests.trainer.support import same_weights, train, weights, write_env, write_files

KL_OFF = {"coef": 0.0, "type": None}


def config(update_per_rollout=1, estimator="k1", tis_coef=0.0, **kl):
    return OmegaConf.create(
        {
            "actor": {
                "update_per_rollout": update_per_rollout,
                "tis_coef": tis_coef,
                "kl": KL_OFF | {"reward_estimator": estimator} | kl,
            }
        }
    )


def required(loss, **changes):
    return required_fields(config(**changes), resolve_loss({"name": loss}))


@pytest.mark.parametrize("loss", LOSSES)
def test_one_update_without_kl_needs_no_second_forward(loss):
    assert required(loss) == ()


@pytest.mark.parametrize("loss", LOSSES)
def test_old_logps_only_where_the_policy_moves_away_and_the_loss_looks_back(loss):
    assert required(loss, update_per_rollout=2) == (("old_logps",) if loss == "ppo" else ())


@pytest.mark.parametrize("loss", LOSSES)
def test_importance_weights_look_back_whatever_the_loss(loss):
    assert required(loss, tis_coef=2.0) == ()
    assert required(loss, tis_coef=2.0, update_per_rollout=2) == ("old_logps",)


@pytest.mark.parametrize("kind", ["reward", "advantage"])
def test_kl_on_rewards_needs_both_policies(kind):
    assert required("max_target_kl", coef=0.1, type=kind) == ("old_logps", "ref_logps")


def test_kl_in_the_loss_needs_the_reference_only():
    assert required("max_target_kl", coef=0.1, type="loss") == ("ref_logps",)
    both = required("ppo", coef=0.1, type="loss", update_per_rollout=2)
    assert both == ("old_logps", "ref_logps")


def test_a_loss_that_names_ref_logps_gets_them(tmp_path):
    path = tmp_path / "loss.py"
    path.write_text("def pull(logps, ref_logps):\n    return (logps - ref_logps) ** 2\n")
    loss = resolve_loss({"name": "ppo", "import_path": f"{path}:pull"})
    assert required_fields(config(), loss) == ("ref_logps",)


def batch():
    """Two samples of one prompt; the first has two rows, and the mask leaves a token out."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    rewards = torch.tensor([[0.0, 0, 0.5, 0], [0, 0.5, 0, 0], [0, 0, 0, 0.25]])
    return {
        "action_mask": mask,
        "rewards": rewards,
        "old_logps": -torch.rand(3, 4, generator=generator),  # not masked: garbage beside actions
        "ref_logps": -torch.rand(3, 4, generator=generator),
        "sample_ids": torch.tensor([0, 0, 1]),
        "group_ids": torch.tensor([0, 0, 0]),
    }


def divergence(given, estimator):
    d = given["old_logps"] - given["ref_logps"]
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_as_advantage_is_taken_off_token_by_token(estimator):
    given = batch()
    out = add_advantages(given, config(coef=0.3, type="advantage", estimator=estimator), spo)
    mask = given["action_mask"]
    expected = torch.tensor([[1.0], [1.0], [0.25]]) * mask
    expected = expected - 0.3 * divergence(given, estimator) * mask
    torch.testing.assert_close(out["advantages"], expected)
    assert torch.equal(out["rewards"], given["rewards"])  # what the metrics report stays


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_as_reward_is_summed_over_the_sample_before_the_advantage(estimator):
    given = batch()
    out = add_advantages(given, config(coef=0.3, type="reward", estimator=estimator), reinforce)
    mask = given["action_mask"]
    penalty = 0.3 * (divergence(given, estimator) * mask).sum(1)
    first, second = 1.0 - penalty[0] - penalty[1], 0.25 - penalty[2]
    half = (first - second) / 2
    torch.testing.assert_close(out["advantages"], torch.stack([half, half, -half])[:, None] * mask)
    assert torch.equal(out["rewards"], given["rewards"])


def test_rewards_are_float64_up_to_the_advantages():
    """0.1 + 0.2 against 0.3 in float32 differ by 7e-9; what a loss gets is float32 again."""
    given = batch()
    mask = torch.ones(2, 4, dtype=torch.bool)
    rewards = torch.tensor([[0.1, 0, 0.2, 1e6], [0, 0, 0, 1e6 + 1]], dtype=torch.float64)
    given = {"action_mask": mask, "rewards": rewards} | {
        name: given[name][1:] for name in ("sample_ids", "group_ids")
    }
    out = add_advantages(given, config(), reinforce)
    torch.testing.assert_close(
        out["advantages"][:, 0], torch.tensor([-0.35, 0.35]), rtol=1e-6, atol=0
    )
    assert out["rewards"].dtype == out["advantages"].dtype == torch.float32


@pytest.mark.parametrize("kl", [KL_OFF, {"coef": 0.3, "type": "loss"}])
def test_kl_elsewhere_leaves_the_advantages_alone(kl):
    given = batch()
    del given["old_logps"]
    estimator = partial(reinforce, norm_var=True)
    out = add_advantages(given, config(**kl), estimator)
    plain = estimator(*(given[k] for k in ("rewards", "action_mask", "sample_ids", "group_ids")))
    assert torch.equal(out["advantages"], plain)
    assert "advantages" not in given


def test_a_loss_over_fields_that_data_rows_lack_is_refused():
    def off_policy(logps, llm_logps, rewards):
        return -logps

    loss = TokenLoss("off_policy", off_policy, ("logps", "llm_logps", "rewards"))
    with pytest.raises(ConfigError, match="actor.loss: off_policy needs llm_logps, rewards"):
        check_loss(OmegaConf.create({"actor": {}}), loss)
    check_loss(OmegaConf.create({"actor": {}}), resolve_loss({"name": "nll"}))


def test_random_numbers_of_ranks_that_share_tokens_are_refused():
    loss = replace(resolve_loss({"name": "nll"}), draws=True)
    with pytest.raises(ConfigError, match="^actor.tp_size=2: the loss nll draws random numbers"):
        check_loss(OmegaConf.create({"actor": {"tp_size": 2}}), loss)
    check_loss(OmegaConf.create({"actor": {"tp_size": 1}}), loss)


def test_what_was_learned_before_a_loss_goes_wrong_is_saved(tmp_path):
    files = write_files(tmp_path)
    (files / "loss.py").write_text(
        "calls = 0\n\n\ndef f(logps):\n    global calls\n    calls += len(logps) > 3\n"
        "    return -logps if calls < 3 else (-logps).sum()\n"
    )
    said = r"^actor.loss.*: losses of \d+ tokens came back as \[\], .*; step 2 is in "
    with pytest.raises(TrainingError, match=said):
        train(files, "sft", tmp_path / "run", actor__loss__import_path=f"{files / 'loss.py'}:f")
    assert damage(tmp_path / "run/checkpoints/step000002") is None


def test_the_exit_of_others_is_no_end_of_a_run(tmp_path):
    (tmp_path / "theirs.py").write_text("def f():\n    exit(0)\n")
    theirs = runpy.run_path(str(tmp_path / "theirs.py"))["f"]
    with pytest.raises(SystemExit) as caught:
        theirs()
    said = str(exit_of_others(caught.value))
    assert said.startswith(f"exit(0) was called at {tmp_path}/theirs.py:2 in the midst of the run")
    with pytest.raises(SystemExit) as caught:
        _fail(ConfigError("x"))
    assert exit_of_others(caught.value) is None and caught.value.code == 1


@pytest.mark.parametrize("kind", ["reward", "advantage"])
def test_a_kl_that_the_loss_would_never_see_is_refused(kind):
    def run(avg_level, kind):
        kl = {"coef": 0.1, "type": kind}
        return OmegaConf.create({"rollout": {}, "actor": {"avg_level": avg_level, "kl": kl}})

    blind, sees = resolve_loss({"name": "max_target_kl"}), resolve_loss({"name": "ppo"})
    with pytest.raises(ConfigError, match=f"actor.kl.type={kind}: .*use actor.kl.type=loss"):
        check_loss(run("correct", kind), blind)
    check_loss(run("correct", "loss"), blind)
    check_loss(run("sequence", kind), blind)
    check_loss(run("correct", kind), sees)


NEVER_RIGHT = """
async def step(state, action, extra_info):
    return {"next_state": None, "reward": 0.0, "score": 0.0, "done": True}
"""
TWICE = {"actor__update_per_rollout": 2}
# What computes log-probabilities and updates nothing.
IDLE = {
    "frozen": TWICE | {"actor__freeze_steps": 3},
    "frozen, KL in the reward": {
        "actor__freeze_steps": 3, "actor__kl__coef": 0.1, "actor__kl__type": "reward",
    },
    "nothing correct": TWICE | {"actor__avg_level": "correct", "rollout__env_path": "never.py"},
}  # fmt: skip


@pytest.mark.parametrize("kind", IDLE)
def test_steps_that_update_nothing_are_evaluated_saved_and_published(tmp_path, kind):
    files = write_files(tmp_path)
    write_env(files / "never.py", NEVER_RIGHT)
    changes = dict(IDLE[kind])
    if "rollout__env_path" in changes:
        changes["rollout__env_path"] = files / changes["rollout__env_path"]
    rows = train(
        files, "ppo", tmp_path / "run", test_data__path=files / "rows.jsonl",
        test_data__max_examples=4, train_data__responses_per_prompt=2,
        rollout__dynamic_filtering="false", trainer__test_freq=1, trainer__save_freq=1,
        **changes,
    )  # fmt: skip
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["test/score"] == rows[0]["test/score"] for row in rows)
    assert same_weights(weights(tmp_path / "run/final"), weights(files / "model"))


EVER_BETTER = """
calls = 0


async def step(state, action, extra_info):
    global calls
    calls += 1
    return {"next_state": None, "reward": 1.0, "score": calls - 1000.0, "done": True}
"""


def test_best_is_kept_for_any_finite_score(tmp_path):
    files = write_files(tmp_path)
    rows = train(
        files, "spo", tmp_path / "run", test_data__path=files / "rows.jsonl",
        test_data__max_examples=4, trainer__test_freq=1, trainer__max_steps=2,
        rollout__env_path=write_env(files / "better.py", EVER_BETTER), rollout__env_workers=0,
    )  # fmt: skip
    scores = [row["test/score"] for row in rows]
    assert scores == sorted({*scores}) and scores[-1] < -900
    assert same_weights(weights(tmp_path / "run/best"), weights(tmp_path / "run/final"))
