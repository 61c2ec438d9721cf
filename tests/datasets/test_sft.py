import copy
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from RL2.datasets import RLDataset, SFTDataset, collate, make_loader
from RL2.datasets.end_of_turn import end_tokens
from RL2.runtime.errors import DataError
from tests.chat_templates import FAMILIES, KINDS, tokenizer_of
from tests.prefix_tokenizers import PREFIX_TOKENIZERS

GSM8K = {"question": "How many?", "answer": "1 + 1 = 2\n#### 2"}
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "héllo"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": " two\n\n世界 "},
]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(rows: list, name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return name


def load(tokenizer, rows: list, **config) -> SFTDataset:
    return SFTDataset(OmegaConf.create({"path": write(rows), **config}), tokenizer)


def learned(tokenizer, sequence: dict) -> str:
    """Text of the tokens that are learned, a | between stretches."""
    ids, text, before = [], "", False
    for token, action in zip(sequence["token_ids"], sequence["action_mask"], strict=True):
        if before and not action:
            text, ids = text + tokenizer.decode(ids) + "|", []
        if action:
            ids.append(token)
        before = action
    return (text + tokenizer.decode(ids)).removesuffix("|")


def error_of(tokenizer, rows: list, **config) -> str:
    with pytest.raises(DataError) as caught:
        load(tokenizer, rows, **config)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------ row formats


def test_prompt_and_response(tiny_tokenizer):
    (sequence,) = load(tiny_tokenizer, [{"prompt": "a b", "response": "c"}])
    assert tiny_tokenizer.decode(sequence["token_ids"]) == "a bc<|im_end|>"
    assert sequence["action_mask"] == [False, False, False, True, True]


def test_gsm8k_row_has_the_prompt_of_rl(tiny_tokenizer):
    (sequence,) = load(tiny_tokenizer, [GSM8K])
    (item,) = RLDataset(OmegaConf.create({"path": "rows.jsonl"}), tiny_tokenizer)
    n = len(item["prompt_ids"])
    assert sequence["token_ids"][:n] == item["prompt_ids"]
    assert sequence["action_mask"] == [i >= n for i in range(len(sequence["token_ids"]))]
    assert learned(tiny_tokenizer, sequence) == GSM8K["answer"] + "<|im_end|>"


@pytest.mark.parametrize("response", ["c", "c<|im_end|>"])
def test_end_of_sequence_stands_once(tiny_tokenizer, response):
    (sequence,) = load(tiny_tokenizer, [{"prompt": "p", "response": response}])
    assert sequence["token_ids"].count(tiny_tokenizer.eos_token_id) == 1
    assert sequence["token_ids"][-1] == tiny_tokenizer.eos_token_id
    assert sequence["action_mask"][-1]


def test_messages_are_the_templates_own_rendering(tiny_tokenizer):
    (sequence,) = load(tiny_tokenizer, [{"messages": CHAT}])
    own = tiny_tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert sequence["token_ids"] == own
    # Every assistant turn with the token that ends it, not the newline behind that token.
    assert learned(tiny_tokenizer, sequence) == "one<|im_end|>| two\n\n世界 <|im_end|>"


def test_merges_over_the_edge_of_a_turn(tiny_tokenizer):
    """Tokens that begin in the generation prompt are not learned; the ids stay the template's."""
    from tokenizers import Tokenizer

    content = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    newline = "\u010a"  # a newline in the byte alphabet
    content["model"]["vocab"][newline * 2] = 259
    content["model"]["merges"] = [[newline, newline]]
    tokenizer = type(tiny_tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=tiny_tokenizer.chat_template,
    )
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "\na"}]
    (sequence,) = load(tokenizer, [{"messages": messages}])
    assert 259 in sequence["token_ids"]
    assert (
        sequence["token_ids"]
        == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    )
    assert learned(tokenizer, sequence) == "a<|im_end|>"


def test_kinds_of_rows_mix_in_order(tiny_tokenizer):
    rows = [{"messages": CHAT}, GSM8K, {"prompt": "p", "response": "r"}, {"messages": CHAT[:3]}]
    texts = [learned(tiny_tokenizer, sequence) for sequence in load(tiny_tokenizer, rows)]
    assert [text[:3] for text in texts] == ["one", "1 +", "r<|", "one"]


