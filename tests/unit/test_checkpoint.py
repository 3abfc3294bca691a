"""The fingerprint of a checkpoint, for every family that Hugging Face can build here, under whatever name its routers
have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from perft.base_model import BaseShape, base_fingerprint
from perft.checkpoint import checkpoint_fingerprint

N, D, LAYERS = 4, 32, 3
SHARED: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "intermediate_size": 24, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LOCAL: dict[str, Any] = {"num_local_experts": N, "num_experts_per_tok": 2}
COUNTED: dict[str, Any] = {"num_experts": N, "num_experts_per_tok": 2}
SMALL: dict[str, Any] = {"moe_intermediate_size": 16, "head_dim": 16}
DENSE_FIRST: dict[str, Any] = {
    "n_routed_experts": N, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT: dict[str, Any] = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR: dict[str, Any] = {
    "shared_expert_intermediate_size": 16, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
GATE, SPARSE = "model.layers.{}.mlp.gate.weight", "model.layers.{}.block_sparse_moe.gate.weight"
GRANITE = "model.layers.{}.block_sparse_moe.router.layer.weight"
FEED_FORWARD = "model.layers.{}.feed_forward.router.weight"

FAMILIES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "mixtral": (SPARSE, (0, 1, 2), LOCAL),
    "olmoe": (GATE, (0, 1, 2), COUNTED),
    "qwen3_moe": (GATE, (0, 2), COUNTED | SMALL | {"mlp_only_layers": [1]}),
    "qwen2_moe": (GATE, (0, 1, 2), COUNTED | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
    "granitemoe": (GRANITE, (0, 1, 2), LOCAL),
    "granitemoeshared": (GRANITE, (0, 1, 2), LOCAL | {"shared_intermediate_size": 16}),
    "granitemoehybrid": (
        GRANITE,
        (0, 1, 2),
        LOCAL
        | {"shared_intermediate_size": 16, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
        | {"layer_types": ["mamba", "attention", "mamba"], "mamba_n_groups": 1},
    ),
    "ernie4_5_moe": (GATE, (1, 2), {"moe_num_experts": N, "moe_k": 2, "moe_layer_start_index": 1} | SMALL),
    "glm4_moe": (GATE, (1, 2), DENSE_FIRST | {"head_dim": 16}),
    "llama4_text": (
        FEED_FORWARD,
        (0, 1, 2),
        {"num_local_experts": N, "num_experts_per_tok": 1, "intermediate_size_mlp": 32, "head_dim": 16}
        | {"interleave_moe_layer_step": 1},
    ),
    "deepseek_v2": (GATE, (1, 2), DENSE_FIRST | LATENT | {"q_lora_rank": None}),
    "deepseek_v3": (GATE, (1, 2), DENSE_FIRST | LATENT | {"q_lora_rank": 16}),
    "gpt_oss": ("model.layers.{}.mlp.router.weight", (0, 1, 2), LOCAL | {"head_dim": 16}),
    "phimoe": (SPARSE, (0, 1, 2), LOCAL),
    "dots1": (GATE, (1, 2), DENSE_FIRST),
    "flex_olmo": (GATE, (0, 1, 2), COUNTED),
    "hunyuan_v1_moe": (
        "model.layers.{}.mlp.gate.wg.weight",
        (0, 1, 2),
        {"num_experts": N, "moe_topk": 2, "head_dim": 16},
    ),
    "cohere2_moe": (GATE, (0, 1, 2), COUNTED | {"head_dim": 16}),
    "qwen3_next": (GATE, (0, 1, 2), COUNTED | SMALL | LINEAR),
    "jamba": (
        FEED_FORWARD,
        (1,),
        COUNTED
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"use_mamba_kernels": False, "mamba_d_state": 8},
    ),
    "minimax_m2": (SPARSE, (0, 1, 2), LOCAL | {"head_dim": 16}),
    "afmoe": ("model.layers.{}.mlp.router.gate.weight", (1, 2), COUNTED | SMALL | {"num_dense_layers": 1}),
    "lfm2_moe": (
        "model.layers.{}.feed_forward.gate.weight",
        (1, 2),
        COUNTED
        | {"moe_intermediate_size": 16, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "jetmoe": ("model.layers.{}.mlp.router.layer.weight", (0, 1, 2), LOCAL | {"kv_channels": 16}),
}
"""The routers' names on disk, the layers that have one, and what the family's configuration needs."""


def built(family: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write a tiny random model; returns its tensors as they are on disk."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SHARED | FAMILIES[family][2]))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def shape(layers: tuple[int, ...], experts: int = N) -> BaseShape:
    return BaseShape(D, LAYERS, layers, experts, 2, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_fingerprint(family: str, tmp_path: Path) -> None:
    tensors = built(family, tmp_path)
    name, layers, _ = FAMILIES[family]
    expected = base_fingerprint(tensors[name.format(layer)] for layer in layers)
    assert checkpoint_fingerprint(tmp_path, shape(layers)) == expected == checkpoint_fingerprint(tmp_path)
    tensors[name.format(layers[-1])][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert checkpoint_fingerprint(tmp_path, shape(layers)) != expected


def routers(name: str = GATE, layers: tuple[int, ...] = (0, 1, 2), seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name.format(layer): torch.randn(N, D, generator=generator) for layer in layers}


def expected_of(tensors: dict[str, torch.Tensor]) -> str:
    return base_fingerprint(tensors[name] for name in sorted(tensors))


def test_layers_that_predict_further_tokens_do_not_count(tmp_path: Path) -> None:
    """A checkpoint may have them; neither vLLM nor Hugging Face loads them into the model."""
    own = routers()
    more = routers(layers=(3,), seed=1) | routers("mtp.layers.{}.mlp.gate.weight", (0,), seed=2)
    save_file(own | more, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "num_experts": N, "hidden_size": D}))
    assert checkpoint_fingerprint(tmp_path, shape((0, 1, 2))) == expected_of(own) == checkpoint_fingerprint(tmp_path)


def test_the_text_model_of_a_larger_one(tmp_path: Path) -> None:
    own = routers("model.language_model.layers.{}.mlp.gate.weight")
    save_file(own | routers("model.visual.layers.{}.attn.gate.weight"), tmp_path / "model.safetensors")
    values = {"text_config": {"num_hidden_layers": 3, "num_experts": N, "hidden_size": D}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert checkpoint_fingerprint(tmp_path, shape((0, 1, 2))) == expected_of(own) == checkpoint_fingerprint(tmp_path)


def test_a_router_of_an_unknown_name_is_found_by_its_shape(tmp_path: Path) -> None:
    own = routers("model.layers.{}.moe.choice.weight")
    save_file(own | {"model.layers.0.moe.other.weight": torch.zeros(N, D)}, tmp_path / "model.safetensors")
    assert checkpoint_fingerprint(tmp_path, shape((0, 1, 2))) == expected_of(own)
    assert checkpoint_fingerprint(tmp_path) is None, "without the shape it would be a guess"


def test_two_candidates_count_if_they_are_equal(tmp_path: Path) -> None:
    """A folder may hold the weights twice, in two layouts."""
    own, again = routers(), routers("layers.{}.feed_forward.gate.weight")
    save_file(own, tmp_path / "model.safetensors")
    save_file(again, tmp_path / "consolidated.safetensors")
    assert checkpoint_fingerprint(tmp_path, shape((0, 1, 2))) == expected_of(own)
    again["layers.1.feed_forward.gate.weight"] += 1
    save_file(again, tmp_path / "consolidated.safetensors")
    assert checkpoint_fingerprint(tmp_path, shape((0, 1, 2))) is None
    index = {"weight_map": dict.fromkeys(own, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_fingerprint(tmp_path, shape((0, 1, 2))) == expected_of(own), (
        "the index says which are the model's"
    )


@pytest.mark.parametrize("layers", [(0, 1), (0, 1, 2)])
def test_no_router_and_no_fingerprint(tmp_path: Path, layers: tuple[int, ...]) -> None:
    assert checkpoint_fingerprint(tmp_path) is None, "an empty folder"
    save_file(routers(layers=(0, 2)) | {"lm_head.weight": torch.zeros(N, D)}, tmp_path / "model.safetensors")
    assert checkpoint_fingerprint(tmp_path, shape(layers)) is None, "a layer lacks its router"
    assert checkpoint_fingerprint(tmp_path, shape((0, 2), experts=8)) is None, "another number of experts"
