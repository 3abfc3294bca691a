"""docs/format.md as numbers: the vectors that every reader of the format shares (tests/vectors)."""

import json
from pathlib import Path

import pytest
import torch

from perft.config import AdapterConfig
from perft.reference import BaseRouting, LayerWeights, reference_delta

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = json.loads((VECTORS / "delta.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['config']['variant']}-{c['config']['expert_type']}")
def test_reference_gives_the_vectors(case: dict) -> None:
    config = AdapterConfig.model_validate_json(json.dumps(case["config"]))
    layer = config.layers[0] if config.layers else 0
    tensors = {name: torch.tensor(value) for name, value in case["tensors"].items()}
    x_TD, router_ND = torch.tensor(case["x"]), torch.tensor(case["base"]["router"])
    logits_TN = x_TD @ router_ND.T
    top, chosen = torch.softmax(logits_TN, -1).topk(case["base"]["top_k"], -1)
    if case["base"]["renormalize"]:
        top = top / top.sum(-1, keepdim=True)
    base = BaseRouting(logits_TN, torch.zeros_like(logits_TN).scatter(1, chosen, top))
    weights = LayerWeights(
        tensors.get(f"layers.{layer}.router"), tensors[f"layers.{layer}.down_proj"], tensors[f"layers.{layer}.up_proj"]
    )
    delta_TD = reference_delta(config, weights, x_TD, base)
    torch.testing.assert_close(delta_TD, torch.tensor(case["expected_delta"]), rtol=1e-5, atol=1e-6)
