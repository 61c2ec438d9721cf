import json
import random

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from RL2.datasets import collate, make_loader
from RL2.datasets.base import option
from RL2.runtime.errors import DataError


class Numbers(Dataset):
    """Item i is i."""

    key = "train_data"
    batch_size_key = "train_data.prompts_per_rollout"

    def __init__(self, size: int, fingerprint: str = "") -> None:
        self.size, self.fingerprint = size, fingerprint

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def batches(loader, n: int) -> list[list[int]]:
    """The next n batches, epoch after epoch, as a training loop takes them."""
    taken = []
    while len(taken) < n:
        for batch in loader:
            taken.append(batch)
            if len(taken) == n:
                return taken
    return taken


# ------------------------------------------------------------------------------ collate


def sequence(n: int, **fields) -> dict:
    return {
        "token_ids": list(range(10, 10 + n)),
        "action_mask": [i >= n // 2 for i in range(n)],
        **fields,
    }


def test_collate_shifts_and_pads():
    batch = collate(
        [
            {"token_ids": [1, 2, 3, 4], "action_mask": [False, False, True, True]},
            {"token_ids": [5, 6], "action_mask": [False, True]},
        ]
    )
    expected = {
        "states": torch.tensor([[1, 2, 3], [5, 0, 0]]),
        "actions": torch.tensor([[2, 3, 4], [6, 0, 0]]),
        "action_mask": torch.tensor([[False, True, True], [True, False, False]]),
        "lengths": torch.tensor([3, 1]),
        "sample_ids": torch.tensor([0, 1]),
        "group_ids": torch.tensor([0, 1]),
    }
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value) and batch[name].dtype == value.dtype, name


def test_collate_floats_follow_the_next_token_and_are_zero_off_the_mask():
    batch = collate(
        [
            sequence(4, llm_logps=[-1.0, -2.0, -3.0, -4.0], rewards=[9.0, 9.0, 0.0, 1.0]),
            sequence(2, llm_logps=[-5.0, -6.0], rewards=[9.0, 2.0]),
        ]
    )
    assert batch["llm_logps"].tolist() == [[0, -3, -4], [-6, 0, 0]]
    assert batch["rewards"].tolist() == [[0, 0, 1], [2, 0, 0]]
    assert batch["rewards"].dtype == batch["llm_logps"].dtype == torch.float32


def test_collate_takes_ids_of_the_sequences():
    batch = collate(
        [sequence(3, sample_ids=7, group_ids=2), sequence(3, sample_ids=7, group_ids=2)]
    )
    assert batch["sample_ids"].tolist() == [7, 7] and batch["group_ids"].tolist() == [2, 2]
    assert batch["sample_ids"].dtype == torch.int64


def test_collate_inverts():
    generator = random.Random(0)
    sequences = [
        {
            "token_ids": [generator.randrange(1000) for _ in range(n)],
            "action_mask": [generator.random() < 0.5 for _ in range(n)],
        }
        for n in (1, 2, 17, 5)
    ]
    batch = collate(sequences)
    for i, row in enumerate(sequences):
        n = batch["lengths"][i]
        assert batch["states"][i, :n].tolist() == row["token_ids"][:-1]
        assert batch["actions"][i, :n].tolist() == row["token_ids"][1:]
        assert batch["action_mask"][i, :n].tolist() == row["action_mask"][1:]
        assert not batch["action_mask"][i, n:].any()


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "no sequences"),
        ([sequence(0)], "no tokens"),
        ([sequence(3, rewards=[0.0])], "rewards of sequence 0 has 1 entries for 3 tokens"),
        ([sequence(3), sequence(3, rewards=[0.0] * 3)], "sequence 1 has the fields"),
    ],
)
def test_collate_refuses(sequences, message):
    with pytest.raises(ValueError, match=message):
        collate(sequences)


# ------------------------------------------------------------------------------ loader


def test_loader_covers_an_epoch_once_and_reshuffles():
    loader = make_loader(Numbers(20), 5, seed=0)
    first, second = batches(loader, 4), batches(loader, 4)
    assert len(loader) == 4
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(20))
    assert first != second and sum(first, []) != list(range(20))


def test_loader_order_is_the_seed_alone():
    torch.manual_seed(1)
    first = batches(make_loader(Numbers(20), 5, seed=3), 12)
    torch.manual_seed(2)
    assert batches(make_loader(Numbers(20), 5, seed=3), 12) == first
    orders = {json.dumps(batches(make_loader(Numbers(20), 5, seed=s), 12)) for s in range(-3, 10)}
    assert len(orders) == 13
    # No epoch of one seed is an epoch of the next one.
    other = batches(make_loader(Numbers(20), 5, seed=4), 12)
    assert first[4:8] != other[:4]


