"""What must be computed before an update, what a loss may ask for, and where the KL goes."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from RL2.algorithms.advantages import reinforce
from RL2.algorithms.advantages.returns import rewards_to_go
from RL2.algorithms.algorithm import (
    Algorithm,
    Penalty,
    check_estimator,
    check_loss,
    needed_fields,
    resolve_algorithm,
    resolve_penalty,
)
from RL2.algorithms.estimator import resolve_advantage
from RL2.algorithms.importance import TIS_TYPES
from RL2.algorithms.losses import LOSSES
from RL2.algorithms.token_loss import TokenLoss, resolve_loss
from RL2.runtime.errors import ConfigError, TrainingError

OF_A_REFERENCE = ("dpo", "dpop", "ipo", "kto")
OTHERS = [name for name in LOSSES if name not in OF_A_REFERENCE]
KL_OFF = {"coef": 0.0, "type": None}


def config(update_per_rollout=1, estimator="k1", tis_coef=0.0, tis_type="truncate", **kl):
    return OmegaConf.create(
        {
            "actor": {
                "update_per_rollout": update_per_rollout,
                "tis_coef": tis_coef,
                "tis_type": tis_type,
                "kl": KL_OFF | {"reward_estimator": estimator} | kl,
            }
        }
    )


def learned_from(given, config, estimator, **options):
    loss = resolve_loss({"name": "ppo"})
    estimator = resolve_advantage({"estimator": estimator, **options})
    return Algorithm(loss, estimator, penalty=resolve_penalty(config)).advantages(given)


def required(loss, **changes):
    """What is computed of the policies, without what a teacher gives."""
    needs = needed_fields(config(**changes), resolve_loss({"name": loss}))
    needs.pop("teacher_logps", None)
    return names(needs)


def names(needs):
    """All fields in one tuple; each stands by its provider's name."""
    assert all(field.startswith(provider[:4]) for provider in needs for field in needs[provider])
    return tuple(field for fields in needs.values() for field in fields)


# What the selection of a loss reads of the policy before the updates.
SELECT = {"clip_cov": ("old_logps",), "kl_cov": ("old_logps",), "entropy_80_20": ("old_entropy",)}


@pytest.mark.parametrize("loss", OTHERS)
def test_one_update_without_kl_needs_no_second_forward_but_for_a_selection(loss):
    assert required(loss) == SELECT.get(loss, ())


@pytest.mark.parametrize("loss", OTHERS)
def test_old_logps_only_where_the_policy_moves_away_and_the_loss_looks_back(loss):
    looks_back = "old_logps" in resolve_loss({"name": loss}).fields
    expected = {"old_logps"} if looks_back else set()
    assert {*required(loss, update_per_rollout=2)} == expected | {*SELECT.get(loss, ())}
    one_policy = {"max_target_kl", "fixed_target_kl", "rank_jsd", "nll"}
    one_policy |= {"simpo", "orpo", "bradley_terry", "topk_kl", "topk_jsd"}
    assert looks_back == (loss not in one_policy)


@pytest.mark.parametrize("loss", ["ppo", "max_target_kl", "nll", "gspo", "sapo"])
def test_importance_weights_look_back_whatever_the_loss(loss):
    assert required(loss, tis_coef=2.0) == ()
    assert required(loss, tis_coef=2.0, update_per_rollout=2) == ("old_logps",)


@pytest.mark.parametrize("kind", TIS_TYPES)
def test_importance_weights_of_sequences_need_old_logps(kind):
    loss, whole = resolve_loss({"name": "nll"}), TIS_TYPES[kind].level != "token"
    for coef, brought, needed in (
        (2.0, ("llm_logps",), whole), (0.0, ("llm_logps",), False), (2.0, (), False),
    ):  # fmt: skip
        needs = needed_fields(config(tis_coef=coef, tis_type=kind), loss, brought=brought)
        assert names(needs) == (("old_logps",) if needed else ())


