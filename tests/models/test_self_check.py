"""Every family passes the check at load, or is refused by it, and what passes is right."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from RL2.models.build import load_model
from RL2.models.headed_model import HeadedModel
from RL2.models.heads import TokenStatsHead
from RL2.models.self_check import self_check
from RL2.ops.attention import register_attention
from RL2.runtime.errors import ConfigError
from tests.models.families import FAMILIES, awake, tiny_config
from tests.workers.test_actor import actor_config

LENGTHS = (90, 1, 70)  # the window of the tiny configs is 64


def build(family, attention="sdpa_varlen", **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config(family, **changes), attn_implementation=register_attention(attention)
    )
    return HeadedModel(model, TokenStatsHead(model, {}))


def check(model, attention="sdpa_varlen"):
    self_check(model, attention, torch.device("cpu"), True)


def rows_of(model):
    n = torch.arange(sum(LENGTHS))
    size = model.model.config.get_text_config().vocab_size
    return (3 + (n * n + 5 * n) % (size - 3)).split(LENGTHS)


def packed(model):
    """Log-probabilities of all next tokens, as training computes them, and their gradient."""
    rows, lengths = rows_of(model), torch.tensor(LENGTHS)
    positions = torch.cat(
        [torch.arange(len(r) - 1) + start for r, start in zip(rows, (0, 90, 91), strict=True)]
    )
    actions = torch.cat([row[1:] for row in rows])
    stats = model(torch.cat(rows), lengths, positions, actions, 1.0, ("logps",))
    return stats["logps"], gradient(model, stats["logps"])


def alone(model, folder):
    """The same by transformers: loaded from the files, one row at a time."""
    model.model.save_pretrained(folder)
    own = type(model.model).from_pretrained(folder, attn_implementation="eager").eval()
    logps = [
        own(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        .gather(1, row[1:, None])[:, 0]
        for row in rows_of(model)
    ]  # fmt: skip
    return torch.cat(logps), gradient(own, torch.cat(logps))


def gradient(model, logps):
    model.zero_grad()
    logps.sum().backward()
    plain = getattr(model, "model", model) if isinstance(model, HeadedModel) else model
    return {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def expect_what_transformers_computes(model, folder):
    awake(model.model)
    model.eval()
    (logps, gradients), (own_logps, own_gradients) = packed(model), alone(model, folder)
    torch.testing.assert_close(logps, own_logps, rtol=0, atol=1e-4)
    assert gradients.keys() == own_gradients.keys()
    for name, own in own_gradients.items():
        # that of a key's bias is nothing but rounding
        assert (gradients[name] - own).norm() < 1e-3 * own.norm() + 1e-5, name


LINEAR = [
    "qwen3", "gpt2", "qwen2_moe", "phimoe", "gpt_oss", "deepseek_v3", "gemma3_text", "gemma4_text",
    "jetmoe", "opt", "seed_oss",
]  # fmt: skip
WHOLE = ["gemma2", "modernbert-decoder", "bert", "cohere", "gemma3n_text", "nanochat"]


@pytest.mark.parametrize("family", LINEAR + WHOLE)
def test_what_passes_is_what_transformers_computes(tmp_path, family):
    model = build(family)
    check(model)
    assert model.head.linear == (family in LINEAR)
    expect_what_transformers_computes(model, tmp_path)


MIXES = ["gpt_oss", "xglm", "falcon", "mpt", "biogpt"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*MIXES, "nemotron", "qwen2_moe"])
def test_attentions_of_transformers_are_checked_as_ours_is(tmp_path, family, attention):
    """They take the mask of a pack from its positions in some families, and see all in others."""
    try:
        model = build(family, attention)
    except ValueError:  # transformers' own answer
        assert attention == "sdpa" and family in ("gpt_oss", "mpt", "xglm")
        return
    if family in MIXES:
        with pytest.raises(ConfigError, match=f"={attention}: {family} does not compute"):
            check(model, attention)
        return
    check(model, attention)
    expect_what_transformers_computes(model, tmp_path)


REFUSED = {
    "bloom": "log-probabilities differ by",
    "mamba": "log-probabilities differ by",
    "roberta": "log-probabilities differ by",
    "mpt": "AttributeError",
    "doge": "sdpa_varlen does not support attention_mask",
    "stablelm": "needs cu_seq_lens_q",
}


@pytest.mark.parametrize("family", REFUSED)
def test_who_would_mix_the_sequences_is_refused_in_one_line(family):
    with pytest.raises(ConfigError) as caught:
        check(build(family))
    message = str(caught.value)
    assert message.startswith(f"actor.attn_implementation=sdpa_varlen: {family} does not compute")
    assert REFUSED[family] in message and "; use " in message and "\n" not in message


@pytest.mark.long
@pytest.mark.skipif(os.environ.get("RL2_FAULTS") != "long", reason="RL2_FAULTS=long runs it")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_and_is_right_or_is_refused(tmp_path, family):
    try:
        model = build(family)
    except Exception as error:  # no small config, or no way to build it with this attention
        pytest.skip(f"{type(error).__name__}: {error}"[:200])
    try:
        check(model)
    except ConfigError as error:
        assert "; use " in str(error) and "\n" not in str(error)
        return
    expect_what_transformers_computes(model, tmp_path)


@pytest.mark.parametrize("family", ["falcon", "gptj"])
def test_who_cannot_be_built_with_an_attention_is_named(tmp_path, family):
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path)
    expected = f"^actor.attn_implementation=sdpa_varlen: {family} cannot be built .*; try "
    with pytest.raises(ConfigError, match=expected):
        load_model(actor_config(str(tmp_path)), train=True)


def test_the_check_leaves_no_trace():
    model = build("qwen2_moe")
    model.train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, random = model.model.config.to_dict(), torch.get_rng_state()
    attention = model.model.config._attn_implementation
    check(model)
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert model.model.config.to_dict() == config and torch.equal(torch.get_rng_state(), random)
    assert model.model.config._attn_implementation == attention
    assert all(module.training for module in model.modules())


def test_a_head_of_zeros_hides_nothing():
    """As before training: what stands before and behind it shows nevertheless."""
    model = build("bloom")
    torch.nn.init.zeros_(model.model.get_output_embeddings().weight)
    with pytest.raises(ConfigError, match="bloom does not compute"):
        check(model)
