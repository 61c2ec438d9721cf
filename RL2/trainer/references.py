"""Log-probabilities of rows under a frozen reference, computed once for each row of a data set."""

import logging
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from RL2.datasets import collate
from RL2.datasets.labels import mismatched
from RL2.distributed import broadcast, rank
from RL2.distributed.comm import Batch
from RL2.trainer.startup.frozen import Provider
from RL2.workers import ShardedModel

logger = logging.getLogger(__name__)

Key = bytes
_KEY_BYTES = 16


class KeptReferences:
    """A provider of fields that keeps, on rank 0, what it has computed for each row, in float32 for
    each action token. A row is known by its tokens and mask.

    model: the frozen model. origin: names all that its numbers depend on besides the rows, so that
        those of another model are not taken from a checkpoint.
    """

    def __init__(self, model: ShardedModel, origin: str = ""):
        self.model, self.origin = model, origin
        self._kept: dict[Key, Tensor] = {}

    def __call__(self, batch: Batch | None, fields: Mapping[str, str]) -> Batch | None:
        """Add the one field of `fields`, {name: statistic}, to rank 0's batch (a collective). Only
        rows that are new take part in a forward."""
        ((name, statistic),) = fields.items()
        keys, new = [], None
        if rank() == 0:
            keys = [_key(batch, row) for row in range(len(batch["states"]))]
            rows = [row for row, key in enumerate(keys) if key not in self._kept]
            new = {field: x[rows] for field, x in batch.items()} if rows else None
        if broadcast(new is not None):
            new = self.model.annotate(new, {name: statistic})
        if rank() != 0:
            return batch
        if new is not None:
            for row, values, mask in zip(rows, new[name], new["action_mask"], strict=True):
                self._kept[keys[row]] = values[mask].clone()
        mask = batch["action_mask"]
        values = torch.zeros(mask.shape)
        values[mask] = torch.cat([self._kept[key] for key in keys])
        return batch | {name: values}

    def state_dict(self) -> dict[str, Tensor | str]:
        """Everything kept, in three tensors, and where it is from."""
        values = [torch.zeros(0), *self._kept.values()]
        return {
            "keys": torch.tensor([*b"".join(self._kept)], dtype=torch.uint8),
            "sizes": torch.tensor([len(one) for one in values[1:]], dtype=torch.int64),
            "values": torch.cat(values),
            "origin": self.origin,
        }

    def load_state_dict(self, state: dict[str, Tensor | str]) -> None:
        """Keep what `state_dict` returned, if it is of the same reference."""
        if state.get("origin", self.origin) != self.origin:
            logger.warning(
                "the checkpoint was written with another reference (model, temperature or dtype); "
                "its log-probabilities are computed anew"
            )
            return
        whole = state["keys"].numpy().tobytes()
        keys = [whole[i : i + _KEY_BYTES] for i in range(0, len(whole), _KEY_BYTES)]
        values = state["values"].split(state["sizes"].tolist())
        self._kept = {key: x.clone() for key, x in zip(keys, values, strict=True)}


class MismatchKL:
    """A provider of `mismatch_kl`, the estimate of KL(policy || reference) that KTO takes: the mean
    over a batch of the log-ratio of unrelated answers, each row's prompt with the answer of the row
    before (of pairs, first the chosen ones and then the others); 0 if that is negative, or if there
    is only one prompt.

    policy: the model that is trained. reference: what gives `logps` of the frozen one. max_length:
    see `RL2.datasets.labels.mismatched`.
    """

    def __init__(self, policy: ShardedModel, reference: Provider, max_length: int):
        self.policy, self.reference, self.max_length = policy, reference, max_length

    def __call__(self, batch: Batch | None, fields: Mapping[str, str]) -> Batch | None:
        others = None
        if rank() == 0 and len(batch["group_ids"].unique()) > 1:
            others = collate(mismatched(_items(batch), self.max_length))
        kl = 0.0
        if broadcast(others is not None):
            others = self.policy.annotate(others, {"own": "logps"})
            others = self.reference(others, {"ref": "logps"})
        if rank() != 0:
            return batch
        if others is not None:
            ratios = (others["own"].double() - others["ref"]).masked_fill(~others["action_mask"], 0)
            kl = max(0.0, ratios.sum().item() / len(ratios))
        return batch | {"mismatch_kl": torch.full(batch["action_mask"].shape, kl)}


class Resumable:
    """What a resumed run restores besides its models: the source, and kept references.

    references: the provider of `ref_logps`; one that keeps nothing has nothing to restore.
    """

    def __init__(self, source: Any, references: Any = None):
        self.source = source
        self.references = references if isinstance(references, KeptReferences) else None

    def complete(self, position: dict[str, Any]) -> dict[str, Any]:
        """A position of the source, with all references on rank 0. They are the same whenever they
        are taken, as a row's never change."""
        if self.references is None or rank() != 0:
            return position
        return position | {"references": self.references.state_dict()}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore what `complete` returned on all ranks."""
        first = dict(states[0])
        kept = first.pop("references", None)
        if self.references is not None and kept is not None:
            self.references.load_state_dict(kept)
        self.source.load_state_dict([first, *states[1:]])


def _key(batch: Batch, row: int) -> Key:
    """Names the tokens of a row and which of them are actions."""
    n = int(batch["lengths"][row])
    parts = [batch[name][row, :n].numpy().tobytes() for name in ("states", "actions")]
    parts.append(batch["action_mask"][row, :n].numpy().tobytes())
    return sha256(b"".join(parts)).digest()[:_KEY_BYTES]


def _items(batch: Batch) -> list[dict[str, list]]:
    """The sequences of a batch's rows, as data sets have them; those that were chosen first."""
    n_rows, items = len(batch["lengths"]), []
    order = (~batch.get("chosen", torch.ones(n_rows, dtype=torch.bool))).int().argsort(stable=True)
    for row in order.tolist():
        n = int(batch["lengths"][row])
        ids = [*batch["states"][row, :n].tolist(), int(batch["actions"][row, n - 1])]
        mask = [False, *batch["action_mask"][row, :n].tolist()]
        items.append({"token_ids": ids, "action_mask": mask})
    return items
