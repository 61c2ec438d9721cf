"""What a run says of itself before its first step."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from RL2.trainer.startup.banner import banner, short
from tests.trainer.support import composed, overrides


@pytest.mark.parametrize(
    ("n", "text"), [(7, "7"), (1_054_720, "1.05M"), (4_022_468_096, "4.02B"), (90_000, "90K")]
)
def test_numbers(n, text):
    assert short(n) == text


@pytest.mark.parametrize(
    ("trainer", "done", "steps"),
    [
        ("spo", 0, "steps 1 to 40, 8 rows of spo; "),
        ("spo", 20, "steps 21 to 40, 8 rows of spo; "),
        ("sft", 40, "all 40 steps done, 8 rows of sft; "),
    ],
)
def test_two_lines(tmp_path, trainer, done, steps):
    config = composed(trainer, overrides(tmp_path, trainer, tmp_path / "run"))
    model = nn.Linear(1000, 2)
    model.bias.requires_grad_(False)
    source = SimpleNamespace(
        rows={"training rows": 24, "test rows": 10}, per_step=f"8 rows of {trainer}"
    )
    first, second = banner(
        config, torch.device("cpu"), 2, model.parameters(), torch.float32, source, done, 40
    )
    assert first.startswith(f"{tmp_path}/model: 2K of 2K parameters trained by ")
    n = torch.get_num_threads()
    assert f" in float32 on 2 x CPU ({n} thread" in first
    assert first.endswith("; 24 training rows, 10 test rows")
    assert second.startswith(steps) and second.endswith(f"is written to {tmp_path}/run")


@pytest.mark.parametrize(
    ("max_steps", "done", "expected"),
    [
        (50, 0, "steps 1 to 40 (trainer.n_epochs=1 ends there, before trainer.max_steps=50), "),
        (50, 40, "all 40 steps done (trainer.n_epochs=1 ends there, before trainer.max_steps=50)"),
        (40, 0, "steps 1 to 40, 8 rows; "),
    ],
)
def test_says_why_the_steps_end_before_max_steps(tmp_path, max_steps, done, expected):
    lines = overrides(tmp_path, "sft", tmp_path / "run", trainer__max_steps=max_steps)
    _, second = banner(
        composed("sft", lines), torch.device("cpu"), 1, [], torch.float32,
        SimpleNamespace(rows={}, per_step="8 rows"), done, 40,
    )  # fmt: skip
    assert second.startswith(expected)
