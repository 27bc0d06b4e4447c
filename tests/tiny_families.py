"""Tiny random models of the installed transformers' families of decoder-only language models, by `model_type`."""

from typing import Any

import torch

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = _MLA | {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_d_head": 8, "mamba_n_heads": 8}
#: Windows shorter than the documents that are packed, so that they matter.
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

#: What a family's configuration has in addition to `BASE`; windows are shorter than what the tests pack.
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": _MAMBA | {"mamba_n_groups": 1, "attn_layer_indices": [1], "mamba_chunk_size": 8},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **_SLIDING},
    "deepseek_v2": _DEEPSEEK | {"topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK | {"num_nextn_predict_layers": 0},
    "ernie4_5": {},
    "exaone4": _SLIDING,
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    "falcon_h1": _MAMBA | {"mamba_n_groups": 1, "mamba_d_ssm": 64, "mamba_chunk_size": 8},
    "falcon_mamba": {"state_size": 8},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, **_SLIDING},
    "gemma3_text": _SLIDING | {"query_pre_attn_scalar": 8},
    "gemma3n_text": _SLIDING
    | {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gemma4_text": _SLIDING
    | {
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
        "num_kv_shared_layers": 0,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": _EXPERTS
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "gpt_neox": {},
    "gpt_oss": _EXPERTS | _SLIDING,
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "granitemoe": _EXPERTS | {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": _MAMBA
    | _EXPERTS
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"mamba_dt_rank": 4, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16, "conv_L_cache": 3},
    "llama": {},
    "llama4_text": _EXPERTS
    | {"intermediate_size_mlp": 48, "attention_chunk_size": 8, "interleave_moe_layer_step": 2, "moe_layers": [1]}
    | {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "ministral": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "mixtral": _EXPERTS,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "nemotron": {},
    "nemotron_h": _MAMBA
    | _EXPERTS
    | {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8}
    | {"n_groups": 1, "chunk_size": 8},
    "olmo": {},
    "olmo2": {},
    "olmo3": _SLIDING,
    "olmoe": _EXPERTS,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "persimmon": {},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "phimoe": _EXPERTS,
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3": {},
    "qwen3_5_text": _LINEAR,
    "qwen3_moe": _EXPERTS,
    "qwen3_next": _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 24},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": {"sliding_window": 4},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
    "zamba2": _MAMBA
    | {"mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8, "layer_types": None, "chunk_size": 8}
    | {
        "layers_block_type": ["hybrid", "hybrid"],
        "num_mem_blocks": 1,
        "adapter_rank": 4,
        "use_mem_rope": True,
        "use_mamba_kernels": False,
        "num_key_value_heads": 4,
    }
    | {"attention_head_dim": 16, "attention_hidden_size": 64, "kv_channels": 8},
}


class UnknownFamilyError(LookupError):
    """The installed transformers does not have the family."""


def config_of(family: str, **changes: Any) -> Any:
    """A two-layer configuration of a family, for a vocabulary of 320 tokens."""
    from transformers import AutoConfig

    options = {key: value for key, value in (BASE | FAMILIES[family] | changes).items() if value is not None}
    try:
        config = AutoConfig.for_model(family, **options)
    except ValueError as error:
        if "nrecognized model" in str(error):
            raise UnknownFamilyError(f"the installed transformers has no {family}") from error
        raise
    for name, value in vars(config).items():
        if isinstance(value, float) and name.endswith(("dropout", "pdrop", "noise")):
            setattr(config, name, 0.0)
    return config


def model_of(family: str, dtype: torch.dtype = torch.float32, attention: str | None = None, **changes: Any) -> Any:
    """Such a model with random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, **changes), dtype=dtype, attn_implementation=attention)
