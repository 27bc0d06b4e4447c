"""Tiny mixtures of experts of many families that ask for a router loss, and what transformers makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer

from dft_lightning import FineTuner, NuminaMathDataModule
from dft_lightning.weighting import Uniform

#: Large, so that a gradient without the router loss is off by more than any bound here.
COEFFICIENT = 0.1
_BASE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
    "output_router_logits": True,
    "router_aux_loss_coef": COEFFICIENT,
    "num_experts_per_tok": 2,
}
_SHARED = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_GROUPED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
#: By model type, with a router loss in transformers.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4} | _SHARED,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 16},
    "phimoe": {"num_local_experts": 4},
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
    "jamba": {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "flex_olmo": {"num_experts": 4},
    "minimax_m2": {"num_local_experts": 4, "head_dim": 8, "rotary_dim": 4},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 16,
            "moe_num_experts": 4,
            "moe_top_k": 3,
            "moe_loss_weight": COEFFICIENT,
        },
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "router_aux_loss_coef": None,
    },
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8, "router_aux_loss_coef": None, "aux_loss_coef": COEFFICIENT},
}
#: By model type, with routers of which transformers computes no loss, or another.
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"moe_intermediate_size": 16, "num_key_value_heads": 4} | _GROUPED | _LATENT,
    "deepseek_v3": {"moe_intermediate_size": 16, "num_key_value_heads": 4, "num_nextn_predict_layers": 0}
    | _GROUPED
    | _LATENT,
    "glm4_moe": {"moe_intermediate_size": 16, "head_dim": 8, "num_nextn_predict_layers": 0} | _GROUPED,
    "doge": {"is_moe": True, "num_experts": 16},
}


def routed_config(family: str, **changes: Any) -> Any:
    """A two-layer configuration; a test of a family that this version of transformers lacks is skipped."""
    from transformers import AutoConfig

    options = _BASE | (FAMILIES | OTHERS)[family] | changes
    try:
        return AutoConfig.for_model(family, **{key: value for key, value in options.items() if value is not None})
    except ValueError as missing:
        pytest.skip(f"this version of transformers has no {family}: {missing}")


def routed_model(folder: Path, family: str, **changes: Any) -> Path:
    """Such a model with random weights, and the tiny tokenizer, as a folder."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(routed_config(family, **changes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def first_batch(model: Path, rows: Path):
    """The first step as one micro-batch, as `harness.fit` has it."""
    data = NuminaMathDataModule(str(rows), global_batch_size=8, micro_batch_size=8, max_length=200)
    data.tokenizer = FineTuner(str(model), Uniform()).tokenizer
    data.prepare_data()
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def given_to_transformers(batch) -> dict[str, torch.Tensor]:
    """Ids, labels and attention mask of a batch, as a trainer of transformers makes them."""
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.supervised + 1] = batch.target
    mask = torch.arange(batch.input_ids.shape[1]) < torch.tensor([[length] for length in batch.lengths])
    return {"input_ids": batch.input_ids, "labels": labels, "attention_mask": mask.long()}


def by_transformers(model: Any, batch, **changes: Any) -> tuple[Any, torch.Tensor]:
    """Its output for a batch, and the gradient of its own loss; random numbers are those of a run's first step."""
    import numpy as np

    torch.manual_seed(int(np.random.SeedSequence([0, 0, 0, 0]).generate_state(1)[0]))
    output = model(**given_to_transformers(batch), use_cache=False, **changes)
    output.loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return output, torch.cat([parameter.grad.flatten().double() for parameter in trained])
