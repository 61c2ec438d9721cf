"""Heads: from a model's hidden states to the numbers that a loss reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from RL2.distributed import shard_of
from RL2.ops.token_stats import (
    TokenStats,
    linear_token_loss,
    linear_token_stats,
    loss_of,
    token_stats,
)
from RL2.runtime.errors import ConfigError

LossOfStatistics = Callable[[Mapping[str, Tensor], slice], tuple[Tensor, dict[str, Tensor]]]
"""From `{statistic: [n]}` of some tokens, `rows` of the A in question, to a loss and sums."""


@dataclass(frozen=True)
class Question:
    """A request to a head about A tokens.

    Attributes:
        model: the transformers model, its weights gathered.
        hidden: computes the hidden states `[A, H]` before those tokens.
        logits: computes logits `[A, V]` with the model's own forward.
        actions: the tokens, `[A]`.
        temperature: divides the logits.
        wanted: names of the statistics to compute.
        top_k: number of `top_logps` and `top_ids`.
        at: the tokens `[A, K]` of `at_logps`.
        loss_fn: the loss to compute from them, which may be called on a part of the tokens at a
            time.
        tp_group: the group over which the weights are split; None: they are whole.
    """

    model: PreTrainedModel
    hidden: Callable[[], Tensor]
    logits: Callable[[], Tensor]
    actions: Tensor
    temperature: float
    wanted: Sequence[str]
    top_k: int = 0
    at: Tensor | None = None
    loss_fn: LossOfStatistics | None = None
    tp_group: dist.ProcessGroup | None = None


class Head:
    """Turns hidden states into the numbers of each token that a loss reads.

    It has no weights of its own. They are part of the transformers model, which `auto_class`
    builds, and so are sharded, trained, saved and loaded like all others.

    Attributes:
        auto_class: builds and loads the model.
        kind: the kind of model, for errors.
        settings: entries to set in its config.json.
        layer: name of the linear layer that checkpoints of other models lack. It then starts at
            zero. It is computed in fp32, and trained in full with LoRA too. None: no such layer.
        task: the task type of its adapters, as peft calls it.
        linear: whether the output is one matrix product of hidden states with `weights`.
            `RL2.models.self_check` tests that, and sets this to False if it is not.
    """

    auto_class: ClassVar[Any]
    kind: ClassVar[str]
    settings: ClassVar[dict[str, Any]] = {}
    layer: ClassVar[str | None] = None
    task: ClassVar[str | None] = None
    linear = False

    def __init__(self, model: PreTrainedModel, config: Mapping[str, Any]):
        """config: the learner's config, such as the `actor` node."""
        if self.layer and not isinstance(getattr(model, self.layer, None), nn.Linear):
            raise ConfigError(
                f"actor.model_name={config.model_name}: models of type {model.config.model_type} "
                f"have no linear layer {self.layer} after their hidden states; use a model of "
                "another family"
            )

    def __call__(self, question: Question) -> dict[str, Tensor]:
        """The wanted statistics as `{name: [A]}` in fp32, or with `loss_fn` the sums of its loss,
        as `loss`, and of its metrics. A plain dict, as FSDP looks for tensors to hook in those."""
        raise NotImplementedError

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise ConfigError if it cannot compute as the config says, once `linear` is known."""


class TokenStatsHead(Head):
    """Statistics of the next token's distribution, such as the log-probability of an action.

    `top_logps` are `[A, top_k]`, `at_logps` as `at`. With a linear head, logits are never stored.
    """

    auto_class = AutoModelForCausalLM
    kind = "a causal language model"
    task = "CAUSAL_LM"

    def __init__(self, model: PreTrainedModel, config: Mapping[str, Any]):
        self.implementation = str(config.get("token_stats", "auto"))
        self.linear = isinstance(model.get_output_embeddings(), nn.Linear)

    @staticmethod
    def weights(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, or this rank's columns of them."""
        head = model.get_output_embeddings()
        return tuple(
            x.to_local() if isinstance(x, DTensor) else x for x in (head.weight, head.bias)
        )

    def __call__(self, question: Question) -> dict[str, Tensor]:
        asked = question.actions, question.temperature, question.wanted
        loss_fn = None
        if question.loss_fn is not None:

            def loss_fn(stats: TokenStats, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
                return question.loss_fn(stats.as_dict(), rows)

        if not self.linear:
            stats = token_stats(question.logits(), *asked, question.top_k, question.at)
            if loss_fn is None:
                return stats.as_dict()
            loss, metrics = loss_of(stats, len(question.actions), loss_fn)
            return {"loss": loss, **metrics}

        hidden = question.hidden()
        weight, bias = self.weights(question.model)
        options = {
            "bias": bias, "top_k": question.top_k, "at": question.at,
            "implementation": self.implementation,
        }  # fmt: skip
        if question.tp_group is not None:
            vocab_size = question.model.get_output_embeddings().weight.shape[0]
            options["shard"] = shard_of(vocab_size, question.tp_group)
        if loss_fn is None:
            return linear_token_stats(hidden, weight, *asked, **options).as_dict()
        loss, metrics = linear_token_loss(hidden, weight, *asked, loss_fn, **options)
        return {"loss": loss, **metrics}

    def check(self, config: Mapping[str, Any]) -> None:
        if config.tp_size > 1 and self.linear and self.implementation == "naive":
            raise ConfigError(
                "actor.token_stats=naive: needs whole logits, which no rank has with "
                f"actor.tp_size={config.tp_size}; use auto or tiled"
            )
        if not self.linear and self.implementation not in ("auto", "naive"):
            raise ConfigError(
                f"actor.token_stats={self.implementation}: {config.model_name} does more than one "
                "matrix product between hidden states and logits, so whole logits are computed; "
                "use auto"
            )


class ScalarHead(Head):
    """One number for each token, called `values`: a classification model of transformers with one
    label, as reward models are. It sees the tokens before that token, as a policy does."""

    auto_class = AutoModelForSequenceClassification
    kind = "a model with one number for each token"
    settings: ClassVar[dict[str, Any]] = {"num_labels": 1}
    layer = "score"

    def __call__(self, question: Question) -> dict[str, Tensor]:
        if {*question.wanted} != {"values"}:
            raise ValueError(f"a scalar head gives values, not {', '.join(question.wanted)}")
        # The layer is called, as FSDP gathers its weights there; a copy, as FSDP warns of views.
        numbers = question.model.score(question.hidden().float()).squeeze(-1).clone()
        values = {"values": numbers}
        if question.loss_fn is None:
            return values
        loss, metrics = loss_of(values, len(question.actions), question.loss_fn)
        return {"loss": loss, **metrics}


HEADS: dict[str, type[Head]] = {"token_stats": TokenStatsHead, "scalar": ScalarHead}
