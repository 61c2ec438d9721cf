"""What stands around a token loss. The numbers are held by tests/invariance."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from RL2.algorithms.corrections import Corrections, penalised, reweighted


def tokens(**fields):
    made = {"logps": -1.0, "entropy": 2.0, "old_logps": -1.5, "loss_weights": 1.0} | fields
    return {name: torch.tensor([value]) for name, value in made.items()}


def test_what_a_config_does_not_have_is_off():
    assert Corrections.of(OmegaConf.create({"lr": 1.0})) == Corrections()
    losses = torch.tensor([3.0])
    given = tokens(llm_logps=-9.0, ref_logps=-9.0)
    same, metrics = penalised(losses, given, Corrections())
    assert same.item() == 3.0
    same, masked = reweighted(losses, given["old_logps"], given["llm_logps"], Corrections())
    assert torch.equal(same, losses) and masked is None
    assert metrics.keys() == {"actor/entropy", "actor/kl", "rollout/llm_kl"}


def test_each_key_has_its_effect():
    node = {
        "tis_coef": 2.0, "tis_type": "mask", "entropy": {"coef": 0.5},
        "kl": {"coef": 10.0, "type": "loss", "loss_estimator": "k1"},
    }  # fmt: skip
    found = Corrections.of(OmegaConf.create(node))
    assert found == Corrections(2.0, "mask", 0.5, 10.0, "loss", "k1")
    losses = torch.tensor([3.0])
    given = tokens(llm_logps=-1.5, ref_logps=-1.25)
    objective, _ = penalised(losses, given, found)
    assert objective.item() == 3.0 - 0.5 * 2.0 + 10.0 * 0.25
    for llm_logps, expected, masked in ((-1.5, 3.0, 0), (-9.0, 0.0, 1)):
        of_engine = torch.tensor([llm_logps])
        weighed, mask = reweighted(losses, given["old_logps"], of_engine, found)
        assert weighed.item() == expected and mask.item() == masked


def test_weights_of_sequences_take_the_place_of_those_of_tokens():
    losses, old_logps, llm_logps = torch.tensor([3.0]), torch.tensor([-1.5]), torch.tensor([-9.0])
    for kind, masked in (("sequence_truncate", None), ("geometric_mask", 0), ("token_reject", 0)):
        corrections = Corrections(tis_coef=2.0, tis_type=kind)
        assert corrections.of_sequences
        found = reweighted(losses, old_logps, llm_logps, corrections, torch.tensor([0.5]))
        assert found[0].item() == 1.5 and found[1] == masked
    assert not Corrections(tis_coef=0.0, tis_type="sequence_mask").of_sequences
    assert not Corrections(tis_coef=2.0, tis_type="mask").of_sequences


def kl_of(logps, **kl):
    """The penalty of one token, with k3, and its gradient."""
    kl = {"coef": 2.0, "type": "loss", "loss_estimator": "k3"} | kl
    given = tokens(ref_logps=-1.25, old_logps=-1.25) | {"logps": torch.tensor([logps])}
    given = {name: x.double() for name, x in given.items()} | {"loss_weights": torch.ones(1) / 2}
    if kl.get("avg_level"):
        given["kl_weights"] = torch.ones(1)
    found = Corrections.of(OmegaConf.create({"kl": kl}))

    def penalty(x):
        return penalised(torch.zeros(1).double(), given | {"logps": x}, found)[0]

    x = given["logps"].requires_grad_()
    assert torch.autograd.gradcheck(penalty, x)
    return penalty(x).item(), torch.autograd.grad(penalty(x), x)[0].item()


def test_the_kl_of_the_loss():
    """logps -1.0, d = 0.25: k3 is exp(-0.25) - 0.75, its derivative 1 - exp(-0.25)."""
    k3, slope = math.exp(-0.25) - 0.75, 1 - math.exp(-0.25)
    assert kl_of(-1.0) == pytest.approx((k3, slope))  # coef 2, weight 1/2
    assert kl_of(-1.0, avg_level="sequence_sum") == pytest.approx((2 * k3, 2 * slope))
    ratio = math.exp(0.25)
    assert kl_of(-1.0, unbiased=True) == pytest.approx((ratio * k3, ratio * (slope + k3)))
    # the reference's gradient of KL(policy || reference): d * ratio
    assert kl_of(-1.0, unbiased=True)[1] == pytest.approx(0.25 * ratio)
    assert kl_of(-1.0, clamp=0.01) == (pytest.approx(0.01), 0.0)
    assert kl_of(-1.0, clamp=0.01, unbiased=True) == pytest.approx((0.01 * ratio, 0.01 * ratio))
