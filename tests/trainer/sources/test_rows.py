"""Which rows each step of sft takes."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from RL2.datasets.end_of_turn import end_tokens
from RL2.runtime.errors import RL2Error
from RL2.trainer.sources.rows import RowSource
from tests.faults.support import Run
from tests.trainer.support import (
    rows_of,
    same_weights,
    train,
    weights,
    write_model,
    write_rows,
)


def source(folder, n_rows: int, batch_size: int, tokenizer) -> RowSource:
    rows = [{"prompt": "p", "response": chr(ord("A") + i)} for i in range(n_rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(folder / "rows.jsonl"), "batch_size": batch_size}
    config = OmegaConf.create({"data": data, "trainer": {"seed": 3, "source": "rows"}})
    return RowSource(config, tokenizer, end_tokens(tokenizer))


def taken(source: RowSource, n_steps: int, tokenizer) -> list[str]:
    """The responses of each step."""
    batches = [source.collect(step, last=False)[0] for step in range(1, n_steps + 1)]
    return [tokenizer.decode(batch["actions"][:, 0].tolist()) for batch in batches]


@pytest.mark.parametrize(
    ("n_rows", "batch_size", "sizes"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 4, 1]), (8, 4, [4, 4]), (3, 128, [3]), (1, 1, [1])],
)
def test_every_row_counts_once_an_epoch(tmp_path, tiny_tokenizer, n_rows, batch_size, sizes):
    whole = source(tmp_path, n_rows, batch_size, tiny_tokenizer)
    assert whole.steps_per_epoch == len(sizes)
    steps = taken(whole, 3 * len(sizes), tiny_tokenizer)
    assert [len(step) for step in steps] == 3 * sizes
    expected = "".join(chr(ord("A") + i) for i in range(n_rows))
    for epoch in range(3):
        rows = "".join(steps[epoch * len(sizes) : (epoch + 1) * len(sizes)])
        assert "".join(sorted(rows)) == expected
    for done in range(3 * len(sizes)):
        first = source(tmp_path, n_rows, batch_size, tiny_tokenizer)
        taken(first, done, tiny_tokenizer)
        resumed = source(tmp_path, n_rows, batch_size, tiny_tokenizer)
        resumed.load_state_dict([json.loads(json.dumps(first.state_dict()))])
        assert taken(resumed, 3 * len(sizes) - done, tiny_tokenizer) == steps[done:]


def test_what_is_left_of_an_epoch_is_said_once(tmp_path, tiny_tokenizer, caplog):
    with caplog.at_level("INFO", logger="RL2"):
        source(tmp_path, 10, 4, tiny_tokenizer)
    assert caplog.messages == [
        "data.batch_size=4: the last step of each epoch takes the remaining 2 of 10 rows"
    ]
    caplog.clear()
    with caplog.at_level("INFO", logger="RL2"):
        source(tmp_path, 3, 128, tiny_tokenizer)
        source(tmp_path, 8, 4, tiny_tokenizer)
    assert caplog.messages == [
        "data.batch_size=128: the data set has only 3 rows, so each step takes all of them"
    ]


@pytest.mark.parametrize(
    ("field", "said"),
    [
        (lambda n: torch.zeros(2 * n), r"pair_ids of a batch has the shape \[2\], expected \[1\]"),
        (lambda n: torch.zeros(n, 1, 1), r"pair_ids of a batch has the shape \[1, 1, 1\]"),
        (lambda n: torch.zeros(n if n == 1 else 1), r"pair_ids of a batch has the shape \[1\]"),
        (lambda n: torch.zeros(n) if n == 1 else 1 // 0, "batch raised ZeroDivisionError: "),
    ],
)
def test_a_batch_that_does_not_fit_is_one_line(tmp_path, tiny_tokenizer, monkeypatch, field, said):
    make = RowSource.batch
    monkeypatch.setattr(
        RowSource, "batch", lambda self, items: make(self, items) | {"pair_ids": field(len(items))}
    )
    with pytest.raises(RL2Error, match=said):
        source(tmp_path, 4, 4, tiny_tokenizer).collect(1, last=False)


def test_a_last_step_of_one_row_on_two_processes(tmp_path):
    """One rank has nothing there; and the run goes on after it."""
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 9)
    changes = {"data__batch_size": 4, "trainer__n_epochs": 2, "trainer__save_freq": 3}
    one = train(tmp_path, "sft", tmp_path / "one", **changes)
    Run(tmp_path, "sft", tmp_path / "two", 2, **changes).finish()
    two = rows_of(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2, 3, 4, 5, 6]
    for row, other in zip(one, two, strict=True):
        for name in ("actor/loss", "actor/grad_norm", "actor/lr", "train/avg_response_length"):
            assert other[name] == pytest.approx(row[name], rel=1e-5), (name, row["step"])
    last = weights(tmp_path / "one/final")
    for name, weight in last.items():
        torch.testing.assert_close(weights(tmp_path / "two/final")[name], weight, rtol=0, atol=5e-5)
    checkpoint = tmp_path / "one/checkpoints/step000003"
    resumed = train(
        tmp_path, "sft", tmp_path / "more", **changes, trainer__load_ckpt_from=checkpoint
    )
    assert [row["step"] for row in resumed] == [4, 5, 6]
    assert [row["actor/loss"] for row in resumed] == [row["actor/loss"] for row in one[3:]]
    assert same_weights(weights(tmp_path / "more/final"), last)


def test_what_is_read_is_a_list_or_a_data_set(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(RowSource, "read", lambda *_: ("a", "b"))
    with pytest.raises(RL2Error, match="rows: read returned a tuple; return a list$"):
        source(tmp_path, 1, 1, tiny_tokenizer)
