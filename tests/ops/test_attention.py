"""Packed attention gives every sequence what it has alone, window included."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, GraniteMoeHybridConfig, LlamaConfig, MistralConfig

from RL2.config import ConfigError
from RL2.ops.attention import check_attention, sdpa_varlen

LENGTHS = [5, 1, 9, 3]


def case(heads=4, kv_heads=2, d=8):
    generator = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    return (
        torch.randn(1, count, n, d, generator=generator, dtype=torch.float64)
        for count in (heads, kv_heads, kv_heads)
    )


def packed(query, key, value, **kwargs):
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    out, weights = sdpa_varlen(
        torch.nn.Module(), query, key, value, None, cu_seq_lens_q=offsets,
        max_length_q=max(LENGTHS), **kwargs,
    )  # fmt: skip
    assert weights is None
    return out


def alone(query, key, value, window):
    """Each sequence by the formula, one key at a time."""
    rows, start = [], 0
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    for length in LENGTHS:
        for i in range(start, start + length):
            first = max(start, i - window + 1)
            scores = (query[0, :, i, None] * key[0, :, first : i + 1]).sum(-1) / 8**0.5
            rows.append((scores.softmax(-1)[..., None] * value[0, :, first : i + 1]).sum(1))
        start += length
    return torch.stack(rows)[None]


@pytest.mark.parametrize("window", [1, 2, 4, 8, 9, 100])
def test_each_token_sees_its_window_of_its_own_sequence(window):
    query, key, value = case()
    out = packed(query, key, value, sliding_window=window)
    torch.testing.assert_close(out, alone(query, key, value, window), rtol=1e-12, atol=1e-12)


def test_without_a_window_a_token_sees_all_before_it():
    query, key, value = case()
    out = packed(query, key, value)
    torch.testing.assert_close(out, alone(query, key, value, 99), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed(query, key, value, sliding_window=None), out)


@pytest.mark.parametrize("option", ["softcap", "s_aux"])
def test_what_it_does_not_know_is_an_error(option):
    with pytest.raises(NotImplementedError, match=f"knows no {option}; use flash_attention_2"):
        packed(*case(), **{option: 30.0})
    packed(*case(), **{option: None})


def test_models_whose_sequences_would_mix_are_refused():
    check_attention(LlamaConfig(), "sdpa_varlen")
    check_attention(MistralConfig(), "sdpa_varlen")
    hybrid = GraniteMoeHybridConfig(layer_types=["mamba", "attention"], num_hidden_layers=2)
    with pytest.raises(ConfigError, match="granitemoehybrid has layers of type linear_attention"):
        check_attention(hybrid, "flash_attention_2")
    with pytest.raises(ConfigError, match="attn_implementation=sdpa_varlen: gemma2 caps the"):
        check_attention(Gemma2Config(), "sdpa_varlen")
    check_attention(Gemma2Config(), "flash_attention_2")
