"""Attention over packed sequences without a flash-attention kernel."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from transformers import AttentionInterface, PretrainedConfig

from RL2.runtime.errors import ConfigError

NAME = "sdpa_varlen"

# The name in transformers, which takes a name with "sdpa" in it for its own implementation and
# rejects it for some models.
_REGISTERED = "varlen"

_UNKNOWN = ("position_bias", "head_mask", "block_mask", "indices")

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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention in which every sequence of a pack sees only itself.

    No `[N, N]` mask of the pack is ever built. On CPU the sequences are computed one by one, which
    copies and pads nothing, and gives each the numbers that it has alone, to the bit. Elsewhere a
    kernel for each sequence, and the wait for their lengths, would cost more than padding: see
    `_side_by_side`.

    Args:
        query, key, value: `[1, heads, N, d]`, `[1, kv_heads, N, d]`, `[1, kv_heads, N, d_value]`.
        attention_mask: None (the layout follows from `cu_seq_lens_q`).
        cu_seq_lens_q: `[n + 1]` offsets of the n sequences, as flash-attention takes them.
        max_length_q: tokens of the longest sequence.
        softcap: logits of attention become softcap * tanh(logits / softcap).
        s_aux: `[heads]` logits of sinks: one more key for each head, without a value.
        kwargs: `sliding_window`, how many tokens a token sees, including itself; None for all
            before it. If the model does not pass it, as some put it only into their mask, it is
            `_window_of(module)`.

    Returns:
        `[1, N, heads, d_value]` and no attention weights, as in transformers' interface.

    Raises:
        NotImplementedError: an argument that would change the result is not supported here.
    """
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    unknown += ["attention_mask"] if attention_mask is not None else []
    unknown += ["is_causal=false"] if kwargs.get("is_causal") is False else []
    if unknown:
        raise NotImplementedError(f"{NAME} does not support {', '.join(unknown)}")
    if cu_seq_lens_q is None:
        raise NotImplementedError(f"{NAME} needs cu_seq_lens_q, where sequences of a pack begin")
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else _window_of(module)
    attend = partial(
        _causal, window=window, scaling=scaling, dropout=dropout, softcap=softcap, sinks=s_aux
    )
    spread = _one_by_one if query.device.type == "cpu" else _side_by_side
    return spread(attend, query, key, value, cu_seq_lens_q, max_length_q), None


def _one_by_one(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """`attend` on each sequence of a pack, one after the other."""
    lengths = offsets.diff().tolist()
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*part).transpose(1, 2) for part in parts], 1)


def _side_by_side(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """`attend` on all sequences of a pack at once, as rows, right-padded.

    No token of a sequence attends to the padding, which comes after it.
    """
    n_rows, n_tokens = len(offsets) - 1, query.shape[2]
    row = torch.repeat_interleave(
        offsets.diff().to(torch.int64), output_size=n_tokens
    )  # token -> sequence
    slot = row * longest + torch.arange(n_tokens, device=query.device) - offsets[row]

    def spread(packed: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = packed.shape
        padded = packed.new_zeros(n_rows * longest, heads, width)
        padded = padded.index_copy(0, slot, packed[0].transpose(0, 1))
        return padded.view(n_rows, longest, heads, width).transpose(1, 2)

    out = attend(spread(query), spread(key), spread(value))
    out = out.transpose(1, 2).reshape(n_rows * longest, *out.shape[1::2])
    return out.index_select(0, slot)[None]


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of rows of one length, `[n, heads, L, d]`, to `[n, heads, L, d_value]`."""
    length = query.shape[2]
    plain = softcap is None and sinks is None
    mask = None
    if not plain or (window is not None and window < length):
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask = mask if window is None else mask.triu(1 - window)
    if not plain:
        return _by_the_formula(query, key, value, mask, scaling, dropout, softcap, sinks)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling,
        dropout_p=dropout, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _window_of(module: torch.nn.Module) -> int | None:
    """The window of an attention layer whose model puts it only into the mask."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    config = getattr(module, "config", None)
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if types and index is not None:
        return window if types[index] == "sliding_attention" else None
    return window


def _by_the_formula(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """For arguments that the fused kernel lacks; needs memory for all logits of attention."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sinks = sinks.to(logits).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = logits.softmax(-1, torch.float32).to(value.dtype)[..., : key.shape[2]]
    return F.dropout(weights, dropout) @ value


def check_attention(config: PretrainedConfig) -> None:
    """Raise ConfigError if the sequences of a pack would influence each other."""
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if others:
        raise ConfigError(
            f"actor.model_name: {config.model_type} has layers of type {', '.join(others)}, in "
            "which the sequences of a pack would see each other; use a model whose layers are full "
            "or sliding attention"
        )


def check_rope(model_config: PretrainedConfig, config: DictConfig) -> None:
    """Raise ConfigError if the longest sequence of a pack would change the others.

    Beyond some length, two kinds of rotary embeddings choose their frequencies by the longest
    sequence that is computed with others, both in transformers and in engines.

    Args:
        config: an `actor` or `ref_actor` node.
    """
    text = model_config.get_text_config()
    keys = ("max_length_per_device", "max_inference_length_per_device")
    key, length = max(((key, config.get(key) or 0) for key in keys), key=lambda item: item[1])
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        limit = {
            "dynamic": getattr(text, "max_position_embeddings", None),
            "longrope": rope.get("original_max_position_embeddings")
            or getattr(text, "original_max_position_embeddings", None),
        }.get(rope.get("rope_type"))
        if limit is not None and length * config.sp_size > limit:
            times = f" * actor.sp_size={config.sp_size}" if config.sp_size > 1 else ""
            raise ConfigError(
                f"actor.{key}={length}{times}: {model_config.model_type} has rope_type="
                f"{rope['rope_type']}, where one sequence of more than {limit} tokens changes the "
                f"others that are computed with it; use actor.{key}={limit // config.sp_size} or "
                "less, or a model with other rotary embeddings"
            )


def _ropes(parameters: dict | None) -> list[dict]:
    """The rotary embeddings of a model: one, or one for each type of layer."""
    parts = [part for part in (parameters or {}).values() if isinstance(part, dict)]
    return parts or [parameters or {}]


def register_attention(attention: str = NAME) -> str:
    """Register `sdpa_varlen` with transformers (its documented extension point).

    Returns:
        The name in transformers of `attention`, a name from the config.
    """
    AttentionInterface.register(_REGISTERED, sdpa_varlen)
    return _REGISTERED if attention == NAME else attention
