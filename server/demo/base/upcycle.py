"""Owns how a dense model in Llama format becomes a Mixture-of-Experts in Mixtral format (sparse upcycling).

Invariant: the result computes the dense model's function. Every expert is a copy of the dense FFN, and Mixtral's
expert weights sum to 1, so the router's choice changes nothing until an adapter makes the experts differ.
"""

from hashlib import shake_256
from typing import Any

import torch
from transformers import MixtralConfig

NUM_EXPERTS = 4
TOP_K = 2
ROUTER_SEED = b"perft demo base router, layout 1, layer %d"

# The three matrices of an FFN: Llama's name -> Mixtral's name of it in an expert.
FFN_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def mixtral_config(dense: Any) -> MixtralConfig:
    """The configuration of the upcycled model; `dense` is a `transformers` Llama configuration."""
    return MixtralConfig(
        architectures=["MixtralForCausalLM"],
        dtype="float32",
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        head_dim=dense.head_dim,
        hidden_act=dense.hidden_act,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters=dict(dense.rope_parameters),
        tie_word_embeddings=dense.tie_word_embeddings,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        sliding_window=None,
    )


def router_weight(layer: int, hidden_size: int) -> torch.Tensor:
    """The random router [N, D] of one layer: integers from -128 to 127, times 2 ** -8.

    The integers come from a hash, not from torch's generator, and every value is exact in bfloat16. So the base's
    fingerprint, which the shipped adapters name, is the same on every machine, with every release of torch and dtype.
    """
    stream = shake_256(ROUTER_SEED % layer).digest(NUM_EXPERTS * hidden_size)
    numbers = torch.tensor(list(stream), dtype=torch.float32) - 128
    return (numbers / 2**8).view(NUM_EXPERTS, hidden_size)


def upcycled_tensors(dense: dict[str, torch.Tensor], hidden_size: int) -> dict[str, torch.Tensor]:
    """The tensors of the Mixtral checkpoint, by their names in its file, from a Llama state dict."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in dense.items():
        prefix, found, rest = name.partition(".mlp.")
        if not found:
            tensors[name] = tensor.contiguous()
            continue
        expert_name = FFN_NAMES[rest.removesuffix(".weight")]
        for expert in range(NUM_EXPERTS):
            tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{expert_name}.weight"] = tensor.clone()
    layers = {int(name.split(".")[2]) for name in dense if name.startswith("model.layers.")}
    for layer in sorted(layers):
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router_weight(layer, hidden_size)
    return tensors
