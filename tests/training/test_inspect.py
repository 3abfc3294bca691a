"""`perft inspect`: figures by the paper's formulas, routing that is what the reference says, plots that are drawn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from perft.hf import attach, load, save
from perft.inspection.plots import projected
from perft.inspection.routing import mutual_information, routing_on
from perft.reference import expert_weights
from server.commands.inspect import run
from tests import tiny
from tests.training import tiny_base

VARIANTS: dict[str, dict[str, Any]] = {
    "R": {"num_experts": 4, "top_k": 2}, "E": {}, "D": {"num_experts": 3}, "S": {},
}  # fmt: skip


@pytest.fixture(scope="session", params=VARIANTS)
def adapter(request: pytest.FixtureRequest, olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.load(olmoe)
    config = tiny.adapter_config(
        model, request.param, "lora", base_model_name_or_path=str(olmoe), **VARIANTS[request.param]
    )
    folder: Path = tmp_path_factory.mktemp("adapters") / request.param
    save(tiny.randomize(attach(model, config), seed=3), folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("What is 2+2?\n\nTell me about the sea.\n")
    return file


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert run([str(each) for each in arguments]) == 0
    return capsys.readouterr().out


def test_figures_by_hand(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 layers, D 64, B 5; the base has 8 experts of which a token uses 3."""
    found = json.loads(shown(capsys, adapter, "--json"))["figures"]
    layers, d, b = 4, 64, 5
    expected = {
        "R": (layers * (4 * d + 2 * 4 * d * b), layers * (4 * d + 2 * 2 * d * b)),
        "E": (layers * 2 * 8 * d * b, layers * 2 * 3 * d * b),
        "D": (layers * 2 * 3 * d * b, layers * 2 * 3 * d * b),
        "S": (layers * 2 * d * b, layers * 2 * d * b),
    }[adapter.name]
    assert (found["parameters"], found["activated"]) == expected
    stored = sum(tensor.numel() for tensor in torch_tensors(adapter).values())
    assert found["parameters"] == stored
    assert found["rows"] >= -(-stored // d) and found["row_bytes"] == 4 * d


def torch_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_the_base_s_figures(adapter: Path, olmoe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, adapter, "--json"))["base"]
    model = tiny.load(olmoe)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert found == {"parameters": total, "activated": total - experts + experts * 3 // 8}


def test_the_routing_is_the_references(adapter: Path, olmoe: Path) -> None:
    model = tiny.load(olmoe)
    seen: dict[int, torch.Tensor] = {}
    variant = adapter.name
    mine = attach(
        model, tiny.adapter_config(model, variant, "lora", base_model_name_or_path=str(olmoe), **VARIANTS[variant])
    )
    load(mine, adapter)
    for index, layer in mine.by_layer():
        layer.register_forward_pre_hook(lambda _, given, index=index: seen.__setitem__(index, given[0]))
    found, tokens = routing_on(model, tiny_base.tokenizer(), mine, ["What is 2+2?"])
    assert tokens == len("What is 2+2?")
    if variant in "DS":
        assert not found
        return
    for index, layer in mine.by_layer():
        use_M = [0.0] * mine.config.num_experts
        for t, x_D in enumerate(seen[index]):
            weights_N = mine.base_routers[index].weights()[t]
            for m, _ in expert_weights(mine.config, layer.router, x_D, None, weights_N):
                use_M[m] += 1 / tokens
        assert found[index].use_M == pytest.approx(use_M, abs=1e-6)
        assert found[index].dead == [m for m, share in enumerate(use_M) if share == 0]
        assert 0 <= found[index].entropy <= 1
        assert (found[index].overlap is None) == (variant == "E")


def test_tables(adapter: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, adapter, "--prompts", prompts)
    assert f"PERFT-{adapter.name}" in text and "% of the base's" in text
    assert ("always on" in text) == (adapter.name in "DS")
    assert ("use by expert" in text) == (adapter.name in "RE")


def test_a_plot(adapter: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, adapter, "--prompts", prompts, "--plot", tmp_path / "out.png", "--layer", "2")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_projection_keeps_what_differs_most() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.zeros(20, 16), torch.zeros(20, 16)
    left[:, 0], right[:, 0] = 1, -1
    places = projected({"left": left + 0.05 * torch.randn(20, 16, generator=generator), "right": right})
    assert abs(float(places["left"][:, 0].mean() - places["right"][:, 0].mean())) == pytest.approx(2.0, abs=0.1)


def test_mutual_information() -> None:
    a = torch.arange(60) % 3
    assert mutual_information(a, a) == pytest.approx(1.0)
    assert mutual_information(a, 2 - a) == pytest.approx(1.0)
    assert mutual_information(a, torch.arange(60) // 30) == pytest.approx(0.0, abs=1e-6)
    assert mutual_information(a, torch.zeros(60, dtype=torch.long)) == 0.0


REFUSED: list[tuple[list[str], str]] = [
    (["/nowhere"], "No such file"),
    (["ADAPTER", "--prompts", "/nowhere"], "No such file"),
    (["ADAPTER", "--plot", "/nowhere/x.png"], "No such file"),
    (["ADAPTER", "--plot", "x.png", "--layer", "9"], "--layer: found 9"),
    (["ADAPTER", "--base", "/nowhere"], "found no folder /nowhere"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(each[0]) for each in REFUSED])
def test_what_cannot_be_inspected(
    adapter: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run([str(adapter) if each == "ADAPTER" else each for each in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
