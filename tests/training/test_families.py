"""Every family: its MoE blocks are found, an adapter adds the reference's delta, what it cannot carry is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from perft.checkpoint import checkpoint_fingerprint
from perft.hf import attach, moe_blocks, shape_of
from perft.hf.base import on_meta
from perft.reference import BaseRouting, reference_delta
from tests import families, tiny

NO_EMBEDDED = ("llama4_text",)
VARIANTS = ("R", "E", "S")


@pytest.fixture(scope="session", params=families.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.build(request.param, tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    return tiny.load(folder)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_adds_the_reference_delta(folder: Path, model: Any, variant: str) -> None:
    if variant == "E" and folder.name in NO_EMBEDDED:
        with pytest.raises(ValueError, match="which is not served on this base"):
            attach(model, tiny.adapter_config(model, "E", "lora"))
        return
    before = logits(model)
    fresh = attach(model, tiny.adapter_config(model, variant, "parallel"))
    assert torch.equal(logits(model), before), "a fresh adapter is the base"
    adapter = tiny.randomize(fresh, seed=1)
    layers = dict(adapter.by_layer())
    for index, block in moe_blocks(model).items():
        x_BTD = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            adapter.enabled = False
            without = first_of(block.module(x_BTD))
            adapter.enabled = True
            found = (first_of(block.module(x_BTD)) - without).flatten(0, 1)
            router = adapter.base_routers[index]
            weights = router.weights() if variant == "E" else torch.zeros_like(router.logits())
            x_TD = x_BTD.flatten(0, 1)
            expected = reference_delta(
                adapter.config, layers[index].weights(), x_TD, BaseRouting(router.logits(), weights)
            )
        assert expected.norm() > 0
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    adapter.detach_from_model()
    assert torch.equal(logits(model), before)


def first_of(output: Any) -> torch.Tensor:
    found: torch.Tensor = (output[0] if isinstance(output, tuple) else output).view(2, 7, 64)
    return found


def test_the_shape_is_known_without_weights(folder: Path, model: Any) -> None:
    shape = shape_of(model)
    _, from_config = on_meta(families.config_of(folder.name))
    assert {**from_config.__dict__, "fingerprint": None} == {**shape.__dict__, "fingerprint": None}
    assert checkpoint_fingerprint(folder) == shape.fingerprint is not None


def test_the_base_routers_logits_are_those_of_its_matrix(model: Any) -> None:
    adapter = attach(model, tiny.adapter_config(model, "S", "lora"))
    try:
        for index, block in moe_blocks(model).items():
            x_TD = torch.randn(5, 64)
            with torch.no_grad():
                block.module(x_TD.unsqueeze(0))
                bias = getattr(block.router, "bias", None)
                expected = torch.nn.functional.linear(x_TD, block.router_weight, bias)
                torch.testing.assert_close(adapter.base_routers[index].logits().float(), expected, rtol=1e-4, atol=1e-4)
    finally:
        adapter.detach_from_model()
