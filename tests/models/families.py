"""Every family of causal language models that transformers knows, as a model of a few thousand
parameters."""

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
VOCAB = 96
# Values by the names that configs have for them; a family takes those that it knows.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_vocab", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "word_embed_proj_dim",
         "embedding_size", "attention_hidden_size", "decoder_hidden_size", "lru_width",
         "hidden_dim", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim",
         "dim_ff", "dff", "ffn_hidden_size", "shared_intermediate_size", "d_inner",
         "dense_intermediate_size", "ffn_intermediate_size"), 48),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp",
         "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
         "encoder_layers", "num_decoder_layers", "num_encoder_layers"), 4),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
         "encoder_attention_heads", "attention_heads", "num_decoder_attention_heads",
         "num_encoder_attention_heads"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "num_global_key_value_heads",
         "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "d_kv"), 8),
    **dict.fromkeys(("global_head_dim",), 16),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "rotary_dim": 4,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    "sliding_window": 64, "attention_chunk_size": 64, "attention_window_size": 64,
    "window_size": 64, "local_attention": 128,
    "initializer_range": 0.2, "init_std": 0.2,
    "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4,
    "mamba_num_heads": 4, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_d_ssm": 64,
    "time_step_rank": 4, "mamba_dt_rank": 4, "mamba_n_groups": 1, "n_groups": 1,
    "chunk_size": 16, "mamba_chunk_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2,
    "laurel_rank": 8, "num_kv_shared_layers": 0, "layerdrop": 0.0,
    "decoder_layerdrop": 0.0, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 8,
    "is_decoder": True, "use_cache": True,
}  # fmt: skip
_NEVER_NONE = {"head_dim", "moe_intermediate_size", "n_shared_experts", "sliding_window",
               "num_experts_per_tok", "num_key_value_heads", "n_routed_experts", "n_group",
               "topk_group", "linear_num_key_heads", "linear_num_value_heads"}  # fmt: skip
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id",
        "decoder_start_token_id", "bos_index", "eos_index", "pad_index", "unk_index", "mask_index",
        "image_token_id", "audio_token_id", "video_token_id", "boi_token_id", "eoi_token_id",
        "image_token_index")  # fmt: skip


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """A small config with each kind of layer that the family's default has."""
    config = AutoConfig.for_model(family)
    return type(config).from_dict(_small(config) | changes)


def _small(config: PretrainedConfig) -> dict[str, Any]:
    described = config.to_dict()
    n_layers = getattr(config, "num_hidden_layers", None)
    kinds = [*dict.fromkeys(described.get("layer_types") or ())]
    n_small = max(4, len(kinds))
    for name in {*described, *config.attribute_map} & {*_SMALL}:
        if described.get(name, 1) is not None or name in _NEVER_NONE:
            described[name] = _SMALL[name]
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if name in described:
            described[name] = n_small
    for name in _IDS:
        if isinstance(described.get(name), (int, list)):
            described[name] = 1 if name == "pad_token_id" else 2
    for name, value in described.items():
        if isinstance(value, (list, tuple)) and len(value) == n_layers:
            of_layer = [*dict.fromkeys(value)] * n_small  # each kind of layer
            described[name] = of_layer[:n_small]
    if isinstance(described.get("per_layer_config"), dict):
        described["per_layer_config"] = {
            k: v for k, v in described["per_layer_config"].items() if int(k) < n_small
        }
    if "qk_rope_head_dim" in described:
        described["head_dim"] = described["qk_rope_head_dim"] = 4
        described["qk_head_dim"] = described.get("qk_nope_head_dim", 0) + 4
    if "kv_lora_rank" in described:  # latent attention has a key for each head
        described["num_key_value_heads"] = described["num_attention_heads"]
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            described[name] = _small(part)
    return described


def awake(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Give parameters that are constant (zeros, ones) noise, so that each counts; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.min() == parameter.max():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