def test_generation_prompt_that_is_no_prefix_is_refused(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant:\n")
    message = error_of(tokenizer, [{"messages": CHAT}])
    assert "renders messages[2] differently when it is generated" in message


# ------------------------------------------------------------------------------ end of turn

TALK = [
    {"role": "user", "content": "what is it ?"},
    {"role": "assistant", "content": "forty- two"},
    {"role": "user", "content": "and ?"},
    {"role": "assistant", "content": "#### 42"},
]


def pieces(tokenizer, sequence: dict) -> list[list[str]]:
    """The stretches that are learned, as tokens."""
    stretches, before = [], False
    for token, action in zip(sequence["token_ids"], sequence["action_mask"], strict=True):
        if action and not before:
            stretches.append([])
        if action:
            stretches[-1].append(tokenizer.convert_ids_to_tokens(token))
        before = action
    return stretches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_turns_are_learned_up_to_their_end(name, kind):
    """Up to the token at which engines stop, that one included, and nothing behind it."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, kind)
    talks = [TALK[:2]] if name == "harmony" else [TALK[:2], TALK]  # which ends earlier turns anew
    dataset = load(tokenizer, [{"messages": talk} for talk in talks])
    ends = end_tokens(tokenizer)
    for talk, sequence in zip(talks, dataset, strict=True):
        stretches = pieces(tokenizer, sequence)
        assert len(stretches) == len(talk) // 2
        last = family.end if family.closes else family.eos
        assert [one[-1] for one in stretches] == [family.end] * (len(stretches) - 1) + [last]
        stops = set(tokenizer.convert_ids_to_tokens(list(ends.ids)))
        assert not any(stops.intersection(one[:-1]) for one in stretches)
        said = [tokenizer.convert_tokens_to_string(one[:-1]) for one in stretches]
        if name not in ("command", "harmony"):  # which write more than the words
            assert [one.strip() for one in said] == [m["content"] for m in talk[1::2]]
        rendered = tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
        added = [] if family.closes else [tokenizer.eos_token_id]
        assert sequence["token_ids"] == rendered + added
    assert set(dataset.end_ids) <= set(ends.ids)


def test_a_template_that_leaves_turns_open(tiny_tokenizer):
    """Without a token for the next role the tokenizer's end is put behind each turn."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<|{{m.role}}|>\n{{m.content}}{% endfor %}"
    (sequence,) = load(tokenizer, [{"messages": TALK}])
    assert tokenizer.decode(sequence["token_ids"]) == (
        "<|user|>\nwhat is it ?<|assistant|>\nforty- two<|im_end|>"
        "<|user|>\nand ?<|assistant|>\n#### 42<|im_end|>"
    )
    # It has no generation prompt, so the policy writes its role itself.
    assert learned(tokenizer, sequence) == (
        "<|assistant|>\nforty- two<|im_end|>|<|assistant|>\n#### 42<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{m.role}}: {{m.content}}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    spaces = [TALK[0], {"role": "assistant", "content": "a \n"}, *TALK[2:]]
    (sequence,) = load(tokenizer, [{"messages": spaces}])
    assert learned(tokenizer, sequence) == "a \n<|im_end|>|#### 42<|im_end|>"
    tokenizer.eos_token = None
    assert "has no end-of-sequence token" in error_of(tokenizer, [{"messages": TALK}])


def test_a_turn_that_ends_in_another_way(tiny_tokenizer):
    """Llama 3 ends a tool's call with another token; it is told to whoever saves the model."""
    tokenizer = tokenizer_of(FAMILIES["llama3"])
    call = {"function": {"name": "f", "arguments": {}}, "type": "function"}
    talk = [TALK[0], {"role": "assistant", "content": "f ( )", "tool_calls": [call]},
            {"role": "tool", "content": "42"}, TALK[3]]  # fmt: skip
    dataset = load(tokenizer, [{"messages": talk}])
    assert learned(tokenizer, dataset[0]) == "f ( )<|eom_id|>|#### 42<|eot_id|>"
    eom, eot = tokenizer.convert_tokens_to_ids(["<|eom_id|>", "<|eot_id|>"])
    assert dataset.end_ids == tuple(sorted((eom, eot)))
    assert eom not in end_tokens(tokenizer).ids


def test_answers_to_a_prompt_of_the_template_end_as_it_does():
    tokenizer = tokenizer_of(FAMILIES["gemma"])
    rows = [GSM8K, {"prompt": "p", "response": "r"}, {"prompt": "p", "response": "r<end_of_turn>"}]
    texts = [learned(tokenizer, sequence) for sequence in load(tokenizer, rows)]
    assert texts == [GSM8K["answer"] + "<end_of_turn>", "r<eos>", "r<end_of_turn>"]


@pytest.mark.parametrize("kind", PREFIX_TOKENIZERS)
def test_response_begins_with_no_space_of_the_tokenizers_own(kind):
    tokenizer = PREFIX_TOKENIZERS[kind]()
    rows = [{"prompt": "2+2=", "response": "4"}, {"prompt": "2+2=", "response": " 4"}]
    for row, sequence in zip(rows, load(tokenizer, rows), strict=True):
        whole = tokenizer(row["prompt"] + row["response"], add_special_tokens=False)["input_ids"]
        assert sequence["token_ids"] == [*whole, tokenizer.eos_token_id]
        assert learned(tokenizer, sequence).removesuffix(tokenizer.eos_token) == row["response"]


@pytest.mark.parametrize("separator", ["", " ", "\n", "\nA: "])
@pytest.mark.parametrize("kind", [None, "llama 2", "byte level"])
def test_separator(tiny_tokenizer, kind, separator):
    """It is learned with the response: the prompt is that of a rollout, to the token."""
    tokenizer = PREFIX_TOKENIZERS[kind]() if kind else tiny_tokenizer
    row = {"prompt": "How many?", "response": "3"}
    (sequence,) = load(tokenizer, [row], separator=separator)
    assert tokenizer.decode(sequence["token_ids"]).lstrip() == (
        f"How many?{separator}3{tokenizer.eos_token}"
    )
    (item,) = RLDataset(OmegaConf.create({"path": "rows.jsonl"}), tokenizer)
    n = len(item["prompt_ids"])
    assert sequence["token_ids"][:n] == item["prompt_ids"]
    assert sequence["action_mask"] == [i >= n for i in range(len(sequence["token_ids"]))]


def test_separator_is_for_pairs_alone(tiny_tokenizer):
    rows = [GSM8K, {"messages": CHAT}]
    plain = list(load(tiny_tokenizer, rows))
    assert list(load(tiny_tokenizer, rows, separator="x")) == plain


# ------------------------------------------------------------------------------ bad rows


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "a"}, "row without question: it has the keys text; a row is"),
        ({"prompt": "a", "answer": "b"}, "row without response: it has the keys answer, prompt"),
        ({"question": "a"}, "row without answer"),
        ({"prompt": "a", "response": None}, "response is null"),
        ({"prompt": "a", "response": " "}, "response is empty"),
        ({"prompt": "", "response": "b"}, "prompt is empty"),
        ({"prompt": 5, "response": "b"}, "prompt is a number"),
        ({"question": "q", "answer": float("nan")}, "answer is NaN"),
        ({"messages": CHAT[:2]}, "messages without an assistant turn"),
        ({"messages": CHAT[2:]}, "messages begin with an assistant turn"),
        ({"messages": "x"}, "messages is a string that is not JSON"),
        ({"messages": [{"content": "x"}]}, "messages[0] without role"),
    ],
)
def test_bad_row_is_named(tiny_tokenizer, row, problem):
    message = error_of(tiny_tokenizer, [GSM8K, row])
    assert message.startswith("data.path: rows.jsonl:3: ") and problem in message


