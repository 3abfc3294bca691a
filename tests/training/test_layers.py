"""The trainable layer against the reference, its gradients against autograd, the auxiliary loss against its formula."""

from typing import Any

import pytest
import torch
from torch import nn

from perft.config import AdapterConfig
from perft.hf.layer import PerftLayer
from perft.reference import BaseRouting, reference_delta
from perft.routing import weights_by_expert
from perft.training.load_balance import load_balancing_loss

D, N, J = 32, 6, 2


class GivenRouter:
    """A base router that says what it was given."""

    def __init__(self, logits_TN: torch.Tensor) -> None:
        self.logits_TN = logits_TN
        self.top_TJ = torch.softmax(logits_TN, -1).topk(J, dim=-1)

    def logits(self) -> torch.Tensor:
        return self.logits_TN

    def top(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.top_TJ.values, self.top_TJ.indices

    def weights(self) -> torch.Tensor:
        return weights_by_expert(*self.top(), N)


CASES: list[dict[str, Any]] = [
    {"variant": "R", "num_experts": 4, "top_k": 2, "renormalize": True},
    {"variant": "R", "num_experts": 9, "top_k": 1, "renormalize": False},
    {"variant": "R", "num_experts": 4, "top_k": 2, "renormalize": False, "gate_weight": "base_slot"},
    {"variant": "E", "num_experts": N},
    {"variant": "D", "num_experts": 3},
    {"variant": "S", "num_experts": 1},
]


def layer_of(case: dict[str, Any], expert_type: str, bottleneck: int, dropout: float = 0.0) -> PerftLayer:
    values = case | {"base_model_name_or_path": "x", "expert_type": expert_type, "bottleneck": bottleneck}
    values |= {"alpha": 3.0} if expert_type == "lora" else {}
    layer = PerftLayer(AdapterConfig.model_validate(values), D, dropout)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("tokens", [1, 2, 17, 64])
@pytest.mark.parametrize("bottleneck", [1, 4, 5, 16])
@pytest.mark.parametrize("expert_type", ["lora", "parallel"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_reference(case: dict[str, Any], expert_type: str, bottleneck: int, tokens: int) -> None:
    torch.manual_seed(0)
    layer, x_TD, base = (
        layer_of(case, expert_type, bottleneck),
        torch.randn(tokens, D),
        GivenRouter(torch.randn(tokens, N)),
    )
    with torch.no_grad():
        found = layer(x_TD, base)
    expected = reference_delta(layer.config, layer.weights(), x_TD, BaseRouting(base.logits_TN, base.weights()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bottleneck", [4, 5])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_gradients_are_those_of_every_expert_computed(case: dict[str, Any], bottleneck: int) -> None:
    """Against autograd of the plain sum over all experts, unselected ones with weight 0."""
    torch.manual_seed(0)
    layer, x_TD, base = layer_of(case, "parallel", bottleneck), torch.randn(33, D), GivenRouter(torch.randn(33, N))
    x_TD.requires_grad_(True)
    layer(x_TD, base).square().sum().backward()
    found = [x_TD.grad, *(parameter.grad for parameter in layer.parameters())]
    x_TD.grad = None
    layer.zero_grad()
    every_expert(layer, x_TD, base).square().sum().backward()
    for mine, expected in zip(found, [x_TD.grad, *(p.grad for p in layer.parameters())], strict=True):
        if expected is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def every_expert(layer: PerftLayer, x_TD: torch.Tensor, base: GivenRouter) -> torch.Tensor:
    config = layer.config
    if config.variant == "E":
        w_TM = base.weights()
    elif layer.router is None:
        w_TM = torch.ones(len(x_TD), config.num_experts)
    else:
        q_TM = torch.softmax(x_TD @ layer.router.T, -1)
        values, chosen = q_TM.topk(config.top_k or 1, dim=-1)
        if config.gate_weight == "base_slot":
            values = torch.softmax(base.logits_TN, -1).topk(config.top_k or 1, dim=-1).values
        elif config.renormalize:
            values = values / values.sum(-1, keepdim=True)
        w_TM = torch.zeros_like(q_TM).scatter(1, chosen, values)
    a_TMB = torch.nn.functional.silu(torch.einsum("td,mbd->tmb", x_TD, layer.down_proj))
    return config.scale * torch.einsum("tm,tmb,mdb->td", w_TM, a_TMB, layer.up_proj)


def test_each_use_of_an_expert_drops_for_itself() -> None:
    """Two experts with the same weights give different outputs in training, and the same ones otherwise."""
    layer = layer_of({"variant": "D", "num_experts": 2}, "lora", 4, dropout=0.5)
    with torch.no_grad():
        layer.down_proj[1], layer.up_proj[1] = layer.down_proj[0], -layer.up_proj[0]
        x_TD, base = torch.randn(5, D), GivenRouter(torch.randn(5, N))
        assert layer.eval()(x_TD, base).abs().max() < 1e-5
        assert layer.train()(x_TD, base).abs().max() > 1e-2


def test_the_load_balancing_loss_is_its_formula() -> None:
    torch.manual_seed(0)
    logits, mask_T = [torch.randn(10, 4) for _ in range(3)], torch.tensor([1] * 7 + [0] * 3)
    counted = torch.zeros(4)
    mean = torch.zeros(4)
    for layer in logits:
        for t in range(7):
            p = torch.softmax(layer[t], -1)
            mean += p / 21
            counted[p.topk(2).indices] += 1 / 21
    torch.testing.assert_close(load_balancing_loss(logits, 2, mask_T), 4 * (counted * mean).sum())


def test_the_load_balancing_loss_is_least_when_experts_are_used_alike() -> None:
    even = torch.eye(4).repeat(4, 1) * 20
    uneven = even.clone()
    uneven[:, 0] += 40
    mask_T = torch.ones(16)
    assert float(load_balancing_loss([even], 1, mask_T)) == pytest.approx(1.0, abs=1e-3)
    assert float(load_balancing_loss([uneven], 1, mask_T)) == pytest.approx(4.0, abs=1e-3)
