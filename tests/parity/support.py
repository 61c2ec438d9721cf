"""The same rows for TRL's trainers and ours, and loss and gradients of an update of ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from RL2.algorithms.algorithm import resolve_algorithm
from RL2.config import apply_fallbacks, validate
from RL2.datasets import collate
from RL2.datasets.end_of_turn import load_end_tokens
from RL2.distributed import Traffic
from RL2.distributed.comm import Batch
from RL2.trainer.sources.opening import open_source, resolve_source
from RL2.trainer.startup.models import (
    load_learners,
    load_providers,
    load_reference,
    load_tokenizer,
)
from tests.ranks import run_on_ranks
from tests.trainer.support import composed

TEMPERATURE = 0.9
GROUPS, RESPONSES = 3, 4
LONGEST = 9  # tokens of a response
COMMON = {
    "actor.max_grad_norm": 1e9, "actor.gradient_checkpointing": "false",
    "actor.use_liger_kernel": "false", "actor.max_length_per_device": 2048,
}  # fmt: skip
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """reward: of the whole response."""

    prompt: list[int]
    response: list[int]
    reward: float
    group: int


def write_policies(folder: Path) -> dict[str, Path]:
    """Policies near the `model` of a folder: `new`, which is trained, `old`, which sampled, and
    `ref`, the reference."""
    tokenizer, found = AutoTokenizer.from_pretrained(folder / "model"), {}
    for seed, name in enumerate(("new", "old", "ref")):
        policy = AutoModelForCausalLM.from_pretrained(folder / "model")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        policy.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        found[name] = folder / name
    return found


def multiple(factor: float, update: tuple[float, Gradients]) -> tuple[float, Gradients]:
    loss, gradients = update
    return factor * loss, {name: factor * gradient for name, gradient in gradients.items()}


def difference(
    first: tuple[float, Gradients], second: tuple[float, Gradients]
) -> tuple[float, Gradients]:
    """The second less the first."""
    (loss, gradients), (other, others) = first, second
    return other - loss, {name: others[name] - gradients[name] for name in gradients}


def make_rows(vocab: int) -> list[Row]:
    """Groups of responses of several lengths. The rewards of all groups have one standard
    deviation."""
    generator = torch.Generator().manual_seed(0)

    def tokens(least: int, most: int) -> list[int]:
        n = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(2, vocab, (n,), generator=generator).tolist()

    rows = []
    for group in range(GROUPS):
        prompt = tokens(3, 7)
        rewards = torch.randperm(RESPONSES, generator=generator) * 0.5 + group
        rows += [Row(prompt, tokens(2, LONGEST), reward, group) for reward in rewards.tolist()]
    return rows


def our_batch(rows: Sequence[Row]) -> Batch:
    """The rows as a rollout brings them."""
    sequences = [
        {
            "token_ids": row.prompt + row.response,
            "action_mask": [False] * len(row.prompt) + [True] * len(row.response),
        }
        for row in rows
    ]
    batch = collate(sequences)
    last = batch["lengths"] - 1
    rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64)
    at_end = torch.zeros(batch["states"].shape, dtype=torch.float64)
    return batch | {
        "rewards": at_end.scatter_(1, last[:, None], rewards[:, None]),
        "group_ids": torch.tensor([row.group for row in rows]),
        "correct": rewards > 0,
    }


def ours(
    trainer: str,
    lines: dict[str, Any],
    batch: Batch | None = None,
    old: Path | None = None,
    reference: Path | None = None,
) -> tuple[float, Gradients]:
    """Loss and gradients of one update on a rank, by the parts that a run of `trainer` has.

    lines: keys of the config, besides those that are the same for all.
    batch: what to learn from; None: all rows of the run's own source, in their order.
    old: the policy before the update, if it is not the one that is trained.
    reference: the reference policy, if it is not the one that is trained.
    """
    return run_on_ranks(1, _update, trainer, COMMON | lines, batch, old, reference)[0]


def _update(
    trainer: str,
    lines: dict[str, Any],
    batch: Batch | None,
    old: Path | None,
    reference: Path | None,
) -> tuple[float, Gradients]:
    config = composed(trainer, [f"{key}={value}" for key, value in lines.items()])
    validate(config, 1)
    apply_fallbacks(config, cuda=False, available=set())
    OmegaConf.resolve(config)
    device, traffic = torch.device("cpu"), Traffic()
    make_source = resolve_source(config)
    algorithm = resolve_algorithm(config, make_source.brings(config))
    if batch is None:
        tokenizer = load_tokenizer(config, algorithm.loss.head)
        ends = load_end_tokens(config.actor, tokenizer)
        source = open_source(make_source, config, tokenizer, ends)
        batch = source.batch([source.data[i] for i in range(len(source.data))])
    learners = load_learners(config, algorithm, device, traffic)
    learners["actor"].prepare_scheduler(10)
    if old is not None:
        policy = load_reference(_with_reference(config, old), device, traffic)
        batch = policy.annotate(batch, {"old_logps": "logps"})
    referring = config if reference is None else _with_reference(config, reference)
    providers, _ = load_providers(referring, algorithm.needs, learners, device, traffic, keep=True)
    for name, fields in algorithm.needs.items():
        batch = providers[name](batch, fields)
    batch = algorithm.advantages(batch)
    gradients: Gradients = {}

    def keep(*_) -> None:
        for name, parameter in learners["actor"].hf_model.named_parameters():
            gradients[name] = parameter.grad.full_tensor().clone()

    learners["actor"].optimizer.register_step_pre_hook(keep)
    return learners["actor"].update(batch, 1)["actor/loss"], gradients


def _with_reference(config: DictConfig, folder: Path) -> DictConfig:
    """The same run with another reference policy."""
    node = "ref_actor" if "ref_actor" in config else "actor"  # where `load_reference` looks
    return OmegaConf.merge(config, {node: {"model_name": str(folder)}})


def gradients_of(loss: Tensor, model: torch.nn.Module) -> Gradients:
    """Of TRL's loss, for its own model."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal(found: tuple[float, Gradients], wanted: tuple[float, Gradients], rtol=1e-5):
    """The loss, and each gradient by its norm, up to a part of 1e-5."""
    (loss, gradients), (other_loss, others) = found, wanted
    assert abs(loss - other_loss) <= rtol * abs(other_loss), (loss, other_loss)
    assert gradients.keys() == others.keys()
    for name, other in others.items():
        error, size = (gradients[name] - other).norm(), other.norm()
        assert size > 0, name
        assert error <= rtol * size, f"{name}: {error / size:.1e}"
