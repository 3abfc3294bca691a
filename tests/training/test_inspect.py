"""`perft inspect`: figures by the paper's formulas, routing that is what the reference says, plots that are drawn."""

import json
import math
import os
import shutil
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import to_hex
from safetensors.torch import save_file

from perft.hf import attach, load, save, shape_of
from perft.inspection import plots
from perft.inspection.plots import projected, told_apart
from perft.inspection.routing import few_tokens, mutual_information, routing_on
from perft.reference import LayerWeights, expert_weights
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
    places, shares = projected({"left": left + 0.05 * torch.randn(20, 16, generator=generator), "right": right})
    assert abs(float(places["left"][:, 0].mean() - places["right"][:, 0].mean())) == pytest.approx(2.0, abs=0.1)
    assert shares[0] > 0.9 > 0.1 > shares[1]


def test_mutual_information() -> None:
    a = torch.arange(60) % 3
    assert mutual_information(a, a) == pytest.approx(1.0)
    assert mutual_information(a, 2 - a) == pytest.approx(1.0)
    assert mutual_information(a, torch.arange(60) // 30) == pytest.approx(0.0, abs=1e-6)
    assert mutual_information(a, torch.zeros(60, dtype=torch.long)) == 0.0


def test_overlap_is_held_against_every_pairing_of_the_same_labels() -> None:
    """E by hand: the mean over all orders of one of the labellings."""
    a, b = [0, 0, 0, 1, 1, 2], [0, 0, 1, 0, 1, 1]

    def information(pairs: list[tuple[int, int]]) -> float:
        return sum(
            n / 6 * math.log(n * 6 / (a.count(left) * b.count(right))) for (left, right), n in Counter(pairs).items()
        )

    orders = list(permutations(b))
    chance = sum(information(list(zip(a, order, strict=True))) for order in orders) / len(orders)
    found = information(list(zip(a, b, strict=True)))
    expected = (found - chance) / (math.log(2) - chance)
    assert mutual_information(torch.tensor(a), torch.tensor(b)) == pytest.approx(max(0.0, expected))
    assert mutual_information(torch.tensor(a), torch.tensor([0, 0, 0, 1, 1, 1])) == pytest.approx(1.0)


def test_independent_routers_do_not_overlap() -> None:
    """65 tokens, 4 and 8 experts: not corrected for chance, the mean is 0.12."""
    generator = torch.Generator().manual_seed(0)
    draws = [
        mutual_information(
            torch.randint(4, (65,), generator=generator), torch.randint(8, (65,), generator=generator)
        )
        for _ in range(100)
    ]  # fmt: skip
    assert sum(draws) / len(draws) < 0.03


@pytest.mark.parametrize(
    ("tokens", "experts", "expected"),
    [(1, 4, "1 token for 4 experts"), (79, 4, "below 80 tokens"), (80, 4, None), (19, 1, "19 tokens for 1 expert:")],
)
def test_few_tokens_are_said_to_be_few(tokens: int, experts: int, expected: str | None) -> None:
    found = few_tokens(tokens, experts)
    assert found is None if expected is None else expected in str(found)


def test_one_token(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("a")
    text = shown(capsys, adapter, "--prompts", tmp_path / "one.txt")
    assert ("over 1 token;" in text and "note: 1 token for" in text) == (adapter.name in "RE")
    assert ("1 lora expert," in text) == (adapter.name == "S") and "1 lora experts" not in text


# --- plots


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    from matplotlib.figure import Figure

    kept: list[Any] = []
    saved = Figure.savefig

    def keep(figure: Any, *arguments: Any, **named: Any) -> None:
        saved(figure, *arguments, **named)
        kept.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def test_what_a_plot_says(
    adapter: Path, prompts: Path, tmp_path: Path, figures: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "my $^{$ adapter")
    shown(capsys, folder, "--prompts", prompts, "--plot", tmp_path / "out.svg", "--layer", "2", "--json")
    (figure,) = figures
    *heat, geometry = [axes for axes in figure.axes if axes.get_xlabel() or axes.get_title()]
    assert figure.get_suptitle().startswith(f"my $^{{$ adapter: PERFT-{adapter.name}, ")
    assert geometry.get_title().startswith("layer 2") and "% of variance" in geometry.get_xlabel()
    legend, drawn = geometry.get_legend().get_window_extent(), geometry.get_window_extent()
    assert not legend.overlaps(drawn)
    numbers = {"R": [*range(8), *range(4)], "E": range(8), "D": range(8), "S": range(8)}[adapter.name]
    assert Counter(text.get_text() for text in geometry.texts) == Counter(map(str, numbers))
    assert bool(heat) == (adapter.name in "RE")
    if heat:
        (picture,) = heat[0].images
        assert picture.get_clim() == (0, 1) and "tokens" in heat[0].get_title()
        cells = [text.get_text() for text in heat[0].texts]
        assert cells == [f"{share:.2f}" for share in picture.get_array().flatten()]
        assert f"K / M = {2 / 4 if adapter.name == 'R' else 3 / 8:.2f}" in picture.colorbar.ax.get_ylabel()


def test_of_many_experts_the_most_used_are_told_apart() -> None:
    use_M = [0.0] * 64
    use_M[50:62] = [1.0] * 12
    assert told_apart(64, use_M) == list(range(50, 62))
    assert told_apart(64, None) == list(range(12)) and told_apart(12, None) == list(range(12))


@pytest.mark.parametrize("variant", "ER")
def test_an_expert_has_one_colour(variant: str, tmp_path: Path, figures: list[Any]) -> None:
    torch.manual_seed(0)
    weights = LayerWeights(torch.randn(64, 8) if variant == "R" else None, torch.randn(64, 2, 8), torch.randn(64, 8, 2))
    plots.draw(tmp_path / "out.png", plots.Drawn("many", variant, {}, 0, 0, torch.randn(64, 8), weights))
    (axes,) = figures[0].axes
    labels = {text.get_text(): to_hex(text.get_color()) for text in axes.texts}
    assert labels.keys() == set(map(str, range(12))) and len(set(labels.values())) == 12
    filled = [to_hex(each.get_facecolor()[0]) for each in axes.collections if len(each.get_facecolor())]
    counts = Counter(color for color in filled if color in labels.values())
    assert counts == dict.fromkeys(labels.values(), 2)  # its keys, and its router's vector


# --- what is refused before the base is loaded

JSON_DEEP = b"[" * 60000


def spoil(folder: Path, how: str) -> None:
    config = folder / "adapter_config.json"
    values = json.loads(config.read_bytes())
    config.unlink()
    match how:
        case "fifo":
            os.mkfifo(config)
        case "zero":
            config.symlink_to("/dev/zero")
        case "deep":
            config.write_bytes(JSON_DEEP)
        case "large":
            config.write_bytes(b" " * 70000)
        case "twice":
            config.write_text('{"peft_type": "PERFT", "peft_type": "PERFT"}')
        case "utf-16":
            config.write_text("{}", encoding="utf-16")
        case "ia3":
            config.write_text('{"peft_type": "IA3"}')
        case "weights":
            config.write_text(json.dumps(values))
            (folder / "model.safetensors").write_bytes(b"")
        case "empty":
            (folder / "adapter_model.safetensors").unlink()


SPOILED = {
    "fifo": "expected a plain file", "zero": "expected a plain file", "deep": "nested too deeply",
    "large": "found 70000 bytes", "twice": "'peft_type' is given twice", "utf-16": "not UTF-8",
    "ia3": "found a PEFT adapter of the type IA3", "weights": "model.safetensors: not part of an adapter",
    "empty": "found no adapter in",
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", SPOILED)
def test_a_folder_is_judged_before_it_is_read(
    how: str, olmoe_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(olmoe_adapter, how)
    error = refusal(capsys, olmoe_adapter)
    assert SPOILED[how] in error and len(error.splitlines()) <= 2


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert run([str(each) for each in arguments]) == 1
    out, error = capsys.readouterr()
    assert not out and error.startswith("perft inspect: ")
    return error


@pytest.fixture
def olmoe_adapter(olmoe: Path, tmp_path: Path) -> Path:
    """Of variant R, to be altered."""
    model = tiny.load(olmoe)
    config = tiny.adapter_config(
        model, "R", "lora", base_model_name_or_path=str(olmoe), base_fingerprint=shape_of(model).fingerprint
    )
    save(tiny.randomize(attach(model, config), seed=3), tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's weights must not be loaded."""

    def load_model(*_: Any) -> None:
        raise AssertionError("the base is loaded")

    monkeypatch.setattr("perft.hf.base.load_model", load_model)


def unusable(folder: Path, kind: str) -> Path:
    file = folder / "texts"
    match kind:
        case "fifo":
            os.mkfifo(file)
        case "zero":
            file.symlink_to("/dev/zero")
        case "latin-1":
            file.write_bytes("caf\xe9\n".encode("latin-1"))
        case "utf-16":
            file.write_text("hello", encoding="utf-16")
        case "blank":
            file.write_text("\n \n")
    return file


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_base")
@pytest.mark.parametrize(
    ("kind", "message"),
    [("fifo", "no plain file"), ("zero", "no plain file"), ("latin-1", "not UTF-8"), ("utf-16", "not UTF-8"),
     ("blank", "found no text")],
)  # fmt: skip
def test_texts_that_cannot_be_read(
    kind: str, message: str, olmoe_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, olmoe_adapter, "--prompts", unusable(tmp_path, kind))


@pytest.mark.usefixtures("no_base")
@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("out.txt", [], "expected a name that ends in .png, .pdf, .svg"),
        ("out", [], "expected a name that ends in"),
        ("missing/out.png", [], "No such file or directory"),
        ("mine/adapter_config.json/out.png", [], "No such file or directory"),
        ("folder.png", [], "something else than a file"),
        ("out.png", ["--layer", "9"], "--layer: found 9"),
        ("out.png", ["--layer", "-1"], "--layer: found -1"),
    ],
)
def test_a_plot_that_cannot_be_drawn_is_refused_first(
    name: str, more: list[str], message: str, olmoe_adapter: Path, prompts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "folder.png").mkdir()
    assert message in refusal(capsys, olmoe_adapter, "--prompts", prompts, "--plot", tmp_path / name, *more)


def test_a_layer_without_a_plot(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(["ADAPTER", "--layer", "1"])
    assert "--layer: it belongs to --plot" in capsys.readouterr().err


# --- the base


@pytest.mark.usefixtures("no_base")
def test_another_base_is_refused(
    olmoe: Path, olmoe_adapter: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.build("olmoe", tmp_path / "other", seed=1)
    error = refusal(capsys, olmoe_adapter, "--base", other, "--prompts", prompts)
    for model in (olmoe, other):
        assert str(shape_of(tiny.load(model)).fingerprint) in error and str(model) in error


def test_a_foreign_fingerprint_is_shown(olmoe: Path, olmoe_adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = str(shape_of(tiny.load(olmoe)).fingerprint)
    assert "trained on another" not in shown(capsys, olmoe_adapter)
    change(olmoe_adapter, base_fingerprint="0" * 64)
    text = shown(capsys, olmoe_adapter)
    assert "0" * 64 in text and own in text and "trained on another" in text


def change(folder: Path, **values: Any) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_bytes()) | values))


@pytest.mark.parametrize("where", ["base_model_name_or_path", "tensor", "folder"])
def test_names_from_outside_are_escaped(where: str, olmoe_adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "/evil\x1b[31m"
    match where:
        case "base_model_name_or_path":
            change(olmoe_adapter, base_model_name_or_path=evil)
        case "tensor":
            weights = torch_tensors(olmoe_adapter)
            save_file(weights | {evil: torch.zeros(1)}, olmoe_adapter / "adapter_model.safetensors")
        case "folder":
            olmoe_adapter = olmoe_adapter.rename(f"{olmoe_adapter}{evil[1:]}")
            (olmoe_adapter / "adapter_config.json").unlink()
    error = refusal(capsys, olmoe_adapter)
    assert "\x1b" not in error and "evil\\x1b[31m" in error


# --- folders as a trainer leaves them


def test_a_trainer_s_folder(olmoe_adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = shown(capsys, olmoe_adapter)
    shutil.copytree(olmoe_adapter, olmoe_adapter / "checkpoints" / "checkpoint-1")
    (olmoe_adapter / "README.md").write_text("a card")
    (olmoe_adapter / "training_args.bin").write_bytes(b"")
    assert shown(capsys, olmoe_adapter) == alone


def test_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(refusal(capsys, tmp_path).splitlines()) == 1


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    folder = tmp_path / "lora"
    folder.mkdir()
    values = {"peft_type": "LORA", "base_model_name_or_path": "b\x1b", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file({"a": torch.zeros(4, 64), "b": torch.zeros(64, 4)}, folder / "adapter_model.safetensors")
    return folder


def test_peft_lora(lora: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, lora)
    assert "PEFT LoRA of rank 4 on q_proj, v_proj" in text and "512 (" in text and "\x1b" not in text
    assert json.loads(shown(capsys, lora, "--json"))["parameters"] == 512
    assert "without experts" in refusal(capsys, lora, "--prompts", prompts)
    change(lora, r="four")
    assert "found r four" in refusal(capsys, lora)
    (lora / "adapter_model.safetensors").write_bytes(b"{}")
    change(lora, r=4)
    assert "not a readable safetensors file" in refusal(capsys, lora)


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
