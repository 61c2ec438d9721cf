"""Conversations whose chat template shows a turn in another way when turns follow it: every turn
stands as the policy writes it, behind what the policy sees."""

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from RL2.datasets import SFTDataset
from RL2.datasets.end_of_turn import end_tokens
from RL2.datasets.messages import learned_turns
from RL2.datasets.prompts import render
from RL2.trainer.sources.rows import RowSource
from tests.chat_templates import FAMILIES, tokenizer_of

# Thoughts are shown behind the last question only; `m.content` is what follows them.
_THOUGHTS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
_SHOWN = "{% if m.thoughts and loop.index0 > ns.last %}<think>{{ m.thoughts }}</think>{% endif %}"


def with_thoughts(name: str) -> str:
    """A family's template as its reasoning models have it."""
    text = FAMILIES[name].template
    before, content = text.rpartition("{{ m.content")[::2]
    if name in ("llama3", "gemma"):
        content = " | trim" + content.removeprefix(" | trim")
    return _THOUGHTS + before + _SHOWN + "{{ m.content" + content


TEMPLATES = {name: FAMILIES[name].template for name in FAMILIES} | {
    f"{name} with thoughts": with_thoughts(name)
    for name in ("chatml", "chatml_base", "llama3", "gemma", "phi3", "phi4_mini", "glm")
}


def tokenizer_for(name: str):
    tokenizer = tokenizer_of(FAMILIES[name.removesuffix(" with thoughts")])
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def talk_of(rng: random.Random) -> list[dict]:
    """One to four questions, each with an answer or several, of which some are not learned."""
    talk = []
    for _ in range(rng.randint(1, 4)):
        talk.append({"role": "user", "content": f"is it {rng.randint(0, 9)}?"})
        for number in range(rng.randint(1, 2)):
            if number:
                talk.append({"role": "tool", "content": "42"})
            turn = {"role": "assistant", "content": f"answer {rng.randint(0, 999)}"}
            turn |= {"thoughts": f"hm {rng.randint(0, 99)}"} if rng.random() < 0.7 else {}
            talk.append(turn | ({"weight": 0} if rng.random() < 0.2 else {}))
    return talk if rng.random() < 0.7 else [*talk, {"role": "user", "content": "thanks"}]


def load(tokenizer, talks: list, folder: Path) -> SFTDataset:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return SFTDataset(OmegaConf.create({"path": str(path)}), tokenizer)


def stretches(tokenizer, item) -> list[tuple[str, str]]:
    """Of each stretch that is learned, the text before it and its own."""
    found = []
    for sequence in item if isinstance(item, list) else [item]:
        ids, mask = sequence["token_ids"], sequence["action_mask"]
        edges = [i for i in range(1, len(ids)) if mask[i] != mask[i - 1]]
        edges += [len(ids)] if mask[-1] else []
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            found.append((tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:end])))
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_stands_as_it_is_generated(name, tmp_path):
    """Once, in order, behind its own prompt, and up to a token at which a rollout stops."""
    tokenizer, rng = tokenizer_for(name), random.Random(name)
    talks = [talk for talk in (talk_of(rng) for _ in range(40)) if any(
        turn["role"] == "assistant" and turn.get("weight", 1) for turn in talk)]  # fmt: skip
    ends = tokenizer.convert_ids_to_tokens(list(end_tokens(tokenizer).ids))
    n_split = 0
    for talk, item in zip(talks, load(tokenizer, talks, tmp_path), strict=True):
        found = stretches(tokenizer, item)
        turns = learned_turns(talk)
        shown = partial(render, tokenizer)
        prompts = [shown(talk[:i], add_generation_prompt=True) for i in turns]
        assert [before for before, _ in found] == prompts
        for i, (before, written) in zip(turns, found, strict=True):
            whole = shown(talk[: i + 1], add_generation_prompt=False).removeprefix(before)
            end = next(end for end in ends if written.endswith(end))
            assert whole.startswith(written.removesuffix(end))
            assert talk[i]["content"] in written
            assert talk[i].get("thoughts", "") in written or "thoughts" not in name
        n_split += isinstance(item, list)
    assert (n_split > 0) == (name.endswith("with thoughts") or name == "harmony")


def test_turns_that_stay_as_they_are_share_a_sequence(tmp_path):
    """Calls of tools behind the last question keep their thoughts; earlier ones lose them."""
    tokenizer = tokenizer_for("chatml with thoughts")
    thinks = {"role": "assistant", "content": "yes", "thoughts": "hm"}
    ask, tool = {"role": "user", "content": "is it?"}, {"role": "tool", "content": "42"}
    talks = [
        [ask, thinks, tool, thinks],
        [ask, thinks, ask, thinks],
        [ask, thinks, tool, thinks, ask, thinks, tool, thinks],
        [ask, thinks, ask],
        [ask, {"role": "assistant", "content": "yes"}, ask, thinks],
    ]
    found = [
        item if isinstance(item, list) else [item] for item in load(tokenizer, talks, tmp_path)
    ]
    assert [len(item) for item in found] == [1, 2, 2, 1, 1]
    assert [len(stretches(tokenizer, item)) for item in found] == [2, 2, 4, 1, 2]
    # What follows would be shown behind another text, so the first sequence ends with its turn.
    for item in (found[1], found[3]):
        assert tokenizer.decode(item[0]["token_ids"]).endswith("<think>hm</think>yes<|im_end|>")


def test_the_sequences_of_a_row_are_one_sample(tmp_path):
    tokenizer = tokenizer_for("chatml with thoughts")
    thinks = {"role": "assistant", "content": "yes", "thoughts": "hm"}
    ask = {"role": "user", "content": "is it?"}
    talks = [[ask, thinks], [ask, thinks, ask, thinks, ask, thinks], [ask, thinks]]
    dataset = load(tokenizer, talks, tmp_path)
    batch = RowSource.batch(None, list(dataset))
    assert batch["sample_ids"].tolist() == [0, 1, 1, 1, 2] == batch["group_ids"].tolist()
    assert torch.equal(batch["advantages"], batch["action_mask"].float())
    assert len(batch["states"]) == len(batch["correct"]) == 5


def test_a_row_is_too_long_if_one_of_its_sequences_is(tmp_path):
    tokenizer = tokenizer_for("chatml with thoughts")
    thinks = {"role": "assistant", "content": "yes", "thoughts": "hm" * 40}
    ask = {"role": "user", "content": "is it?"}
    talks = [[ask, thinks, ask, thinks | {"thoughts": "hm"}], [ask, thinks | {"thoughts": "hm"}]]
    whole = load(tokenizer, talks, tmp_path)
    longest = max(len(one["token_ids"]) for one in whole[0])
    config = {"path": str(tmp_path / "rows.jsonl"), "overlong": "drop", "max_length": longest - 1}
    (kept,) = SFTDataset(OmegaConf.create(config), tokenizer)
    assert kept == whole[1]