def test_loader_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    batches(make_loader(Numbers(20), 5, seed=3), 12)
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_with_a_rest():
    loader = make_loader(Numbers(7), 3, seed=0, drop_last=False)
    for epoch in (list(loader), list(loader)):
        assert [len(batch) for batch in epoch] == [3, 3, 1]
        assert sorted(sum(epoch, [])) == list(range(7))
    assert len(loader) == 3


def test_loader_drops_the_rest():
    loader = make_loader(Numbers(7), 3, seed=0)
    assert len(loader) == 2 and [len(batch) for batch in loader] == [3, 3]
    assert loader.batch_sampler.epoch == 1


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("done", range(0, 14))
def test_resume_at_every_batch_gives_the_uninterrupted_order(done, drop_last):
    """Over several epochs, epoch boundaries included; the state goes through JSON."""

    def loader():
        return make_loader(Numbers(17), 4, seed=5, drop_last=drop_last)

    whole = batches(loader(), 20)
    interrupted = loader()
    assert batches(interrupted, done) == whole[:done]
    state = json.loads(json.dumps(interrupted.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    assert batches(resumed, 20 - done) == whole[done:]
    # And once more, straight after loading and from the state of the resumed loader.
    again = loader()
    again.load_state_dict(state)
    again_state = again.state_dict()
    third = loader()
    third.load_state_dict(again_state)
    assert batches(third, 20 - done) == whole[done:]


@pytest.mark.parametrize("done", [3, 4])
def test_resume_inside_one_iterator(done):
    """As a loop `for batch in loader` sees it: the state is taken while the iterator lives."""
    loader = make_loader(Numbers(16), 4, seed=5)
    whole = batches(make_loader(Numbers(16), 4, seed=5), 12)
    iterator = iter(loader)
    taken = [next(iterator) for _ in range(done)]
    state = loader.state_dict()
    resumed = make_loader(Numbers(16), 4, seed=5)
    resumed.load_state_dict(state)
    assert taken + batches(resumed, 12 - done) == whole
    # The first pass of the resumed loader is never an empty epoch.
    resumed.load_state_dict(state)
    assert len(list(resumed)) == (1 if done == 3 else 4)


def test_state_of_an_ended_epoch_resumes():
    loader = make_loader(Numbers(16), 4, seed=5)
    whole = batches(make_loader(Numbers(16), 4, seed=5), 12)
    first = list(loader)  # up to StopIteration
    resumed = make_loader(Numbers(16), 4, seed=5)
    resumed.load_state_dict(loader.state_dict())
    assert first + list(resumed) + list(resumed) == whole


def test_broken_off_iteration_goes_on():
    loader = make_loader(Numbers(16), 4, seed=5)
    whole = batches(make_loader(Numbers(16), 4, seed=5), 4)
    assert batches(loader, 2) + list(loader) == whole


def test_resume_with_another_batch_size_repeats_and_skips_nothing():
    loader = make_loader(Numbers(16), 4, seed=5)
    taken = sum(batches(loader, 2), [])
    resumed = make_loader(Numbers(16), 2, seed=5)
    resumed.load_state_dict(loader.state_dict())
    assert sorted(taken + sum(resumed, [])) == list(range(16))
    # Less than a batch is left of the epoch: the next one begins.
    resumed = make_loader(Numbers(16), 12, seed=5)
    resumed.load_state_dict(loader.state_dict())
    assert next(iter(resumed)) == resumed.batch_sampler.order(1)[:12]


def test_resume_with_other_data_is_refused():
    state = make_loader(Numbers(16), 4, seed=5).state_dict()
    loader = make_loader(Numbers(15), 4, seed=5)
    loader.load_state_dict(state)
    with pytest.raises(DataError, match=r"train_data.path: the data set has 15 rows, .* with 16"):
        next(iter(loader))
    loader = make_loader(Numbers(16, fingerprint="other"), 4, seed=5)
    loader.load_state_dict(state)
    with pytest.raises(DataError, match=r"train_data.path: the data set has 16 rows, but not tho"):
        next(iter(loader))


def test_smaller_than_a_batch():
    message = r"train_data.prompts_per_rollout=512: data set has only 100 rows; lower it"
    with pytest.raises(DataError, match=message):
        make_loader(Numbers(100), 512, seed=0)
    assert len(list(make_loader(Numbers(100), 512, seed=0, drop_last=False))) == 1


# ------------------------------------------------------------------------------ the rest


def test_option_takes_absent_and_null():
    config = OmegaConf.create({"a": None, "b": 1})
    assert option(config, "a", 5) is None and option(config, "b", 5) == 1
    assert option(config, "c", 5) == 5