def test_losses_of_a_reference_need_no_other_policy():
    for loss in OF_A_REFERENCE:
        kl = ("mismatch_kl",) if loss == "kto" else ()
        assert required(loss) == required(loss, update_per_rollout=2) == ("ref_logps", *kl)


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
    assert needed_fields(config(), loss) == {"ref_logps": {"ref_logps": "logps"}}


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
    out = learned_from(given, config(coef=0.3, type="advantage", estimator=estimator), "spo")
    mask = given["action_mask"]
    expected = torch.tensor([[1.0], [1.0], [0.25]]) * mask
    expected = expected - 0.3 * divergence(given, estimator) * mask
    torch.testing.assert_close(out["advantages"], expected)
    assert torch.equal(out["rewards"], given["rewards"])  # what the metrics report stays


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_as_reward_is_summed_over_the_sample_before_the_advantage(estimator):
    given = batch()
    out = learned_from(given, config(coef=0.3, type="reward", estimator=estimator), "reinforce")
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
    out = learned_from(given, config(), "reinforce")
    torch.testing.assert_close(
        out["advantages"][:, 0], torch.tensor([-0.35, 0.35]), rtol=1e-6, atol=0
    )
    assert out["rewards"].dtype == out["advantages"].dtype == torch.float32


@pytest.mark.parametrize("kl", [KL_OFF, {"coef": 0.3, "type": "loss"}])
def test_kl_elsewhere_leaves_the_advantages_alone(kl):
    given = batch()
    del given["old_logps"]
    out = learned_from(given, config(**kl), "reinforce", norm_var=True)
    names = ("rewards", "action_mask", "sample_ids", "group_ids")
    plain = reinforce(*(given[name] for name in names), norm_var=True)
    assert torch.equal(out["advantages"], plain)
    assert "advantages" not in given


def test_a_loss_over_fields_that_data_rows_lack_is_refused():
    def off_policy(logps, llm_logps, rewards):
        return -logps

    loss = TokenLoss("off_policy", off_policy, ("logps", "llm_logps", "rewards"))
    config = OmegaConf.create({"actor": {"avg_level": "token"}, "trainer": {"source": "rows"}})
    rows = ("advantages", "correct")
    said = "actor.loss: off_policy needs llm_logps, rewards, which trainer.source=rows does not"
    with pytest.raises(ConfigError, match=said):
        check_loss(config, loss, rows)
    check_loss(config, loss, ("llm_logps", "rewards"))
    pull = TokenLoss("pull", off_policy, ("logps", "ref_logps"))
    check_loss(config, pull, rows)  # of the model that the run began with
    check_loss(config, resolve_loss({"name": "nll"}), rows)
    with pytest.raises(ConfigError, match="needs advantages, which"):
        check_loss(config, resolve_loss({"name": "ppo"}), ())


def test_a_loss_of_values_is_for_a_model_that_writes_nothing():
    def bradley_terry(values, sequences, pairs):
        return -values

    loss = TokenLoss("bradley_terry", bradley_terry, ("values", "sequences"), kind="sequences")
    assert (loss.head, loss.is_multiplied, loss.statistics) == ("scalar", False, ("values",))
    node = {"avg_level": "token", "entropy": {"coef": 0.0}}
    rows = OmegaConf.create({"actor": node, "trainer": {"source": "rows"}})
    check_loss(rows, loss, ())
    with pytest.raises(ConfigError, match="takes values, one number a token, but the actor of"):
        check_loss(OmegaConf.merge(rows, {"rollout": {}}), loss, ())
    for name, value in (("entropy.coef", 0.1), ("temperature", 0.6), ("token_stats", "naive")):
        config = rows.copy()
        OmegaConf.update(config.actor, name, value)
        with pytest.raises(ConfigError, match=f"^actor.{name}={value}: has no effect with actor.l"):
            check_loss(config, loss, ())


def test_what_a_source_brings_is_not_computed(tmp_path):
    path = tmp_path / "loss.py"
    path.write_text("def pull(logps, ref_logps):\n    return (logps - ref_logps) ** 2\n")
    loss = {"name": "ppo", "import_path": f"{path}:pull"}
    config = OmegaConf.create(
        {
            "actor": {"loss": loss, "avg_level": "token"}, "ref_actor": {},
            "adv": {"estimator": "spo"}, "trainer": {"source": "x.py:X"},
        }
    )  # fmt: skip
    assert resolve_algorithm(config, ("rewards", "group_ids")).needs == {
        "ref_logps": {"ref_logps": "logps"}
    }
    algorithm = resolve_algorithm(config, ("advantages", "ref_logps"))
    assert algorithm.needs == {} and algorithm.advantage is None
    given = batch()
    assert algorithm.advantages(given) is given
    assert resolve_algorithm(config, ("rewards", "group_ids")).advantages(None) is None
    del config.adv
    with pytest.raises(ConfigError, match="^trainer.source=x.py:X: brings no advantages, and this"):
        resolve_algorithm(config, ("rewards", "group_ids"))


