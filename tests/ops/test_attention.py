"""Packed attention gives every sequence what it has alone, window included."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, GraniteMoeHybridConfig, LlamaConfig, MistralConfig

from RL2.ops import attention
from RL2.ops.attention import check_attention, sdpa_varlen
from RL2.runtime.errors import ConfigError

LENGTHS = [5, 1, 9, 3]


def case(heads=4, kv_heads=2, d=8):
    generator = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    return (
        torch.randn(1, count, n, d, generator=generator, dtype=torch.float64)
        for count in (heads, kv_heads, kv_heads)
    )


def packed(query, key, value, module=None, attention_mask=None, **kwargs):
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    out, weights = sdpa_varlen(
        module or torch.nn.Module(), query, key, value, attention_mask, cu_seq_lens_q=offsets,
        max_length_q=max(LENGTHS), **kwargs,
    )  # fmt: skip
    assert weights is None
    return out


def alone(query, key, value, window, softcap=None, sinks=None):
    """Each sequence by the formula, one query at a time."""
    rows, start = [], 0
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    for length in LENGTHS:
        for i in range(start, start + length):
            first = max(start, i - window + 1)
            scores = (query[0, :, i, None] * key[0, :, first : i + 1]).sum(-1) / 8**0.5
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            weights = scores.exp() / (
                scores.exp().sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None])
            )
            rows.append((weights[..., None] * value[0, :, first : i + 1]).sum(1))
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


@pytest.mark.parametrize("d_value", [8, 3])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap, sinks", [(None, False), (1.5, False), (None, True), (1.5, True)])
def test_capped_logits_sinks_and_narrow_values(softcap, sinks, window, d_value):
    query, key, value = case()
    value = value[..., :d_value]
    s_aux = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64) if sinks else None
    out = packed(query, key, value, softcap=softcap, s_aux=s_aux, sliding_window=window)
    expected = alone(query, key, value, window or 99, softcap, s_aux)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # softmax is in fp32


class Layer(torch.nn.Module):
    """As attention layers of transformers are where they pass no window."""

    def __init__(self, index, **config):
        super().__init__()
        self.layer_idx, self.config = index, LlamaConfig(**config)


KINDS = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    "layer, window",
    [
        (Layer(0), 99),
        (Layer(0, sliding_window=4), 4),
        (Layer(0, sliding_window=4, layer_types=KINDS, num_hidden_layers=2), 99),
        (Layer(1, sliding_window=4, layer_types=KINDS, num_hidden_layers=2), 4),
    ],
)
def test_a_window_that_only_the_mask_would_have(layer, window):
    out = packed(*case(), module=layer)
    torch.testing.assert_close(out, alone(*case(), window), rtol=1e-12, atol=1e-12)
    layer.sliding_window = 2
    torch.testing.assert_close(packed(*case(), module=layer), alone(*case(), 2))
    torch.testing.assert_close(
        packed(*case(), module=layer, sliding_window=None), alone(*case(), 99)
    )


@pytest.mark.parametrize("option", ["position_bias", "attention_mask", "indices"])
def test_what_it_does_not_know_is_an_error(option):
    with pytest.raises(NotImplementedError, match=f"does not support {option}"):
        packed(*case(), **{option: torch.ones(1)})
    packed(*case(), **{option: None})
    with pytest.raises(NotImplementedError, match="does not support is_causal=false"):
        packed(*case(), is_causal=False)
    with pytest.raises(NotImplementedError, match="needs cu_seq_lens_q"):
        sdpa_varlen(torch.nn.Module(), *case(), None)


def test_models_whose_sequences_would_mix_are_refused():
    check_attention(LlamaConfig())
    check_attention(MistralConfig())
    check_attention(Gemma2Config())
    hybrid = GraniteMoeHybridConfig(layer_types=["mamba", "attention"], num_hidden_layers=2)
    with pytest.raises(ConfigError, match="granitemoehybrid has layers of type linear_attention"):
        check_attention(hybrid)


def test_on_cpu_a_sequence_has_the_very_numbers_that_it_has_alone():
    tensors = [x.float().requires_grad_() for x in case()]
    out = packed(*tensors)
    gradients = torch.autograd.grad(out.square().sum(), tensors)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        own = [x[:, :, rows].detach().requires_grad_() for x in tensors]
        ends = torch.tensor([0, length], dtype=torch.int32)
        single, _ = sdpa_varlen(
            torch.nn.Module(), *own, None, cu_seq_lens_q=ends, max_length_q=length
        )
        assert torch.equal(single, out[:, rows])
        for mine, whole in zip(
            torch.autograd.grad(single.square().sum(), own), gradients, strict=True
        ):
            assert torch.equal(mine, whole[:, :, rows])
        start += length


@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"softcap": 1.5}])
def test_sequences_side_by_side_as_on_a_gpu(monkeypatch, options):
    one_by_one = packed(*case(), **options)
    monkeypatch.setattr(attention, "_one_by_one", attention._side_by_side)
    torch.testing.assert_close(packed(*case(), **options), one_by_one, rtol=1e-6, atol=1e-6)
