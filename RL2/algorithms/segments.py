"""Sequences, groups and pairs, which a loss may sum its tokens to.

A loss that names `sequences`, `groups` or `pairs` among its positional parameters gets one of the
objects below for each, and all action tokens of a micro-batch at once:

    def gspo(logps, old_logps, advantages, sequences, *, clip=3e-4):
        ratio = sequences.mean(logps - old_logps).exp()  # [S], differentiable
        a = sequences.mean(advantages)
        return -torch.minimum(a * ratio, a * ratio.clamp(1 - clip, 1 + clip))

    def dpo(logps, ref_logps, sequences, pairs, *, beta=0.1):
        margin = pairs.difference(sequences.sum(logps - ref_logps))  # [P]
        return -F.logsigmoid(beta * margin), {"margin": margin}

A **sequence** is a sample: all action tokens of one answer. Several turns that do not continue each
other are several rows of a batch, and still one sequence. A **group** is the samples of one prompt,
a **pair** one sample that was chosen and one that was rejected. Samples without action tokens are
not among the sequences. N tokens, S sequences, G groups and P pairs are those of a micro-batch;
none of them is ever cut, whatever the number of ranks and the size of a micro-batch. With
`actor.sp_size` the ranks that share a pack all have its whole tokens here.

Such a loss returns one value per token `[N]`, sequence `[S]`, group `[G]` or pair `[P]`, always of
one kind, and metrics of the same kind. With `actor.avg_level`, a sequence weighs as much as its
tokens together, and a group or a pair as much as its sequences. So with `token` a sequence
weighs by its share of all action tokens; with `sequence` all samples weigh the same, and a pair as
its two; with `correct` only correct samples count.

The fields of a batch that say what belongs together, one entry per row (`[B]`):

    sample_ids  int64, groups: group_ids  int64
    pairs: pair_ids  int64, and chosen  bool, true for all rows of the sample that was preferred
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from RL2.runtime.errors import ConfigError

# What a loss may name -> the fields of the batch, one entry per row, that it is made of. The first
# says which rows belong together.
SEGMENTS: dict[str, tuple[str, ...]] = {
    "sequences": ("sample_ids",),
    "groups": ("group_ids",),
    "pairs": ("pair_ids", "chosen"),
}

# What a loss may return one value for: each of N, S, G or P.
KINDS: dict[str, str] = {"tokens": "token"} | {name: name.removesuffix("s") for name in SEGMENTS}


@dataclass(frozen=True, eq=False)
class Segments:
    """`sequences` of tokens, or `groups` of sequences.

    Attributes:
        index: which segment each element belongs to.
        n: how many segments there are; each has an element.
        name: `sequences` or `groups`.
        elements: `token` or `sequence`.
    """

    index: Tensor
    n: int
    name: str = "sequences"
    elements: str = "token"

    def __len__(self) -> int:
        return self.n

    @property
    def sizes(self) -> Tensor:
        """How many elements each segment has, in float32."""
        return self.sum(torch.ones_like(self.index, dtype=torch.float32))

    def sum(self, x: Tensor) -> Tensor:
        """One sum per segment, of one value per element; added up in float64."""
        _check(x, len(self.index), f"{self.name}.sum", self.elements)
        dtype = torch.promote_types(x.dtype, torch.float32)
        sums = x.new_zeros(self.n, dtype=torch.float64)
        return sums.index_add(0, self.index, x.double()).to(dtype)

    def mean(self, x: Tensor) -> Tensor:
        """One mean per segment, over its own elements, of one value per element."""
        return self.sum(x) / self.sizes

    def spread(self, x: Tensor) -> Tensor:
        """One value per element, that of its segment, from one value per segment."""
        _check(x, self.n, f"{self.name}.spread", self.name.removesuffix("s"))
        return x.index_select(0, self.index)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Two sequences each. One that has no action tokens counts as 0 in all that follows.

    Attributes:
        index: `[S]`, which pair each sequence belongs to.
        is_chosen: `[S]`, whether it is the one that was preferred.
        n: how many pairs there are.
    """

    index: Tensor
    is_chosen: Tensor
    n: int

    def __len__(self) -> int:
        return self.n

    def chosen(self, x: Tensor) -> Tensor:
        """`[S]` -> `[P]`: the values of the sequences that were chosen."""
        return self._sum(x, self.is_chosen, "chosen")

    def rejected(self, x: Tensor) -> Tensor:
        """`[S]` -> `[P]`: the values of the sequences that were rejected."""
        return self._sum(x, ~self.is_chosen, "rejected")

    def difference(self, x: Tensor) -> Tensor:
        """`[S]` -> `[P]`: chosen - rejected."""
        return self.chosen(x) - self.rejected(x)

    def sum(self, x: Tensor) -> Tensor:
        """`[S]` -> `[P]`: chosen + rejected."""
        return self.chosen(x) + self.rejected(x)

    def _sum(self, x: Tensor, which: Tensor, name: str) -> Tensor:
        _check(x, len(self.index), f"pairs.{name}", "sequence")
        pairs = Segments(self.index, self.n, "pairs", "sequence")
        return pairs.sum(x.masked_fill(~which, 0))


