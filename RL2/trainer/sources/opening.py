"""Opens the source that `trainer.source` names."""

import inspect

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from RL2.algorithms.parameters import import_function
from RL2.datasets.end_of_turn import EndTokens
from RL2.runtime.errors import ConfigError, RL2Error, raised
from RL2.runtime.user_code import Unfit, undisturbed
from RL2.trainer.sources.registry import SOURCES
from RL2.trainer.sources.source import Source


def resolve_source(config: DictConfig) -> type[Source]:
    """The class that `trainer.source` names, from a file if it is no key of `SOURCES`.

    Raises:
        ConfigError: a missing file, module or class, one that is no `Source` or lacks parts of it,
            or one that reads groups which this trainer's config does not have.
    """
    origin = f"trainer.source={config.trainer.source}"
    source = import_function(SOURCES.get(config.trainer.source, config.trainer.source), origin)
    if not (isinstance(source, type) and issubclass(source, Source)):
        raise ConfigError(
            f"{origin}: is no source; derive it from RL2.trainer.sources.source.Source, or from "
            "RL2.trainer.sources.rows.RowSource"
        )
    if lacks := sorted(source.__abstractmethods__):
        raise ConfigError(
            f"{origin}: has no {', '.join(lacks)}; see RL2.trainer.sources.source.Source"
        )
    if missing := [group for group in source.groups if group not in config]:
        raise ConfigError(
            f"{origin}: reads {', '.join(missing)}, which this trainer's config does not have; use "
            "another source or another trainer"
        )
    return source


def open_source(
    make: type[Source], config: DictConfig, tokenizer: PreTrainedTokenizerBase, ends: EndTokens
) -> Source:
    """The source itself; a ConfigError names the line of user code that fails."""
    if config.trainer.source in SOURCES:
        return make(config, tokenizer, ends)
    origin = f"trainer.source={config.trainer.source}"
    try:
        with undisturbed():
            return make(config, tokenizer, ends)
    except RL2Error:
        raise
    except Unfit as fault:
        raise ConfigError(f"{origin}: {fault}") from fault
    except Exception as error:  # user code may raise anything
        raise ConfigError(f"{origin}: making it {raised(error, inspect.getfile(make))}") from error
