"""The learning rate of every step, against its formula."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from RL2.workers.schedule import schedule

N, WARMUP, LR = 20, 4, 1e-3
FALLING = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "polynomial": lambda x: 1 - x,
}


def make(scheduler, done=0, **changes):
    node = {
        "scheduler": scheduler, "lr": LR, "betas": [0.9, 0.999], "weight_decay": 0.5,
        "warmup_ratio": WARMUP / N, "decay_ratio": None, "min_lr_ratio": 0.0,
    }  # fmt: skip
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    return optimizer, schedule(optimizer, OmegaConf.create(node | changes), N, done)


def rates(scheduler, done=0, **changes):
    optimizer, made = make(scheduler, done, **changes)
    found = []
    for _ in range(done, N + 1):
        found.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    return found


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("scheduler", FALLING)
def test_it_rises_and_falls_to_its_floor(scheduler, floor):
    def factor(step):
        if step < WARMUP:
            return step / WARMUP
        least = 1e-7 / LR if (scheduler, floor) == ("polynomial", 0.0) else floor
        return least + (1 - least) * FALLING[scheduler]((step - WARMUP) / (N - WARMUP))

    expected = [LR * factor(step) for step in range(N + 1)]
    assert rates(scheduler, min_lr_ratio=floor) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_others_keep_above_their_floor_too():
    low = rates("cosine_with_restarts", min_lr_ratio=0.25)
    assert low[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert low[-1] == pytest.approx(2.5e-4)
    slow = rates("inverse_sqrt", min_lr_ratio=0.25)
    assert slow[16] == pytest.approx(LR * (0.25 + 0.75 / 2))  # 1 / sqrt(16 / 4)
    constant = rates("constant")  # its warm-up too, which transformers' schedule of that name lacks
    assert constant == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, *[1e-3] * 17])
    stable = rates("warmup_stable_decay", min_lr_ratio=0.2, decay_ratio=0.4)
    assert stable[4:13] == [LR] * 9
    assert stable[16] == pytest.approx(LR * (0.2 + 0.8 / 2))  # half of its 8 steps of decay
    assert stable[20] == pytest.approx(LR * 0.2)
    assert rates("warmup_stable_decay")[18:] == pytest.approx([1e-3, 5e-4, 0])  # a tenth of them


@pytest.mark.parametrize("scheduler", [*FALLING, "warmup_stable_decay"])
def test_a_resumed_schedule_goes_on(scheduler):
    whole = rates(scheduler, min_lr_ratio=0.1)
    assert rates(scheduler, done=7, min_lr_ratio=0.1) == whole[7:]


def test_the_keys_of_the_optimizer_are_those_of_the_config():
    optimizer, _ = make("constant", betas=[0.8, 0.95])
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["initial_lr"]) == ((0.8, 0.95), 0.5, LR)
    weight = group["params"][0]
    group["lr"] = 1.0
    for gradient in (2.0, -1.0):  # the moments are 0.4, 0.2, then 0.12, 0.24
        weight.grad = torch.tensor([gradient])
        optimizer.step()
    assert optimizer.state[weight]["exp_avg"].item() == pytest.approx(0.8 * 0.4 - 0.2)
    assert optimizer.state[weight]["exp_avg_sq"].item() == pytest.approx(0.95 * 0.2 + 0.05)
