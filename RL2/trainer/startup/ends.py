"""What is logged and saved about the tokens that end a turn."""

import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from RL2.datasets.end_of_turn import EndTokens
from RL2.runtime.errors import ConfigError
from RL2.trainer.sources.source import Source

logger = logging.getLogger(__name__)


def missing_ends(
    model_name: str, tokenizer: PreTrainedTokenizerBase, ends: EndTokens, source: Source
) -> tuple[int, ...]:
    """The end tokens that this run learns or stops at but the model's folder does not name; warns,
    as programs that generate from that folder would not stop at them."""
    missing = tuple(token for token in source.end_ids if token not in ends.saved)
    if missing:
        logger.warning(
            "actor.model_name=%s: its generation config stops at %s; %s at %s as well, which "
            "final/ will name in its generation_config.json", model_name,
            _texts(tokenizer, ends.saved) or "nothing", source.ends, _texts(tokenizer, missing),
        )  # fmt: skip
    return missing


def name_ends(model: PreTrainedModel, saved: tuple[int, ...], missing: tuple[int, ...]) -> None:
    """Add the missing end tokens to the model's generation config, which is saved with it."""
    if not missing:
        return
    model.generation_config.eos_token_id = [*saved, *missing]
    # transformers saves a config as it was read, but refuses a changed one with settings that
    # published models have, such as a temperature without do_sample. So it is read again.
    with TemporaryDirectory() as folder:
        model.generation_config.to_json_file(Path(folder) / GENERATION_CONFIG_NAME)
        model.generation_config = type(model.generation_config).from_pretrained(folder)


def name_padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]
) -> None:
    """Name the padding token of a model that scores texts at their last token, in its config and
    in the tokenizer. transformers looks for the last token that is not padding, so a token that
    ends texts cannot be it; another special token then takes its place, with a warning.

    ends: the tokens that end texts.
    """
    pad = tokenizer.pad_token_id
    if pad is None or pad in ends:
        others = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {*ends})
        if not others:
            raise ConfigError(
                "actor.model_name: its tokenizer has no padding token that is not an end token, so "
                "the reward model could not score texts in batches; set pad_token in its "
                "tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(others[-1])
        why = "has no padding token" if pad is None else "pads with an end token"
        logger.warning(
            "actor.model_name: its tokenizer %s; final/ pads with %s", why, tokenizer.pad_token
        )
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    return ", ".join(tokenizer.decode([token]) for token in ids)
