"""What stands around a token loss. The numbers are held by tests/invariance."""

import torch
from omegaconf import OmegaConf

from RL2.algorithms.corrections import Corrections, corrected


def tokens(**fields):
    made = {"logps": -1.0, "entropy": 2.0, "old_logps": -1.5} | fields
    return {name: torch.tensor([value]) for name, value in made.items()}


def test_what_a_config_does_not_have_is_off():
    assert Corrections.of(OmegaConf.create({"lr": 1.0})) == Corrections()
    losses = torch.tensor([3.0])
    same, metrics = corrected(losses, tokens(llm_logps=-9.0, ref_logps=-9.0), Corrections())
    assert torch.equal(same, losses)
    assert metrics.keys() == {"actor/entropy", "actor/kl", "rollout/llm_kl"}


def test_each_key_has_its_effect():
    node = {
        "tis_coef": 2.0, "tis_type": "mask", "entropy": {"coef": 0.5},
        "kl": {"coef": 10.0, "type": "loss", "loss_estimator": "k1"},
    }  # fmt: skip
    found = Corrections.of(OmegaConf.create(node))
    assert found == Corrections(2.0, "mask", 0.5, 10.0, "loss", "k1")
    losses = torch.tensor([3.0])
    objective, metrics = corrected(losses, tokens(llm_logps=-1.5, ref_logps=-1.25), found)
    assert objective.item() == 3.0 - 0.5 * 2.0 + 10.0 * 0.25
    assert metrics["actor/tis_masked"].item() == 0
    objective, metrics = corrected(losses, tokens(llm_logps=-9.0), found)
    assert objective.item() == -1.0 and metrics["actor/tis_masked"].item() == 1
