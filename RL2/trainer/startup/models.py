"""Loads the actor's tokenizer, and the models that compute fields of a batch."""

from collections.abc import Callable, Collection, Mapping

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from RL2.algorithms.algorithm import Algorithm
from RL2.config.models import ask_hub, hub_options
from RL2.config.schema.keys import keys_of
from RL2.config.schema.model import RefActorConfig
from RL2.datasets.end_of_turn import special_ids
from RL2.distributed import Traffic
from RL2.distributed.comm import Batch
from RL2.runtime.errors import ConfigError, first_line
from RL2.trainer.references import KeptReferences, MismatchKL
from RL2.workers import Actor, Learner, Reference

Provider = Callable[[Batch | None, Mapping[str, str]], Batch | None]
"""Adds fields, given as {name: statistic}, to rank 0's batch (a collective)."""


def load_tokenizer(config: DictConfig) -> PreTrainedTokenizerBase:
    """The actor's tokenizer; ConfigError if there is none, or it is of another model."""
    name, options = config.actor.model_name, hub_options(config.actor)
    ask_hub(config.actor, "actor")
    try:
        model = AutoConfig.from_pretrained(name, **options)
    except Exception as error:  # a broken file makes it raise anything
        raise ConfigError(
            f"actor.model_name={name}: its config.json describes no model that transformers knows "
            f"({first_line(error)}); give a folder made by save_pretrained or a model id"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # as above
        raise ConfigError(
            f"actor.model_name={name}: no tokenizer can be loaded from there "
            f"({first_line(error)}); give a folder made by save_pretrained, or a model id of a hub "
            "that this machine reaches or has cached"
        ) from error
    rows = getattr(model.get_text_config(), "vocab_size", None)
    # Special tokens beyond them are never used.
    ordinary = set(tokenizer.get_vocab().values()) - special_ids(tokenizer)
    if rows is not None and max(ordinary, default=0) >= rows:
        raise ConfigError(
            f"actor.model_name={name}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{rows} (vocab_size in its config.json); give a model with the tokenizer that it was "
            "trained with"
        )
    return tokenizer


def load_learners(
    config: DictConfig, algorithm: Algorithm, device: torch.device, traffic: Traffic
) -> dict[str, Learner]:
    """The models that are trained, by their nodes, in the order of their updates."""
    loss, run = algorithm.loss, config.trainer
    others = (run.max_bad_steps, traffic, run.seed)
    if loss.head == "token_stats":
        return {"actor": Actor(config.actor, device, loss, *others)}
    return {"actor": Learner(config.actor, device, "actor", loss, *others)}


def load_providers(
    config: DictConfig,
    needs: Collection[str],
    learners: Mapping[str, Learner],
    device: torch.device,
    traffic: Traffic,
    keep: bool,
) -> tuple[dict[str, Provider], dict[str, Reference]]:
    """The providers of the fields that an algorithm needs, by their names in `needs`, and the
    frozen models behind them that may be renewed, by their nodes.

    keep: whether rows come again, so that what a reference says about them is kept, unless it is
        renewed.
    """
    providers: dict[str, Provider] = {"old_logps": learners["actor"].annotate}
    references: dict[str, Reference] = {}
    if "ref_logps" in needs:
        reference = load_reference(config, device, traffic)
        if reference.every:
            reference.check(learners["actor"])
        reference.offload()
        kept = keep and not reference.every
        providers["ref_logps"] = KeptReferences(reference) if kept else reference.annotate
        references["ref_actor"] = reference
        if "mismatch_kl" in needs:
            longest = config.data.max_length
            providers["mismatch_kl"] = MismatchKL(learners["actor"], reference, longest)
    return providers, references


def load_reference(config: DictConfig, device: torch.device, traffic: Traffic) -> Reference:
    """The reference policy: `ref_actor`, or if a trainer has none, the actor's initial model. A
    ConfigError names the keys of `ref_actor`, which workers do not know."""
    if "ref_actor" not in config:
        names = keys_of(RefActorConfig).keys() & config.actor.keys()
        node = {name: config.actor[name] for name in names}
        node["max_inference_length_per_device"] = config.actor.max_length_per_device
        return Reference(OmegaConf.create(node), device, traffic)
    try:
        return Reference(config.ref_actor, device, traffic)
    except ConfigError as error:
        if str(error).startswith("actor."):
            raise ConfigError(f"ref_{error}") from error
        raise
