"""Attention over packed sequences without a flash-attention kernel."""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PretrainedConfig

from RL2.config.errors import ConfigError

NAME = "sdpa_varlen"

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def sdpa_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention in which every sequence of a pack sees only itself.

    Linear layers work on the pack as it is; only here the sequences are laid out side by side,
    right-padded, for torch's fused causal kernel, so that no `[N, N]` mask is ever built.
    Padding stands to the right of a causal row: no token of the sequence attends to it.

    Args:
        query: `[1, heads, N, d]`; key and value `[1, kv_heads, N, d]`.
        attention_mask: unused (the layout follows from `cu_seq_lens_q`).
        cu_seq_lens_q: `[n + 1]` offsets of the n sequences, as flash-attention takes them.
        max_length_q: tokens of the longest sequence.
        sliding_window: how many tokens, itself included, a token sees; None for all before it.

    Returns:
        `[1, N, heads, d]` and no attention weights, as transformers' interface asks.

    Raises:
        NotImplementedError: a model that caps attention's logits or adds sinks to them.
    """
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"{NAME}: knows no {', '.join(unknown)}; use flash_attention_2")
    n_rows, n_tokens, width = len(cu_seq_lens_q) - 1, query.shape[2], query.shape[3]
    row = torch.repeat_interleave(
        cu_seq_lens_q.diff().to(torch.int64), output_size=n_tokens
    )  # token -> sequence
    column = torch.arange(n_tokens, device=query.device) - cu_seq_lens_q[row]
    slot = row * max_length_q + column

    def spread(packed: torch.Tensor) -> torch.Tensor:
        heads = packed.shape[1]
        padded = packed.new_zeros(n_rows * max_length_q, heads, width)
        padded = padded.index_copy(0, slot, packed[0].transpose(0, 1))
        return padded.view(n_rows, max_length_q, heads, width).transpose(1, 2)

    mask = None
    if sliding_window is not None and sliding_window < max_length_q:
        mask = torch.ones(max_length_q, max_length_q, dtype=torch.bool, device=query.device)
        mask = mask.tril().triu(1 - sliding_window)
    out = F.scaled_dot_product_attention(
        spread(query),
        spread(key),
        spread(value),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    out = out.transpose(1, 2).reshape(n_rows * max_length_q, -1, width)
    return out.index_select(0, slot)[None], None


def check_attention(config: PretrainedConfig, attention: str) -> None:
    """ConfigError where packs of sequences would not be what each sequence is alone."""
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if others:
        raise ConfigError(
            f"actor.model_name: {config.model_type} has layers of type {', '.join(others)}, in "
            "which the sequences of a pack would see each other; use a model whose layers are full "
            "or sliding attention"
        )
    if attention == NAME and getattr(config, "attn_logit_softcapping", None):
        raise ConfigError(
            f"actor.attn_implementation={NAME}: {config.model_type} caps the logits of attention, "
            "which this kernel does not; use flash_attention_2"
        )


def register_attention() -> str:
    """Make `sdpa_varlen` known to transformers (its documented extension point)."""
    AttentionInterface.register(NAME, sdpa_varlen)
    return NAME
