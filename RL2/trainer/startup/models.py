"""Loads the actor's tokenizer, and the models that compute fields of a batch."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from RL2.algorithms.algorithm import Algorithm
from RL2.config.models import ask_hub, hub_options
from RL2.config.schema.keys import keys_of
from RL2.config.schema.model import RefActorConfig
from RL2.datasets.end_of_turn import special_ids
from RL2.distributed import Traffic
from RL2.runtime.errors import ConfigError, first_line
from RL2.trainer.references import KeptReferences, MismatchKL
from RL2.trainer.startup.frozen import Provider, said_of
from RL2.trainer.startup.teacher import load_teacher
from RL2.workers import Actor, Critic, Learner, Reference


def load_tokenizer(config: DictConfig, head: str = "token_stats") -> PreTrainedTokenizerBase:
    """The actor's tokenizer; ConfigError if there is none, it is of another model, or the model has
    none of the `head` that a loss needs."""
    name, options = config.actor.model_name, hub_options(config.actor)
    ask_hub(config.actor, "actor")
    try:
        model = AutoConfig.from_pretrained(name, **options)
    except Exception as error:  # a broken file makes it raise anything
        raise ConfigError(
            f"actor.model_name={name}: its config.json describes no model that transformers knows "
            f"({first_line(error)}); give a folder made by save_pretrained or a model id"
        ) from error
    if head == "token_stats":
        _check_language_model(f"actor.model_name={name}", model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # as above
        raise ConfigError(
            f"actor.model_name={name}: no tokenizer can be loaded from there "
            f"({first_line(error)}); give a folder made by save_pretrained, or a model id of a hub "
            "that this machine reaches or has cached"
        ) from error
    if not _ordinary(tokenizer):  # transformers makes an empty one where there are no files
        raise ConfigError(
            f"actor.model_name={name}: has no tokenizer files, such as tokenizer.json; save the "
            "model's tokenizer there with save_pretrained"
        )
    rows = getattr(model.get_text_config(), "vocab_size", None)
    if rows is not None and max(_ordinary(tokenizer).values(), default=0) >= rows:
        raise ConfigError(
            f"actor.model_name={name}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{rows} (vocab_size in its config.json); give a model with the tokenizer that it was "
            "trained with"
        )
    return tokenizer


def _check_language_model(key: str, model: PretrainedConfig) -> None:
    kinds = [kind for kind in model.architectures or () if kind.endswith("Classification")]
    if kinds:
        raise ConfigError(
            f"{key}: is a {kinds[0]}, such as reward models are, whose head gives scores and no "
            "next token; give a causal language model"
        )


def _ordinary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The numbers of its tokens, but for special ones: those beyond a model's are never used."""
    special = special_ids(tokenizer)
    return {token: n for token, n in tokenizer.get_vocab().items() if n not in special}


