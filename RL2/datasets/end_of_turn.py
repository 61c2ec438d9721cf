"""How a turn of the policy ends: the tokens at which engines stop, and the one that is learned.

A model's files name them in several places, which may disagree: the generation config, the
config, the tokenizer, and the chat template, which closes an assistant turn with a token that may
be the tokenizer's `eos_token` (ChatML), another special one (Llama 3, Gemma, Phi), or the marker of
the next role (GLM). `end_tokens` reads them all, and all other code calls it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import dropwhile, takewhile
from typing import Any

from omegaconf import DictConfig
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from RL2.config.models import hub_options
from RL2.runtime.errors import ConfigError, first_line

# Texts that no template contains.
_QUESTION, _ANSWER = "qZ7question", "qZ7answer"


@dataclass(frozen=True)
class EndTokens:
    """The end tokens of a model with its tokenizer.

    ids: a completion ends with any of these.
    saved: the end tokens that the model's folder names for other programs: those of its generation
        config, or of its config if it has no generation config.
    special: all tokens of the tokenizer that neither are text nor represent text.
    turn: the token with which the chat template closes an assistant turn. None if there is no
        template, or if the template does not close turns, so that the marker of the next role, one
        of `ids`, ends it.
    last: the token to put after a text without an end: `eos_token`, else one from the configs.
    """

    ids: tuple[int, ...]
    saved: tuple[int, ...] = ()
    special: frozenset[int] = frozenset()
    turn: int | None = None
    last: int | None = None


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, generation: Any = None, config: Any = None
) -> EndTokens:
    """The end tokens of a model.

    generation, config: the model's generation config and config, as transformers loads them; None
        if it has none, or they are not known.
    """
    eos, special = tokenizer.eos_token_id, special_ids(tokenizer)
    if tokenizer.unk_token_id not in (eos, tokenizer.pad_token_id, tokenizer.bos_token_id):
        special.discard(tokenizer.unk_token_id)  # it represents text
    saved = _ids_of(config if generation is None else generation)
    # A config that names none has its class's default, which may be any token.
    more = [token for token in _ids_of(config) if token in special]
    known = list(dict.fromkeys([*saved, *more, *([] if eos is None else [eos])]))
    turn, markers = _template_ends(tokenizer, special.union(known), known)
    ids = tuple(dict.fromkeys([*known, *(markers if turn is None else [turn])]))
    last = eos if eos is not None else next(iter(known), None)
    return EndTokens(ids, tuple(saved), frozenset(special), turn, last)


def load_end_tokens(node: DictConfig, tokenizer: PreTrainedTokenizerBase) -> EndTokens:
    """`end_tokens` of `node.model_name`, a folder or hub id. Only configs are loaded.

    Raises ConfigError if the model does not have the token that closes a turn.
    """
    name, options = node.model_name, hub_options(node)
    config = AutoConfig.from_pretrained(name, **options)
    try:
        generation = GenerationConfig.from_pretrained(name, revision=node.revision)
    except OSError:  # not every model has one
        generation = None
    except Exception as error:  # invalid numbers can make it raise anything
        raise ConfigError(
            f"actor.model_name={name}: its generation_config.json cannot be used "
            f"({first_line(error)}); correct the file, or copy or download the model again"
        ) from error
    ends = end_tokens(tokenizer, generation, config)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is None:
        return ends
    if ends.turn is not None and ends.turn >= rows:
        raise ConfigError(
            f"actor.model_name={name}: a turn ends with {tokenizer.decode([ends.turn])}, which is "
            f"token {ends.turn}, but the model has only {rows} (vocab_size in its config.json); "
            "give a model that was made for its tokenizer and chat template"
        )
    ids = tuple(token for token in ends.ids if token < rows)  # others are never written
    last = ends.last if ends.last in ids else next(iter(ids), None)
    return replace(ends, ids=ids, last=last)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All tokens that are not text. `all_special_ids` omits added tokens that are marked special
    but have no named role in the tokenizer."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}


def _ids_of(config: Any) -> list[int]:
    """The end tokens that a generation config or a config names, of its text model as well."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = []
    for part in (config, text):
        ids = getattr(part, "eos_token_id", None)
        found += [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return [token for token in dict.fromkeys(found) if token >= 0]


def _template_ends(
    tokenizer: PreTrainedTokenizerBase, marks: Collection[int], known: Collection[int]
) -> tuple[int | None, list[int]]:
    """The token that closes an assistant turn in the chat template, or, if there is none, the
    markers of the roles that may follow.

    marks: tokens that are not text. known: tokens that are known to end a turn.
    """
    if tokenizer.chat_template is None:
        return None, []
    user, tool = {"role": "user", "content": _QUESTION}, {"role": "tool", "content": _QUESTION}
    last, middle = _after_answer(tokenizer), _after_answer(tokenizer, user)

    def first_run(ids: list[int]) -> list[int]:
        """The first special tokens, up to the next text."""
        return list(takewhile(marks.__contains__, dropwhile(lambda i: i not in marks, ids)))

    # Some templates add something at the very end (Phi: eos_token after the end of the turn), and
    # some end the last turn differently from earlier ones.
    same = takewhile(lambda pair: pair[0] == pair[1], zip(last, middle, strict=False))
    closing = first_run([token for token, _ in same]) or first_run(last)
    if closing:
        return next((token for token in closing if token in known), closing[-1]), []
    markers = []
    for following in (middle, _after_answer(tokenizer, tool)):
        begun = dropwhile(lambda token: not tokenizer.decode([token]).strip(), following)
        markers += [token for token in [next(begun, None)] if token in marks]
    return None, markers


def _after_answer(tokenizer: PreTrainedTokenizerBase, *following: dict[str, str]) -> list[int]:
    """The tokens after the assistant's words in the chat template's text; none if the template
    rejects such a conversation."""
    messages = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
        *following,
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        _, found, tail = text.rpartition(_ANSWER)
        return tokenizer.encode(tail, add_special_tokens=False) if found else []
    except Exception:  # a template is a program, and may reject roles
        return []
