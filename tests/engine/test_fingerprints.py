"""The fingerprint that a running engine says of its base, for families whose routers have other names."""

import gc
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM

from perft.checkpoint import checkpoint_fingerprint
from server.engine.vllm import base_shape_of
from tests.engine.engines import ENVIRONMENT, PERFT_SETTINGS, environment, settings
from tests.tiny import VOCABULARY

SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "intermediate_size": 96, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "granitemoe": ((0, 1, 2), {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        (0, 1, 2),
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 32},
    ),
    "ernie4_5_moe": (
        (1, 2),
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1, "head_dim": 32}
        | {"moe_num_shared_experts": 1},
    ),
    "glm4_moe": (
        (1, 2),
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
        | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 32},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_knows_the_fingerprint_of_its_base(family: str, tmp_path: Path) -> None:
    layers, values = FAMILIES[family]
    config = AutoConfig.for_model(family, **(SHARED | values))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with environment(**ENVIRONMENT):
        for dtype in ("float32", "bfloat16"):
            llm = LLM(**settings(tmp_path) | PERFT_SETTINGS | {"dtype": dtype})
            (status,) = llm.collective_rpc("perft_status")
            base = base_shape_of(status["base"])
            assert base.moe_layers == layers and base.num_experts == 4
            assert base.fingerprint == checkpoint_fingerprint(tmp_path) is not None, dtype
            del llm
            gc.collect()