def test_random_numbers_of_ranks_that_share_tokens_are_refused():
    loss = replace(resolve_loss({"name": "nll"}), draws=True)
    with pytest.raises(ConfigError, match="^actor.tp_size=2: the loss nll draws random numbers"):
        check_loss(OmegaConf.create({"actor": {"tp_size": 2}}), loss, ())
    check_loss(OmegaConf.create({"actor": {"tp_size": 1, "avg_level": "token"}}), loss, ())


@pytest.mark.parametrize("kind", ["reward", "advantage"])
def test_a_kl_that_the_loss_would_never_see_is_refused(kind):
    def run(avg_level, kind):
        kl = {"coef": 0.1, "type": kind}
        return OmegaConf.create({"adv": {}, "actor": {"avg_level": avg_level, "kl": kl}})

    blind, sees = resolve_loss({"name": "max_target_kl"}), resolve_loss({"name": "ppo"})
    with pytest.raises(ConfigError, match=f"actor.kl.type={kind}: .*use actor.kl.type=loss"):
        check_loss(run("correct", kind), blind, ())
    check_loss(run("correct", "loss"), blind, ())
    check_loss(run("sequence", kind), blind, ())
    check_loss(run("correct", kind), sees, ())


SURPRISED = """
def f(rewards, action_mask, entropy, old_logps, turn_ids, kindness, *, bonus=0.5):
    first = (turn_ids == 0) * bonus
    return rewards.sum(-1, keepdim=True) + first * entropy - old_logps + kindness
"""


@pytest.fixture
def own(tmp_path):
    def resolved(body=SURPRISED, brought=("kindness",), **changes):
        path = tmp_path / "mine.py"
        path.write_text(f"import torch\n{body}")
        return resolve_advantage({"import_path": f"{path}:f", **changes}, brought)

    return resolved


def test_an_estimator_names_fields_of_the_policy_before_the_update(own):
    """They come from one forward of one provider, and only what is named."""
    loss, estimator = resolve_loss({"name": "nll"}), own()
    before = {"old_logps": "logps", "old_entropy": "entropy"}
    assert needed_fields(config(), loss, estimator) == {"old_logps": before}
    assert needed_fields(config(), loss, estimator, ("old_logps",)) == {
        "old_logps": {"old_entropy": "entropy"}
    }
    given = batch() | {
        "old_entropy": torch.rand(3, 4),
        "turn_ids": torch.tensor([[-1, 0, 0, -1], [1, 1, -1, -1], [-1, 0, 0, 1]]),
        "kindness": torch.rand(3, 4),
    }
    found = Algorithm(loss, estimator).advantages(given)["advantages"]
    expected = given["rewards"].sum(-1, keepdim=True) - given["old_logps"] + given["kindness"]
    expected += 0.5 * given["old_entropy"] * (given["turn_ids"] == 0)
    torch.testing.assert_close(found, expected * given["action_mask"])


def test_an_estimator_that_names_values_has_a_critic(own):
    """What it learns are the estimator's returns, or else the rewards to come."""
    loss, value_loss = resolve_loss({"name": "nll"}), TokenLoss("value", None, ("values",))
    body = "def f(rewards, values, *, gamma=1.0): return rewards - values"
    estimator = own(body, gamma=0.5)
    assert estimator.has_critic
    needs = needed_fields(config(), loss, estimator)
    assert needs == {"old_values": {"old_values": "values"}}
    given = batch() | {"old_values": torch.rand(3, 4)}
    found = Algorithm(loss, estimator, value_loss=value_loss, gamma=0.5).advantages(given)
    mask = given["action_mask"]
    expected = ((given["rewards"] - given["old_values"]) * mask).float()
    torch.testing.assert_close(found["advantages"], expected)
    to_go = rewards_to_go(given["rewards"], mask, given["sample_ids"], 0.5).float()
    assert torch.equal(found["returns"], to_go) and found["returns"].dtype == torch.float32
    both = own(f"{body}, {{'returns': 2 * values}}")
    found = Algorithm(loss, both, value_loss=value_loss).advantages(given)["returns"]
    assert torch.equal(found, 2 * given["old_values"] * mask)
    assert own("def f(rewards, values): return rewards", gamma=0.5)  # adv.gamma has an effect
    with pytest.raises(ConfigError, match="^adv.gamma=0.5: has no effect with adv.import_path=.*"):
        own("def f(rewards): return rewards", gamma=0.5)


