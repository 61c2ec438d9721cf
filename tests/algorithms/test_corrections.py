"""What stands around a token loss. The numbers are held by tests/invariance."""

import torch
from omegaconf import OmegaConf

from RL2.algorithms.corrections import Corrections, penalised, reweighted


def tokens(**fields):
    made = {"logps": -1.0, "entropy": 2.0, "old_logps": -1.5} | fields
    return {name: torch.tensor([value]) for name, value in made.items()}


def test_what_a_config_does_not_have_is_off():
    assert Corrections.of(OmegaConf.create({"lr": 1.0})) == Corrections()
    losses = torch.tensor([3.0])
    given = tokens(llm_logps=-9.0, ref_logps=-9.0)
    same, metrics = penalised(losses, given, Corrections())
    assert torch.equal(same, losses)
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