def check_other_model(config: DictConfig, group: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """ConfigError if the model of `group` does not fit the actor: it has to say how likely tokens
    are (a critic has not), read their numbers as the actor's `tokenizer` does, and be made for
    sequences as long. What is wrong with its files, loading it reports."""
    node = config[group]
    model = _read(AutoConfig, node)
    if model is not None and group != "critic":
        # with tied weights a reward model would load as a language model
        _check_language_model(f"{group}.model_name={node.model_name}", model)
    if node.model_name != config.actor.model_name:
        _check_vocabulary(config, group, tokenizer, model)
        if node.get("context") is None:
            _check_context(config, group, model)


def _check_vocabulary(
    config: DictConfig,
    group: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PretrainedConfig | None,
) -> None:
    """A model without a tokenizer of its own has to have enough tokens."""
    node, actor = config[group], config.actor.model_name
    own, key = _ordinary(tokenizer), f"{group}.model_name={node.model_name}"
    way_out = f"; give a model with the tokens of actor.model_name={actor}"
    theirs = _read(AutoTokenizer, node)
    other = {} if theirs is None else theirs.get_vocab()
    # without files of a tokenizer transformers may make an empty one
    if other and _ordinary(theirs) and not own.items() <= other.items():
        token = next(token for token, number in own.items() if other.get(token) != number)
        there = other.get(token, "not among them")
        raise ConfigError(
            f"{key}: its tokenizer has {len(theirs)} tokens, the actor's {len(tokenizer)}, and "
            f"{token!r} is {there} there and {own[token]} here{way_out}"
        )
    rows = None if model is None else getattr(model.get_text_config(), "vocab_size", None)
    if rows is not None and max(own.values(), default=0) >= rows:
        raise ConfigError(
            f"{key}: has {rows} tokens (vocab_size in its config.json), the actor's tokenizer "
            f"{len(tokenizer)}{way_out}"
        )


def _check_context(config: DictConfig, group: str, model: PretrainedConfig | None) -> None:
    actor, node = config.actor, config[group]
    room = actor.max_length_per_device * actor.sp_size
    longest = min(room, _positions(_read(AutoConfig, actor)) or room)
    context = _positions(model) or longest
    if context < longest:
        raise ConfigError(
            f"{group}.model_name={node.model_name}: is made for {context} tokens, and sequences "
            f"may have {longest}; use actor.max_length_per_device={context // actor.sp_size} or "
            "less, or give a model with a longer context"
        )


def _positions(model: PretrainedConfig | None) -> int | None:
    found = None if model is None else model.get_text_config()
    return getattr(found, "max_position_embeddings", None)


def _read(kind: Any, node: DictConfig) -> Any:
    try:
        return kind.from_pretrained(node.model_name, **hub_options(node))
    except Exception:  # broken files make it raise anything; loading the model reports it
        return None


def load_learners(
    config: DictConfig, algorithm: Algorithm, device: torch.device, traffic: Traffic
) -> dict[str, Learner]:
    """The models that are trained, by their nodes, in the order of their updates."""
    loss, run = algorithm.loss, config.trainer
    others = (run.max_bad_steps, traffic, run.seed)
    learners: dict[str, Learner] = {}
    if algorithm.value_loss is not None:
        with said_of("critic"):
            value_loss = algorithm.value_loss
            learners["critic"] = Critic(config.critic, device, "critic", value_loss, *others)
    if loss.head == "token_stats":
        learners["actor"] = Actor(config.actor, device, loss, *others)
    else:
        learners["actor"] = Learner(config.actor, device, "actor", loss, *others)
    return learners


def load_providers(
    config: DictConfig,
    needs: Collection[str],
    learners: Mapping[str, Learner],
    device: torch.device,
    traffic: Traffic,
    keep: bool,
    contexts: Sequence[Sequence[int]] | None = None,
    fingerprints: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, Provider], dict[str, Reference]]:
    """The providers of the fields that an algorithm needs, by their names in `needs`, and the
    frozen models behind them that may be renewed, by their nodes.

    keep: whether rows come again, so that what a reference says about them is kept, unless it is
        renewed.
    contexts: see `load_teacher`.
    fingerprints: of the run's models, by their keys.
    """
    providers: dict[str, Provider] = {"old_logps": learners["actor"].annotate}
    references: dict[str, Reference] = {}
    if "critic" in learners:
        providers["old_values"] = learners["critic"].annotate
    if "ref_logps" in needs:
        reference = load_reference(config, device, traffic)
        if reference.every:
            reference.check(learners["actor"])
        reference.offload()
        kept = keep and not reference.every
        of_actor = fingerprints.get("actor.model_name")
        weights = fingerprints.get("ref_actor.model_name", of_actor)
        origin = str([weights, reference.config.temperature, str(reference.dtypes.compute)])
        providers["ref_logps"] = KeptReferences(reference, origin) if kept else reference.annotate
        references["ref_actor"] = reference
        if "mismatch_kl" in needs:
            longest = config.data.max_length
            providers["mismatch_kl"] = MismatchKL(learners["actor"], reference.annotate, longest)
    if "teacher_logps" in needs:
        actor = learners["actor"]
        providers["teacher_logps"] = load_teacher(config, actor, device, traffic, contexts)
    return providers, references


def providers_of_tests(
    config: DictConfig,
    providers: Mapping[str, Provider],
    learners: Mapping[str, Learner],
    references: Mapping[str, Reference],
) -> dict[str, Provider]:
    """The providers for evaluations, whose rows are the same each time: what a reference says about
    them is kept, unless it is renewed."""
    reference, found = references.get("ref_actor"), {**providers}
    if reference is None or reference.every:
        return found
    found["ref_logps"] = kept = KeptReferences(reference)
    if "mismatch_kl" in providers:
        found["mismatch_kl"] = MismatchKL(learners["actor"], kept, config.data.max_length)
    return found


def load_reference(config: DictConfig, device: torch.device, traffic: Traffic) -> Reference:
    """The reference policy: `ref_actor`, or if a trainer has none, the actor's initial model."""
    if "ref_actor" not in config:
        names = keys_of(RefActorConfig).keys() & config.actor.keys()
        node = {name: config.actor[name] for name in names}
        node["max_inference_length_per_device"] = config.actor.max_length_per_device
        return Reference(OmegaConf.create(node), device, traffic)
    with said_of("ref_actor"):
        return Reference(config.ref_actor, device, traffic)
