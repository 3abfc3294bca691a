"""A tiny model of every MoE family that adapters are trained and served on, beside tests/tiny.py's three."""

from pathlib import Path
from typing import Any

import transformers

from tests import tiny

_ATTENTION: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
_LOCAL: dict[str, Any] = {"intermediate_size": 96, "num_local_experts": 6, "num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2MoeConfig", {
        "intermediate_size": 96, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 48, "num_experts": 6,
        "num_experts_per_tok": 2, "norm_topk_prob": False,
    }),
    "granitemoe": ("GraniteMoeConfig", {**_LOCAL, "attention_multiplier": 0.2, "residual_multiplier": 0.8}),
    "granitemoeshared": ("GraniteMoeSharedConfig", {
        **_LOCAL, "shared_intermediate_size": 48, "attention_multiplier": 0.2,
    }),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", {
        "intermediate_size": 96, "moe_intermediate_size": 64, "moe_num_experts": 6, "moe_k": 2,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 2,
    }),
    "glm4_moe": ("Glm4MoeConfig", {
        "intermediate_size": 96, "moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5,
        "head_dim": 32, "num_mtp_layers": 0,
    }),
    "llama4_text": ("Llama4TextConfig", {
        "intermediate_size": 96, "intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1,
        "head_dim": 32, "attention_chunk_size": 512,
    }),
    "gpt_oss": ("GptOssConfig", {**_LOCAL, "head_dim": 64, "sliding_window": 64}),
    "phimoe": ("PhimoeConfig", {**_LOCAL, "router_jitter_noise": 0.0}),
    "dots1": ("Dots1Config", {
        "intermediate_size": 96, "moe_intermediate_size": 64, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
        "head_dim": 32,
    }),
    "flex_olmo": ("FlexOlmoConfig", {"intermediate_size": 96, "num_experts": 6, "num_experts_per_tok": 2}),
    "minimax_m2": ("MiniMaxM2Config", {**_LOCAL, "head_dim": 32, "rotary_dim": 32, "scoring_func": "sigmoid",
        "use_routing_bias": True}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {
        "intermediate_size": 96, "num_experts": 6, "moe_topk": 2, "head_dim": 32,
    }),
    "granitemoehybrid": ("GraniteMoeHybridConfig", {
        **_LOCAL, "shared_intermediate_size": 48, "attention_multiplier": 0.2, "mamba_n_heads": 4, "mamba_d_head": 32,
        "mamba_d_state": 16, "mamba_n_groups": 1, "layer_types": ["mamba", "attention", "mamba"],
    }),
    "deepseek_v2": ("DeepseekV2Config", {
        "intermediate_size": 96, "moe_intermediate_size": 64, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 2, "head_dim": 64,
    }),
    "deepseek_v3": ("DeepseekV3Config", {
        "intermediate_size": 96, "moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": 32, "n_group": 2,
        "topk_method": "noaux_tc",
        "topk_group": 1, "routed_scaling_factor": 1.5,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 2, "head_dim": 64,
    }),
    "lfm2_moe": ("Lfm2MoeConfig", {
        "intermediate_size": 96, "moe_intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2,
        "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"], "use_expert_bias": False,
        "tie_word_embeddings": True,
    }),
    "afmoe": ("AfmoeConfig", {
        "intermediate_size": 96, "moe_intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2,
        "num_dense_layers": 1, "num_shared_experts": 1, "head_dim": 32, "layer_types": ["full_attention"] * 3,
        "score_func": "sigmoid", "route_norm": True, "route_scale": 1.5, "n_group": 1, "topk_group": 1,
    }),
    "cohere2_moe": ("Cohere2MoeConfig", {
        "intermediate_size": 96, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 32,
        "layer_types": ["full_attention"] * 3, "mlp_layer_types": ["sparse"] * 3,
    }),
    "solar_open": ("SolarOpenConfig", {
        "intermediate_size": 96, "moe_intermediate_size": 64, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 32, "n_group": 1, "topk_group": 1,
    }),
    "qwen3_next": ("Qwen3NextConfig", {
        "intermediate_size": 96, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 48, "num_experts": 6,
        "num_experts_per_tok": 2, "head_dim": 32, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }),
}  # fmt: skip

NOT_SERVED_ON_CPUS = {
    "phimoe": "vLLM's Transformers back end cannot run it, with or without us",
    "deepseek_v2": "vLLM's own answers differ from transformers' on a tiny base, with or without us",
    "deepseek_v3": "vLLM's own answers differ from transformers' on a tiny base, with or without us",
    "lfm2_moe": "vLLM's own answers differ from transformers' on a tiny base, with or without us",
    "cohere2_moe": "vLLM has no LoRA support for it, on which adapters ride",
    "minimax_m2": "vLLM's experts for CPUs route by softmax only",
}
"""Families that are trained and not served here, with the reason."""

IN_BFLOAT16 = ("qwen3_next",)
"""Families that vLLM's kernels for CPUs serve in bfloat16 only."""


def config_of(kind: str) -> Any:
    """A tiny Hugging Face config of a family."""
    name, values = FAMILIES[kind]
    return getattr(transformers, name)(**_ATTENTION | values)


def build(kind: str, folder: Path) -> Path:
    """Write a tiny random model of a family."""
    return tiny.write_random(config_of(kind), folder)