def kinds_of(n_tokens: int, tensors: Mapping[str, Any]) -> dict[str, int]:
    """How many values a loss with these `tensors` may return, by kind."""
    return {"tokens": n_tokens} | {name: len(tensors[name]) for name in SEGMENTS if name in tensors}


def add_up(x: Tensor, kind: str, segments: Mapping[str, Segments | Pairs]) -> Tensor:
    """Sums of one value per token, `[N]`, over each token, sequence, group or pair."""
    if kind == "tokens":
        return x
    sums = segments["sequences"].sum(x)
    return sums if kind == "sequences" else segments[kind].sum(sums)


def count(batch: Mapping[str, Tensor], kind: str) -> int:
    """How many elements of a kind a batch has, counting only those with action tokens."""
    if kind == "tokens":
        return int(batch["action_mask"].sum())
    return len(batch[SEGMENTS[kind][0]][batch["action_mask"].any(-1)].unique())


def segments_of(
    row: Tensor, rows: Mapping[str, Tensor], names: Iterable[str], device: torch.device | str
) -> dict[str, Segments | Pairs]:
    """`sequences`, and those of `groups` and `pairs` that `names` asks for, on `device`.

    Args:
        row: `[N]`, the row of a micro-batch that each of its action tokens is in.
        rows: `[n]` fields of its rows: see `SEGMENTS`. All in CPU memory: ids decide sizes.
    """
    acts = torch.bincount(row, minlength=len(rows["sample_ids"])) > 0
    rows = {name: field[acts] for name, field in rows.items()}
    samples, of_row = rows["sample_ids"].unique(return_inverse=True)
    token = of_row[(acts.cumsum(0) - 1)[row]]
    found: dict[str, Segments | Pairs] = {"sequences": Segments(token.to(device), len(samples))}
    first = torch.empty_like(samples)  # a row of each sample: what belongs to it, all rows have
    first[of_row] = torch.arange(len(of_row))
    for name in {"groups", "pairs"} & set(names):
        ids, index = rows[SEGMENTS[name][0]][first].unique(return_inverse=True)
        index = index.to(device)
        if name == "groups":
            found[name] = Segments(index, len(ids), "groups", "sequence")
        else:
            found[name] = Pairs(index, rows["chosen"][first].bool().to(device), len(ids))
    return found


