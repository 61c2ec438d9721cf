import torch

from RL2.algorithms import resolve_advantage

BATCH = {
    "teacher_logps": torch.tensor([[0.0, -1.0, -2.0], [0.0, -0.5, 0.0]]),
    "old_logps": torch.tensor([[0.0, -1.5, -1.0], [0.0, -0.25, 0.0]]),
    "action_mask": torch.tensor([[False, True, True], [False, True, False]]),
    "rewards": torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]).double(),
    "sample_ids": torch.tensor([0, 1]),
    "group_ids": torch.tensor([0, 0]),
}


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


def test_ones():
    assert torch.equal(advantages(estimator="ones"), BATCH["action_mask"].float())
