"""Which MoE layers carry the delta, and what a layer's own scale does to it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perft.config import AdapterConfig
from perft.engine.base_router import embedded_problem
from perft.engine.layers import layer_problem
from perft.engine.pool import pack
from perft.reference import LayerWeights


def runner(**given: Any) -> Any:
    """What the checks read of a layer; a plain one but for what is given."""
    moe = {"is_sequence_parallel": False, "hidden_dim": 8, "hidden_dim_unpadded": 8, "use_deferred_moe_finalize": False}
    experts = {"apply_router_weight_on_input": False, "quant_method": object()}
    return SimpleNamespace(
        layer_name="layers.0.mlp.experts",
        moe_config=SimpleNamespace(**moe | {k: v for k, v in given.items() if k in moe}),
        routed_experts=SimpleNamespace(**experts | {k: v for k, v in given.items() if k in experts}),
        routed_input_transform=given.get("routed_input_transform"),
        routed_output_transform=given.get("routed_output_transform"),
        is_monolithic=given.get("is_monolithic", False),
    )


def test_a_plain_layer_is_carried() -> None:
    assert layer_problem(runner()) is None and embedded_problem(runner()) is None


@pytest.mark.parametrize(
    "given, said",
    [
        ({"is_sequence_parallel": True}, "a part of the step's tokens"),
        ({"hidden_dim": 16}, "pads its hidden states"),
        ({"use_deferred_moe_finalize": True}, "the sum over its experts to the layer after it"),
        ({"routed_input_transform": object()}, "latent MoE"),
        ({"routed_output_transform": object()}, "latent MoE"),
    ],
)
def test_a_layer_to_whose_output_no_delta_can_be_added_is_refused(given: dict[str, Any], said: str) -> None:
    problem = layer_problem(runner(**given))
    assert problem is not None and said in problem


@pytest.mark.parametrize(
    "given, said",
    [({"is_monolithic": True}, "--moe-backend triton"), ({"apply_router_weight_on_input": True}, "experts' inputs")],
)
def test_where_the_base_hides_its_weights_e_is_refused(given: dict[str, Any], said: str) -> None:
    problem = embedded_problem(runner(**given))
    assert problem is not None and said in problem


@pytest.mark.parametrize("variant, expected", [("E", 3.0), ("D", 1.5)])
def test_a_scale_of_the_whole_output_reaches_e_only(variant: Any, expected: float) -> None:
    """The layer multiplies its experts' output, with the delta in it, by 2: E's delta belongs to the experts."""
    config = AdapterConfig(
        base_model_name_or_path="", variant=variant, expert_type="lora", alpha=3.0, num_experts=2, bottleneck=1
    )
    weights = LayerWeights(None, torch.ones(2, 1, 4), torch.ones(2, 4, 1))
    rows_RD = pack(config, {0: weights}, output_scale=2.0).rows_RD
    assert torch.equal(rows_RD[:2], torch.ones(2, 4)) and torch.equal(rows_RD[2:], torch.full((2, 4), expected))
