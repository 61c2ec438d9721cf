"""What is logged and saved about the tokens that end a turn."""

import logging
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from RL2.datasets.end_of_turn import EndTokens
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


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    return ", ".join(tokenizer.decode([token]) for token in ids)
