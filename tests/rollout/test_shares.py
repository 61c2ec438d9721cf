from RL2.rollout.shares import shares, spread


def test_who_gets_what():
    assert spread([0, 0, 0], 5) == [0, 1, 2, 0, 1]
    assert spread([3, 0, 1], 4) == [1, 1, 2, 1]
    assert shares([3, 3], 4) == [2, 2]
    assert shares([5, 0, 1], 4) == [4, 0, 0]
    assert shares([2, 1], 9) == [2, 1]
