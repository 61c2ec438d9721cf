import pytest
import torch

from RL2.datasets.base import collate
from RL2.datasets.context import after_prompts, by_template
from RL2.datasets.rows import BadRow


def test_the_same_responses_after_other_prompts():
    batch = collate(
        [
            {"token_ids": [1, 2, 3, 4, 5], "action_mask": [False, False, True, True, True]},
            {"token_ids": [6, 7, 8], "action_mask": [False, True, False]},
            {"token_ids": [9, 9], "action_mask": [False, False]},
        ]
    )
    found = after_prompts(batch, [[10], [11, 12, 13, 14], [15]])
    assert found["lengths"].tolist() == [3, 5, 1]
    assert found["states"].tolist() == [[10, 3, 4, 0, 0], [11, 12, 13, 14, 7], [9, 0, 0, 0, 0]]
    assert found["actions"].tolist() == [[3, 4, 5, 0, 0], [12, 13, 14, 7, 8], [9, 0, 0, 0, 0]]
    assert torch.equal(
        found["actions"][found["action_mask"]], batch["actions"][batch["action_mask"]]
    )
    assert found["action_mask"].sum(-1).tolist() == [3, 1, 0]


def test_template():
    context = by_template("{prompt} It is {answer}.")
    assert context("2 + 2?", {"answer": 4}) == "2 + 2? It is 4."
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2?"}]
    made = context(messages, {"answer": 4})
    assert made == [messages[0], {"role": "user", "content": "2 + 2? It is 4."}]
    assert messages[1]["content"] == "2 + 2?"
    with pytest.raises(BadRow, match=r"KeyError: 'answer'\); the row has prompt, hint"):
        context("2 + 2?", {"hint": 1})