def test_the_kl_of_the_rewards_is_in_what_the_critic_learns():
    given = batch() | {"old_values": torch.zeros(3, 4), "ref_logps": torch.zeros(3, 4)}
    penalty = Penalty(0.1, "reward", "k1")
    algorithm = Algorithm(None, resolve_advantage({"estimator": "gae"}), penalty=penalty)
    found = algorithm.advantages(given)["returns"]
    mask, rewards = given["action_mask"], given["rewards"] - 0.1 * given["old_logps"]
    expected = rewards_to_go(rewards, mask, given["sample_ids"], 1.0).float()
    torch.testing.assert_close(found, expected)


def test_a_loss_names_statistics_of_the_policy_before_the_update(tmp_path):
    path = tmp_path / "loss.py"
    path.write_text("def f(logps, old_entropy, kindness): return -logps * old_entropy * kindness")
    node = {"name": None, "import_path": f"{path}:f"}
    loss = resolve_loss(node, brought=("kindness",))
    assert loss.fields == ("old_entropy", "kindness")
    assert needed_fields(config(), loss) == {"old_logps": {"old_entropy": "entropy"}}
    with pytest.raises(ConfigError, match="its parameter kindness is neither a token statistic"):
        resolve_loss(node)


def test_an_estimator_that_this_source_cannot_feed_is_refused(own):
    here = OmegaConf.create({"trainer": {"source": "x.py:X"}})
    brought = ("rewards", "turn_ids", "kindness")
    check_estimator(here, own(), brought)
    with pytest.raises(ConfigError, match="mine.py:f: needs turn_ids, which trainer.source=x.py:X"):
        check_estimator(here, own(), ("rewards", "kindness"))


def test_an_estimator_that_fails_in_the_run_is_named(own):
    bad = "def f(rewards):\n    return rewards / (len(rewards) != 3)\n"
    with pytest.raises(
        TrainingError, match=r"^adv.import_path=\S*mine.py:f: 7 of 7 advantages are "
    ):
        Algorithm(None, own(bad)).advantages(batch())
    # It is not to blame for what it was given.
    given = batch()
    given["rewards"][0, 1] = torch.nan
    assert Algorithm(None, own(bad)).advantages(given)["advantages"].isnan().any()


def preferences(source, loss, ref="model"):
    actor = {"avg_level": "sequence", "model_name": "model"}
    config = {"actor": actor | {"loss": {"name": loss}}, "trainer": {"source": source}}
    brought = {
        "pairs": ("pair_ids", "chosen", "labels"), "scored_pairs": ("pair_ids", "chosen"),
        "labels": ("labels",), "rows": (),
    }[source]  # fmt: skip
    config["ref_actor"] = {"model_name": ref}
    return resolve_algorithm(OmegaConf.create(config), ("advantages", "correct", *brought))


@pytest.mark.parametrize(
    ("source", "loss", "use"),
    [
        ("pairs", "nll", "dpo, dpop, ipo, simpo, orpo or kto"),
        ("pairs", "bradley_terry", "dpo, dpop, ipo, simpo, orpo or kto"),
        ("scored_pairs", "dpo", "bradley_terry"),
        ("labels", "dpo", "kto"),
    ],
)
def test_a_loss_must_tell_the_answers_of_its_source_apart(source, loss, use):
    with pytest.raises(ConfigError) as error:
        preferences(source, loss)
    message = str(error.value)
    start = f"actor.loss.name={loss}: does not fit trainer.source={source}, whose losses take "
    assert message.startswith(start) and message.endswith(f"; use {use}")


def test_a_reference_is_refused_where_nothing_uses_it():
    for loss in ("simpo", "orpo"):
        assert preferences("pairs", loss).needs == {}
        with pytest.raises(ConfigError, match="^ref_actor.model_name=other: has no effect, as nei"):
            preferences("pairs", loss, ref="other")
    assert [*preferences("pairs", "dpo", ref="other").needs] == ["ref_logps"]
    assert [*preferences("labels", "kto", ref="other").needs] == ["ref_logps", "mismatch_kl"]


def test_kto_needs_labels():
    with pytest.raises(ConfigError, match="kto needs labels, mismatch_kl.*or the trainer dpo$"):
        preferences("rows", "kto")