def test_tokenizer_without_end(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    assert "has no end-of-sequence token" in error_of(tokenizer, [GSM8K])


def test_tokenizer_without_template(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    assert "tokenizer with a chat template" in error_of(tokenizer, [{"messages": CHAT}])
    assert len(load(tokenizer, [GSM8K])) == 1


# ------------------------------------------------------------------------------ length, batches

MIXED = [{"prompt": "p", "response": "x" * n} for n in (1, 10, 3)]  # with p and eos: 3, 12, 5


def test_overlong_is_an_error(tiny_tokenizer):
    assert error_of(tiny_tokenizer, MIXED, max_length=11) == (
        "data.max_length=11: 1 of 3 sequences are longer (longest 12 tokens, first at "
        "rows.jsonl:3); raise data.max_length and actor.max_length_per_device, or set "
        "data.overlong=drop"
    )
    assert len(load(tiny_tokenizer, MIXED, max_length=12)) == 3
    assert len(load(tiny_tokenizer, MIXED, max_length=None)) == 3


def test_overlong_dropped(tiny_tokenizer, caplog):
    with caplog.at_level("INFO", logger="RL2"):
        dataset = load(tiny_tokenizer, MIXED, max_length=5, overlong="drop")
    assert [len(sequence["token_ids"]) for sequence in dataset] == [3, 5]
    assert "1 of 3 sequences are longer" in caplog.text
    message = error_of(tiny_tokenizer, MIXED, max_length=2, overlong="drop")
    assert "all 3 of 3 sequences are longer" in message


def test_loader_and_collate(tiny_tokenizer, gsm8k_rows_file):
    dataset = SFTDataset(OmegaConf.create({"path": gsm8k_rows_file}), tiny_tokenizer)
    batch = collate(next(iter(make_loader(dataset, 8, seed=0))))
    assert batch["states"].shape == batch["action_mask"].shape
    assert batch["states"].shape[0] == 8 and batch["action_mask"].any(1).all()
    with pytest.raises(DataError, match="data.batch_size=64: data set has only 32 rows"):
        make_loader(dataset, 64, seed=0)
