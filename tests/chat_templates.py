"""Tokenizers of three kinds and chat templates as model families have them, for tests of where a
turn ends."""

from dataclasses import dataclass, field

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = "one two three four forty- 42 be brief héllo and ? what is it # ## #### : call ( ) [ ] INST"


def _byte_level(**names):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _sentencepiece(**names):
    """Unigram pieces with ▁ for a space, bytes for what has no piece, as Llama 2 and Gemma."""
    pieces = [("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS.split()]
    pieces += [(chr(i), -4.0) for i in range(33, 127)] + [("\n", -4.0)]
    pieces += [(f"<0x{i:02X}>", -9.0) for i in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)


def _word_level(**names):
    vocabulary = ["<unk>", *WORDS.split(), "\n", "user", "assistant", "system", "tool"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)


KINDS = {"bytes": _byte_level, "sentencepiece": _sentencepiece, "words": _word_level}


@dataclass(frozen=True)
class Family:
    """How a family's chat looks.

    template: with `eos_token` and `bos_token` as transformers gives them.
    end: what ends a turn; its text is in `tokens`. tokens: further ones that are marked special.
    closes: whether the template puts `end` behind an answer; else the next role's marker ends it.
    generation: the texts that an instruct model's generation config names.
    """

    template: str
    end: str
    eos: str
    bos: str | None = None
    tokens: tuple[str, ...] = ()
    closes: bool = True
    generation: tuple[str, ...] = field(default=())


FAMILIES = {
    "chatml": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        end="<|im_end|>", eos="<|im_end|>", tokens=("<|im_start|>", "<|endoftext|>"),
        generation=("<|im_end|>", "<|endoftext|>"),
    ),
    # A base model: eos_token is not what its template ends a turn with.
    "chatml_base": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        end="<|im_end|>", eos="<|endoftext|>", tokens=("<|im_start|>", "<|im_end|>"),
        generation=("<|endoftext|>",),
    ),
    "llama3": Family(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}{% if m.tool_calls %}<|eom_id|>{% else %}<|eot_id|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>"
        "\n\n{% endif %}",
        end="<|eot_id|>", eos="<|end_of_text|>", bos="<|begin_of_text|>",
        tokens=("<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        generation=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "gemma": Family(
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        end="<end_of_turn>", eos="<eos>", bos="<bos>", tokens=("<start_of_turn>", "<end_of_turn>"),
        generation=("<eos>", "<end_of_turn>"),
    ),
    # eos_token stands at the very end, behind the end of the turn.
    "phi3": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        end="<|end|>", eos="<|endoftext|>",
        tokens=("<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
        generation=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    "phi4_mini": Family(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}",
        end="<|end|>", eos="<|endoftext|>",
        tokens=("<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
        generation=("<|end|>", "<|endoftext|>"),
    ),
    "glm": Family(
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'observation' }}|>"
        "\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        end="<|user|>", eos="<|endoftext|>", closes=False,
        tokens=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        generation=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}"
        "{{ eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
        end="</s>", eos="</s>", bos="<s>", generation=("</s>",),
    ),
    "deepseek": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<｜Assistant｜>"
        "{{ m.content }}<｜end▁of▁sentence｜>{% else %}<｜User｜>{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
        end="<｜end▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>",
        tokens=("<｜User｜>", "<｜Assistant｜>"), generation=("<｜end▁of▁sentence｜>",),
    ),
    # Two tokens close an answer; the second ends the turn.
    "command": Family(
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN|><|{{ m.role }}|>"
        "{% if m.role == 'assistant' %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>"
        "{% else %}{{ m.content }}{% endif %}<|END_OF_TURN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN|><|assistant|>{% endif %}",
        end="<|END_OF_TURN|>", eos="<|END_OF_TURN|>", bos="<BOS>",
        tokens=("<|START_OF_TURN|>", "<|user|>", "<|assistant|>", "<|system|>",
                "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        generation=("<|END_OF_TURN|>",),
    ),
    # The last turn ends in another way than those before it, where the same token parts channels.
    "harmony": Family(
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final"
        "{% endif %}<|message|>{{ m.content }}{% if m.role == 'assistant' and loop.last %}"
        "<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        end="<|return|>", eos="<|return|>",
        tokens=("<|start|>", "<|channel|>", "<|message|>", "<|end|>"), generation=("<|return|>",),
    ),
}  # fmt: skip


def tokenizer_of(family: Family, kind: str = "bytes") -> PreTrainedTokenizerFast:
    """A tokenizer in which only bos and eos are named; all else is added and marked special."""
    named = {"eos_token": family.eos} | ({"bos_token": family.bos} if family.bos else {})
    tokenizer = KINDS[kind](
        **named, chat_template=family.template, clean_up_tokenization_spaces=False
    )
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in family.tokens]
    )
    return tokenizer
