"""What a run reads before a model loads."""

from dataclasses import dataclass

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from RL2.algorithms.algorithm import Algorithm, resolve_algorithm
from RL2.algorithms.segments import fault_of
from RL2.algorithms.token_loss import TokenLoss
from RL2.config.models import POLICY, ask_hub
from RL2.datasets.end_of_turn import EndTokens, load_end_tokens
from RL2.runtime.errors import ConfigError
from RL2.trainer.sources.opening import open_source, resolve_source
from RL2.trainer.sources.source import Source
from RL2.trainer.startup.ends import missing_ends
from RL2.trainer.startup.fingerprints import of_run
from RL2.trainer.startup.models import check_other_model, load_tokenizer


@dataclass(frozen=True)
class Inputs:
    """
    Attributes:
        ends: the model's end tokens.
        missing_ends: the end tokens of the run that the model's folder does not name.
        fingerprints: fingerprints of the run's inputs (`fingerprints.of_run`).
    """

    algorithm: Algorithm
    source: Source
    tokenizer: PreTrainedTokenizerBase
    ends: EndTokens
    missing_ends: tuple[int, ...]
    fingerprints: dict[str, str]


def check_room(actor: DictConfig, loss: TokenLoss, source: Source) -> None:
    """ConfigError if a micro-batch cannot hold what the loss takes whole."""
    if loss.segments:
        for batch in source.largest():
            if reason := fault_of(
                batch, loss.segments, actor.max_length_per_device * actor.sp_size
            ):
                raise ConfigError(f"{loss.origin}: {reason}")


def read_inputs(config: DictConfig) -> Inputs:
    """Read algorithm, tokenizer, environment and data, with the cheapest checks first. Nothing here
    waits for other ranks."""
    make_source = resolve_source(config)
    algorithm = resolve_algorithm(config, make_source.brings(config))
    tokenizer = load_tokenizer(config, algorithm.loss.head)
    ends = load_end_tokens(config.actor, tokenizer)
    source = open_source(make_source, config, tokenizer, ends)
    check_room(config.actor, algorithm.loss, source)
    missing = missing_ends(config.actor.model_name, tokenizer, ends, source)
    used = {"ref_actor": "ref_logps" in algorithm.needs, "critic": algorithm.value_loss is not None}
    if "teacher_logps" in algorithm.needs:
        used["teacher"] = config.teacher.model_name != POLICY
    models = ["actor"]
    for name in (name for name in used if used[name] and name in config):
        ask_hub(config[name], name)
        check_other_model(config, name, tokenizer)
        models.append(name)
    fingerprints = of_run(config, tokenizer, ends, source.datasets, models)
    return Inputs(algorithm, source, tokenizer, ends, missing, fingerprints)
