"""Values of the statistics: one pass over the vocabulary, two if ranks are wanted."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from RL2.ops.token_stats import state as states
from RL2.ops.token_stats.products import half_operands
from RL2.ops.token_stats.stats import NEG_INF
from RL2.ops.token_stats.tiling import TiledHead, tiles_of_logits


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep over the vocabulary: the state, and the `top_k` largest z of a row.

    `top_index [T, K]` are columns of the whole vocabulary, -1 for padding. The first is the
    state's index, even in a tie. `at_z [T, K]` are those of the columns `head.at`, -inf for -1; it
    has no columns if they are not wanted.
    """

    state: Tensor
    top_z: Tensor
    top_index: Tensor
    at_z: Tensor


def _sweep(
    head: TiledHead, kept: Sequence[Tensor] | None = None, fused: bool = False
) -> SweepResult:
    """One pass over the vocabulary; with `kept`, a `[T, n]` buffer per tile, logits stay there.

    With `fused` not even a tile of them is written.
    """
    n_tokens = len(head.hidden)
    device = head.hidden.device
    state = states.empty_state(n_tokens, head.dtype, device)
    top_z = torch.full((n_tokens, head.top_k), NEG_INF, dtype=head.dtype, device=device)
    top_index = torch.full((n_tokens, head.top_k), -1, device=device)
    n_at = 0 if head.at is None else head.at.shape[1]
    at_z = torch.full((n_tokens, n_at), NEG_INF, dtype=head.dtype, device=device)
    if fused:
        columns = slice(0, head.n_columns)
        bias = None if head.bias is None else head.bias[columns]
        state = head.kernels.fused_state(
            head.hidden, head.weight[columns], bias, head.actions,
            head.start, head.scale, head.entropy,
        )  # fmt: skip
    for rows, start, z in () if fused else tiles_of_logits(head, kept, fill=True):
        head.kernels.update_state(
            state[:, rows], z, head.actions[rows], start, head.scale, head.entropy
        )
        if head.top_k:
            top_z[rows], top_index[rows] = _merge_top(
                (top_z[rows], top_index[rows]), z, start, head.scale
            )
        if n_at:
            column = head.at[rows] - start
            inside = (column >= 0) & (column < z.shape[1])
            found = z.gather(-1, column.clamp(0, z.shape[1] - 1)) * head.scale
            at_z[rows] = torch.where(inside, found, at_z[rows])
    if head.shard is not None:
        state = states.merge_all(head.shard.all_gather(state).unbind())
        if head.top_k:
            all_z = head.shard.all_gather(top_z).transpose(0, 1).flatten(1)
            all_index = head.shard.all_gather(top_index).transpose(0, 1).flatten(1)
            top_z, best = all_z.topk(head.top_k, -1)
            top_index = all_index.gather(-1, best)
        if n_at:
            at_z = head.shard.all_gather(at_z).amax(0)
    if head.top_k:  # in a tie topk may put another column first
        first = state[1].long().unsqueeze(-1)
        top_index = torch.where(top_index == first, top_index[:, :1], top_index)
        top_index[:, :1] = first
    return SweepResult(state, top_z, top_index, at_z)


def _merge_top(
    seen: tuple[Tensor, Tensor], logits: Tensor, start: int, scale: float
) -> tuple[Tensor, Tensor]:
    values, index = seen
    k = values.shape[1]
    new_values, new_index = logits.topk(min(k, logits.shape[1]), -1)
    values = torch.cat([values, new_values * scale], -1)
    index = torch.cat([index, new_index + start], -1)
    values, best = values.topk(k, -1)
    return values, index.gather(-1, best)


def _ranks(head: TiledHead, state: Tensor, kept: Sequence[Tensor] | None = None) -> Tensor:
    """1 + the number of larger logits, `[T]`.

    It needs the action's logit first, so without `kept` logits this is a second pass. It computes
    exactly the products of the first one: others would round differently, and a token could outrank
    its equal.
    """
    chosen = state[5].unsqueeze(-1)
    above = torch.zeros_like(state[0])
    for rows, _, z in tiles_of_logits(head, kept):
        above[rows] += (z * head.scale > chosen[rows]).sum(-1)
    if head.shard is not None:
        head.shard.all_reduce(above)
    return 1 + above


def sweep_statistics(
    head: TiledHead, wanted: Sequence[str], kept: Sequence[Tensor] | None = None
) -> tuple[dict[str, Tensor], SweepResult]:
    with torch.no_grad(), torch.autocast(head.hidden.device.type, enabled=False):
        # Ranks and top_logps compare logits with each other, so all must come from one kind of
        # product; top_logps and at_logps need the logits.
        reads = head.top_k or head.at is not None
        fused = head.kernels.fused_state is not None and kept is None and not reads
        halves = half_operands(head.hidden, head.weight)
        seen = _sweep(head, kept, fused and halves and "ranks" not in wanted)
        values = states.statistics(seen.state, head.actions)
        if "ranks" in wanted:
            values["ranks"] = _ranks(head, seen.state, kept)
        top, log_p_top = seen.state[0].unsqueeze(-1), values["max_logps"].unsqueeze(-1)
        values["top_logps"] = (seen.top_z - top) + log_p_top
        values["top_ids"] = seen.top_index.masked_fill(seen.top_z == NEG_INF, -1).int()
        values["at_logps"] = (seen.at_z - top) + log_p_top
    return {name: values[name] for name in wanted}, seen
