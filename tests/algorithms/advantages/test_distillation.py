import torch

from RL2.algorithms import resolve_advantage

BATCH = {
    "teacher_logps": torch.tensor([[-3.0, -1.0, -2.0], [0.0, -0.5, -4.0]]),
    "old_logps": torch.tensor([[0.0, -1.5, -1.0], [0.0, -0.25, 0.0]]),
    "action_mask": torch.tensor([[False, True, True], [False, True, False]]),
    "rewards": torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]).double(),
    "sample_ids": torch.tensor([0, 1]),
    "group_ids": torch.tensor([0, 0]),
}
IDS = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])


def advantages(**node):
    return resolve_advantage(node)(BATCH)["advantages"].float()


def test_reverse_kl():
    expected = torch.tensor([[0.0, 0.5, -1.0], [0.0, -0.25, 0.0]])
    estimator = resolve_advantage({"estimator": "reverse_kl"})
    assert not {"rewards", "correct"} & {*estimator.inputs}
    assert torch.equal(advantages(estimator="reverse_kl"), expected)
    assert torch.equal(advantages(estimator="reverse_kl", teacher_coef=2.0), 2 * expected)


def test_beside_the_reward():
    found = advantages(estimator="reinforce_reverse_kl", teacher_coef=0.1)
    expected = torch.tensor([[0.0, 0.55, 0.4], [0.0, -0.525, 0.0]])  # 0.5 and -0.5 of the reward
    torch.testing.assert_close(found, expected)
    found = advantages(estimator="reinforce_reverse_kl", teacher_coef=0.1, norm_var=True)
    torch.testing.assert_close(found[0, 1].item(), 0.05 + 0.5**0.5)
    # a third sample, alone in its group, with a reward of 2: less the mean of all, which is 1
    three = {name: torch.cat([x, x[1:]]) for name, x in BATCH.items()}
    three["rewards"][2, 1], three["sample_ids"], three["group_ids"] = 2.0, *IDS
    estimator = resolve_advantage({"estimator": "reinforce_reverse_kl", "global_norm": True})
    found = estimator(three)["advantages"].float()
    torch.testing.assert_close(found[:, 1], torch.tensor([0.5, -1.25, 0.75]))


def test_ones():
    assert torch.equal(advantages(estimator="ones"), BATCH["action_mask"].float())
