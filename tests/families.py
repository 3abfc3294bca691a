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
}  # fmt: skip

NOT_SERVED_ON_CPUS = {
    "phimoe": "vLLM's Transformers back end cannot run it, with or without us",
    "minimax_m2": "vLLM's experts for CPUs route by softmax only",
}
"""Families that are trained and not served here, with the reason."""


def config_of(kind: str) -> Any:
    """A tiny Hugging Face config of a family."""
    name, values = FAMILIES[kind]
    return getattr(transformers, name)(**_ATTENTION | values)


def build(kind: str, folder: Path) -> Path:
    """Write a tiny random model of a family."""
    return tiny.write_random(config_of(kind), folder)
