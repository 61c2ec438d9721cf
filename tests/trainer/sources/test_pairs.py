"""What batches of pairs and of labelled answers hold."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from RL2.algorithms import resolve_loss
from RL2.algorithms.segments import fault_of
from RL2.datasets.end_of_turn import end_tokens
from RL2.runtime.errors import ConfigError
from RL2.trainer.sources.pairs import LabelSource, PairSource, ScoredPairSource
from RL2.trainer.sources.rows import RowSource
from RL2.trainer.startup.inputs import check_room

PAIRS = [{"prompt": "p", "chosen": c, "rejected": c.lower() * 3} for c in "ABCDE"]
LABELS = [{"prompt": "p", "completion": c, "label": c < "C"} for c in "ABCDE"]


def source(make: type[RowSource], folder, rows: list, tokenizer) -> RowSource:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(folder / "rows.jsonl"), "batch_size": 2, "max_length": 12}
    config = OmegaConf.create({"data": data, "trainer": {"seed": 3, "source": "x"}})
    return make(config, tokenizer, end_tokens(tokenizer))


def texts(batch: dict, tokenizer) -> list[str]:
    rows = zip(batch["actions"], batch["lengths"], strict=True)
    return [tokenizer.decode(row[:n].tolist()).replace("<|im_end|>", "") for row, n in rows]


def test_batches_of_pairs(tmp_path, tiny_tokenizer):
    made = source(PairSource, tmp_path, PAIRS, tiny_tokenizer)
    assert (made.steps_per_epoch, made.per_step) == (3, "2 pairs each")
    first, _ = made.collect(1, last=False)
    chosen, rejected = (texts(first, tiny_tokenizer)[i::2] for i in (0, 1))
    assert len(chosen) == 2 and rejected == [text.lower() * 3 for text in chosen]
    assert first["pair_ids"].tolist() == [0, 0, 1, 1] == first["group_ids"].tolist()
    assert first["sample_ids"].tolist() == [0, 1, 2, 3]
    assert first["chosen"].tolist() == [True, False] * 2
    signs = torch.tensor([[1.0], [-1.0]] * 2)
    assert torch.equal(first["labels"], signs * first["action_mask"])
    assert fault_of(first, ("sequences", "pairs"), max_length=100) is None
    state = json.loads(json.dumps(made.state_dict()))
    then = [made.collect(step, last=False)[0] for step in (2, 3, 4)]
    resumed = source(PairSource, tmp_path, PAIRS, tiny_tokenizer)
    resumed.load_state_dict([state])
    for batch in then:
        again, _ = resumed.collect(0, last=False)
        assert batch.keys() == again.keys()
        assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_scored_batches_mark_the_last_position(tmp_path, tiny_tokenizer):
    batch, _ = source(ScoredPairSource, tmp_path, PAIRS, tiny_tokenizer).collect(1, last=False)
    positions = batch["action_mask"].nonzero()
    assert positions[:, 0].tolist() == [0, 1, 2, 3]
    assert torch.equal(positions[:, 1], batch["lengths"] - 1)
    # What the head reads there is the end of the answer.
    read = batch["states"].gather(1, positions[:, 1:]).squeeze(1)
    assert read.unique().tolist() == [tiny_tokenizer.eos_token_id]


def test_batches_of_labels(tmp_path, tiny_tokenizer):
    batch, _ = source(LabelSource, tmp_path, LABELS, tiny_tokenizer).collect(1, last=False)
    for text, labels, mask in zip(
        texts(batch, tiny_tokenizer), batch["labels"], batch["action_mask"], strict=True
    ):
        value = 1.0 if text < "C" else -1.0
        assert labels.tolist() == [value * action for action in mask.tolist()]


@pytest.mark.parametrize("make", [PairSource, ScoredPairSource, LabelSource])
def test_what_they_say_they_bring_is_there(tmp_path, tiny_tokenizer, make):
    rows = LABELS if make is LabelSource else PAIRS
    batch, _ = source(make, tmp_path, rows, tiny_tokenizer).collect(1, last=False)
    assert {*make.brings(None)} <= batch.keys()


def test_a_pair_that_no_micro_batch_holds_is_found_before_a_model_loads(tmp_path, tiny_tokenizer):
    pairs = [*PAIRS, {"prompt": "p", "chosen": "long", "rejected": "longest"}]  # 5 + 8 + 2 of p
    made = source(PairSource, tmp_path, pairs, tiny_tokenizer)
    loss = resolve_loss({"name": "dpo"})
    actor = OmegaConf.create({"max_length_per_device": 13, "sp_size": 1})
    check_room(actor, loss, made)
    with pytest.raises(ConfigError, match="has 13 tokens and a micro-batch 12; raise actor.max_le"):
        check_room(OmegaConf.merge(actor, {"max_length_per_device": 12}), loss, made)
