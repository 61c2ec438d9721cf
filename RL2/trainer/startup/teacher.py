"""The teacher: a frozen model, or the policy itself, that computes fields of a batch."""

from collections.abc import Mapping, Sequence

import torch
from omegaconf import DictConfig

from RL2.config.models import POLICY
from RL2.datasets.context import after_prompts
from RL2.distributed import Traffic
from RL2.distributed.comm import Batch
from RL2.ops.token_stats import NEG_INF
from RL2.trainer.startup.frozen import Provider, said_of
from RL2.workers import Actor, ShardedModel

TOP_K = 64
"""The default of `teacher.top_k`."""


def load_teacher(
    config: DictConfig,
    actor: Actor,
    device: torch.device,
    traffic: Traffic,
    contexts: Sequence[Sequence[int]] | None,
) -> Provider:
    """The provider of the fields of `teacher`.

    contexts: the prompts that it reads instead of those of the training rows, by their index.
    """
    if config.teacher.model_name == POLICY:
        annotate = actor.annotate
    else:
        with said_of("teacher"):
            model = ShardedModel(config.teacher, device, traffic)
        model.offload()
        annotate = model.annotate
    n_tokens = actor.hf_model.get_input_embeddings().weight.shape[0]
    top_k = min(config.teacher.top_k or TOP_K, n_tokens)

    def provide(batch: Batch | None, fields: Mapping[str, str]) -> Batch | None:
        read = batch
        if batch is not None and contexts is not None:
            prompts = [contexts[index] for index in batch["prompt_index"].tolist()]
            read = after_prompts(batch, prompts)
        found = annotate(read, fields, top_k=top_k)
        if batch is None:
            return None
        values = {name: found[name] for name in fields}
        if contexts is not None:
            values = {
                name: _moved(x, read["action_mask"], batch["action_mask"])
                for name, x in values.items()
            }
        return batch | _known(values, n_tokens)

    return provide


def teacher_kl(batch: Batch | None) -> dict[str, float]:
    """The metric `train/teacher_kl` of a batch with log-probabilities of teacher and student: the
    KL from student to teacher per token, estimated on the student's samples."""
    if batch is None or not {"teacher_logps", "old_logps"} <= batch.keys():
        return {}
    mask = batch["action_mask"]
    if not mask.any():
        return {}
    return {"train/teacher_kl": (batch["old_logps"] - batch["teacher_logps"])[mask].mean().item()}


def _moved(values: torch.Tensor, there: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """Values of the actions `there`, at the same actions `here`."""
    result = values.new_zeros(*here.shape, *values.shape[2:])
    result[here] = values[there]
    return result


def _known(values: Batch, n_tokens: int) -> Batch:
    """The fields without tokens that only the teacher has."""
    ids = values.get("teacher_top_ids")
    if ids is None or int(ids.max()) < n_tokens:
        return values
    missing = ids >= n_tokens
    logps = values.get("teacher_top_logps")
    known = {} if logps is None else {"teacher_top_logps": logps.masked_fill(missing, NEG_INF)}
    return values | known | {"teacher_top_ids": ids.masked_fill(missing, -1)}
