"""Tiny random models of the MoE families in transformers, seeded, on a CPU, in train mode.

Three decoder layers, 8 experts, top-2; initialised sharply, so that routing matters.
"""

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB = 97

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 2}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
}
DENSE_FIRST: dict[str, Any] = {"first_k_dense_replace": 1}
INDEXER: dict[str, Any] = {
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
}
LINEAR: dict[str, Any] = {
    "layer_types": ["full_attention", "linear_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}

# Packed rows stay apart by position_ids alone.
PACKABLE: dict[str, dict[str, Any]] = {
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2},
    "axk1": {**ROUTED, **MLA, **GROUPS, **DENSE_FIRST},
    "axk2": {**ROUTED, **MLA, **GROUPS, "index_topk": 8},
    "cohere2_moe": EXPERTS,
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 16,
            "moe_num_experts": 8,
            "moe_top_k": 2,
        },
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
    },
    "deepseek_v2": {
        **ROUTED,
        **MLA,
        **GROUPS,
        **DENSE_FIRST,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": {**ROUTED, **MLA, **GROUPS, **DENSE_FIRST},
    "dots1": {**ROUTED, **GROUPS, **DENSE_FIRST, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone_moe": EXPERTS,
    "flex_olmo": EXPERTS,
    "flint": EXPERTS,
    "gemma4_text": {
        "num_experts": 8,
        "top_k_experts": 2,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "global_head_dim": 8,
    },
    "glm4_moe": {**ROUTED, **GROUPS, **DENSE_FIRST},
    "glm4_moe_lite": {**ROUTED, **MLA},
    "granitemoe": LOCAL,
    "granitemoe_swa": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "hy_v3": EXPERTS,
    "kolibri1": EXPERTS,
    "laguna": EXPERTS,
    "longcat_flash": {
        **MLA,
        "n_routed_experts": 8,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "num_hidden_layers": 4,
        "expert_ffn_hidden_size": 16,
        "ffn_hidden_size": 32,
    },
    "mellum": EXPERTS,
    "mimo_v2_flash": ROUTED,
    "minimax_m2": LOCAL,
    "mixtral": LOCAL,
    "olmoe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS,
    "solar_open": {**ROUTED, **GROUPS},
}
# Packed rows leak into each other: by their masks, their indexer, or state carried along.
UNPACKABLE: dict[str, dict[str, Any]] = {
    "afmoe": {**EXPERTS, "num_dense_layers": 1},
    "bailing_hybrid": {**ROUTED, **GROUPS, **DENSE_FIRST, "num_experts": 8},
    "deepseek_v32": {**ROUTED, **MLA, **GROUPS, **INDEXER},
    "glm_moe_dsa": {**ROUTED, **MLA, **INDEXER},
    "gpt_oss": LOCAL,
    "granitemoehybrid": {
        **LOCAL,
        "layer_types": ["attention", "mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "shared_intermediate_size": 16,
    },
    "jamba": {
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "kimi_linear": {
        **EXPERTS,
        **MLA,
        "linear_attn_config": {
            "head_dim": 8,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
            "kda_layers": [1, 3],
            "full_attn_layers": [2],
        },
    },
    "lfm2_moe": {
        **EXPERTS,
        "num_dense_layers": 1,
        "layer_types": ["full_attention", "conv", "full_attention"],
    },
    "minimax": LOCAL,
    "nemotron_h": {
        **ROUTED,
        "num_hidden_layers": 4,
        "layer_types": ["moe", "linear_attention", "full_attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
    },
    "qwen3_5_moe_text": {**EXPERTS, **LINEAR},
    "qwen3_next": {**EXPERTS, **LINEAR},
}
REPLAYABLE = {**PACKABLE, **UNPACKABLE}
# Experts that no record or replay would be right for, by what refuses them.
UNREPLAYABLE: dict[str, dict[str, Any]] = {"deepseek_v4": ROUTED, "phimoe": LOCAL}
UNRECORDABLE: dict[str, dict[str, Any]] = {
    "doge": {**EXPERTS, "is_moe": True},
    "jetmoe": LOCAL,
    "llama4_text": LOCAL,
    "zaya": {"num_experts": 8, "num_experts_per_tok": 1},
}
FAMILIES = {**REPLAYABLE, **UNREPLAYABLE, **UNRECORDABLE}


def tiny_config(family: str, **overrides: Any) -> Any:
    """Return the family's config, with eager attention."""
    own_names = family == "dbrx"
    common = {name: COMMON[name] for name in ("vocab_size", "initializer_range", "pad_token_id")}
    values = {**(common if own_names else COMMON), **FAMILIES[family], **overrides}
    config_class: Any = CONFIG_MAPPING[family]
    return config_class(attn_implementation="eager", **values)


def tiny(family: str, seed: int = 0, **overrides: Any) -> Any:
    """Return a model of the family; dropout is off, so that train mode is deterministic."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto_model: Any = AutoModelForCausalLM
        model = auto_model.from_config(tiny_config(family, **overrides))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()