def kept_together(batch: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """`[B]`: rows with the same number must stay together, as they share a sample, or a group or
    pair if those are among `names`. Numbered in the order of their first rows."""
    unit = torch.arange(len(batch["sample_ids"]))
    before = None
    while before is None or not torch.equal(unit, before):
        before = unit
        for name in {"sequences", *names}:
            index = batch[SEGMENTS[name][0]].unique(return_inverse=True)[1]
            unit = torch.full_like(unit, len(unit)).scatter_reduce(0, index, unit, "amin")[index]
    return unit.unique(return_inverse=True)[1]


def fault_of(batch: Mapping[str, Tensor], names: Iterable[str], max_length: int) -> str | None:
    """Why a loss that names these cannot take a batch; None if it can.

    max_length: tokens of a micro-batch, on all ranks that share one.
    """
    names = [*names]
    for name in names:
        if missing := [field for field in SEGMENTS[name] if field not in batch]:
            return (
                f"names {name}, but this run's batches have no {' and '.join(missing)}; use a "
                f"source that gives them, or a loss without {name}"
            )
    if "pairs" in names and (fault := _fault_of_pairs(batch)) is not None:
        return fault
    unit = kept_together(batch, names)
    tokens = torch.zeros(int(unit.max()) + 1, dtype=torch.int64)
    tokens.index_add_(0, unit, batch["lengths"])
    longest, which = (int(x) for x in tokens.max(0))
    if longest <= max_length:
        return None
    row = int((unit == which).nonzero()[0])
    widest = "groups" if "groups" in names else "pairs" if "pairs" in names else "sequences"
    what = {"groups": "the group", "pairs": "the pair", "sequences": "the sample"}[widest]
    return (
        f"takes {widest} whole, but {what} {int(batch[SEGMENTS[widest][0]][row])} has {longest} "
        f"tokens and a micro-batch {max_length}; raise actor.max_length_per_device or "
        "actor.sp_size, whose product that is"
    )


def check_segments(config: Mapping[str, Any], loss: Any, brought: Collection[str]) -> None:
    """ConfigError if a run cannot give a loss the segments that it names, or would ignore a key.

    loss: a `TokenLoss`. brought: the fields that the source of the run brings.
    """
    if not loss.segments:
        return
    actor, element = config["actor"], KINDS[loss.kind]
    for name in {"pairs"} & {*loss.segments}:
        if missing := [field for field in SEGMENTS[name] if field not in brought]:
            raise ConfigError(
                f"actor.loss: {loss.name} names {name}, which trainer.source="
                f"{config['trainer']['source']} does not bring ({', '.join(missing)}); use the "
                f"trainer dpo or rm, a source whose batches have them, or a loss without {name}"
            )
    if loss.draws and actor.get("sp_size", 1) > 1:
        raise ConfigError(
            f"actor.sp_size={actor['sp_size']}: the loss {loss.name} draws random numbers, and "
            "ranks that share their sequences would draw other numbers; use actor.sp_size=1, or a "
            "torch.Generator with a seed"
        )
    if loss.kind in ("groups", "pairs"):
        if actor.get("tis_coef", 0.0) > 0:
            raise ConfigError(
                f"actor.tis_coef={actor['tis_coef']}: has no effect with the loss {loss.name}, "
                f"which returns one value per {element}; set it to 0"
            )
        kl = actor.get("kl")
        if kl is not None and kl["coef"] > 0 and kl["type"] != "loss" and not loss.uses_advantages:
            raise ConfigError(
                f"actor.kl.type={kl['type']}: has no effect with the loss {loss.name}, which "
                f"returns one value per {element} and does not read the advantages; use "
                "actor.kl.type=loss"
            )
    if "groups" in loss.segments and "rollout" in config:
        n = config["train_data"]["responses_per_prompt"]
        longest = config["rollout"]["train_sampling_params"]["max_new_tokens"]
        room = actor["max_length_per_device"] * actor.get("sp_size", 1)
        if n * longest > room:
            raise ConfigError(
                f"actor.max_length_per_device={actor['max_length_per_device']}: the loss "
                f"{loss.name} takes groups whole, and {n} answers (train_data.responses_per_prompt)"
                f" of up to {longest} tokens are more than {room}; raise it, raise actor.sp_size, "
                "or lower rollout.train_sampling_params.max_new_tokens"
            )


def _fault_of_pairs(batch: Mapping[str, Tensor]) -> str | None:
    samples = torch.stack([batch["pair_ids"], batch["sample_ids"], batch["chosen"].long()])
    pair, _, chosen = samples.unique(dim=1)
    ids, index = pair.unique(return_inverse=True)
    for kind, is_kind in (("chosen", chosen == 1), ("rejected", chosen == 0)):
        n = torch.bincount(index[is_kind], minlength=len(ids))
        if (n != 1).any():
            which = int((n != 1).nonzero()[0])
            return (
                f"names pairs, but the pair {int(ids[which])} has {int(n[which])} {kind} samples; "
                "give every pair one that was chosen and one that was rejected (pair_ids, chosen)"
            )
    return None


def _check(x: Tensor, n: int, call: str, element: str) -> None:
    if not isinstance(x, Tensor) or x.shape != (n,):
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{call} takes one value per {element}, [{n}], and was given {got}")
