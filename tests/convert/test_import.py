"""`perft import` and `perft export`: every kind of published checkpoint computes the same; the rest is refused."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.format.folder import read_folder
from perft.hf import attach, load, moe_blocks, shape_of
from server.commands.convert import run_export, run_import
from tests import tiny
from tests.convert import authors

BASES = {"olmoe": {"base_experts": 8, "top_k": 3, "renormalizes": False},
         "mixtral": {"base_experts": 4, "top_k": 2, "renormalizes": True}}  # fmt: skip
KINDS = list(product(BASES, "SDRE", ("LoRA", "Parallel_Adapter")))


def made(model_type: str, variant: str, kind: str, **changes: Any) -> tuple[dict[str, Any], authors.Tensors]:
    values = {"layers": tiny.LAYERS, "hidden": 64, "base_experts": BASES[model_type]["base_experts"]}
    return authors.checkpoint(model_type, variant, kind, **values | changes)


def imported(bases: dict[str, Path], tmp_path: Path, model_type: str, checkpoint: Path, *flags: str) -> Path:
    output = tmp_path / "adapter"
    arguments = [str(checkpoint), "--base", str(bases[model_type]), "--output", str(output), *flags]
    assert run_import(arguments) == 0
    return output


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def differences(
    bases: dict[str, Path], model_type: str, adapter_folder: Path, config: Any, tensors: Any
) -> list[float]:
    """By layer: how far our block's output is from the base's plus the authors' delta, relative to the delta."""
    model = tiny.load(bases[model_type])
    checked = read_folder(adapter_folder, shape_of(model))
    adapter = attach(model, checked.config)
    load(adapter, adapter_folder)
    found = []
    for layer, block in moe_blocks(model).items():
        x_BTD = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(layer))
        with torch.no_grad():
            adapter.enabled = False
            without = block.module(x_BTD)
            adapter.enabled = True
            x_TD = x_BTD.flatten(0, 1)
            base = BASES[model_type]
            expected = authors.delta(
                model_type,
                config,
                tensors,
                layer,
                x_TD,
                x_TD @ block.router_weight.T,
                base["top_k"],
                base["renormalizes"],
            )
            ours = (block.module(x_BTD) - without).flatten(0, 1)
        assert expected.norm() > 0.1 * without.norm()
        found.append(float((ours - expected).norm() / expected.norm()))
    return found


@pytest.mark.parametrize(("model_type", "variant", "kind"), KINDS)
def test_a_published_checkpoint_computes_the_same(
    bases: dict[str, Path], tmp_path: Path, model_type: str, variant: str, kind: str
) -> None:
    config, tensors = made(model_type, variant, kind)
    adapter = imported(bases, tmp_path, model_type, authors.write(tmp_path / "published", config, tensors))
    assert max(differences(bases, model_type, adapter, config, tensors)) < 1e-5
    shape = shape_of(tiny.load(bases[model_type]))
    assert config_of(adapter)["base_fingerprint"] == shape.fingerprint


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_olmoe_weights_routed_experts_by_the_base(bases: dict[str, Path], tmp_path: Path, top_k: int) -> None:
    config, tensors = made("olmoe", "R", "LoRA", experts=5, top_k=top_k)
    adapter = imported(bases, tmp_path, "olmoe", authors.write(tmp_path / "published", config, tensors))
    assert (config_of(adapter)["gate_weight"], config_of(adapter)["renormalize"]) == ("base_slot", False)
    assert max(differences(bases, "olmoe", adapter, config, tensors)) < 1e-5


def test_olmoe_routes_no_more_experts_than_the_base(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tensors = made("olmoe", "R", "LoRA", experts=5, top_k=4)
    assert refused(bases, tmp_path, "olmoe", authors.write(tmp_path / "published", config, tensors), capsys) == (
        "top_k: found 4, 'base_slot' needs at most the base's top-k 3"
    )


def test_embedded_experts_under_other_names(bases: dict[str, Path], tmp_path: Path) -> None:
    config, tensors = made("mixtral", "E", "LoRA")
    _, renamed = made("mixtral", "E", "LoRA", per_expert_names=True)
    folder = authors.write(tmp_path / "published", {"r": 6}, renamed)
    adapter = imported(bases, tmp_path, "mixtral", folder, "--alpha", "12")
    assert max(differences(bases, "mixtral", adapter, config, tensors)) < 1e-5


@pytest.mark.parametrize(("model_type", "variant", "kind"), KINDS)
def test_there_and_back(bases: dict[str, Path], tmp_path: Path, model_type: str, variant: str, kind: str) -> None:
    config, tensors = made(model_type, variant, kind)
    published = authors.write(tmp_path / "published", config, tensors)
    adapter = imported(bases, tmp_path, model_type, published)
    back = tmp_path / "back"
    assert run_export([str(adapter), "--base", str(bases[model_type]), "--output", str(back)]) == 0
    exported = load_file(back / "model.safetensors")
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name].float(), tensors[name].float()) for name in tensors)
    again = imported(bases, tmp_path / "again", model_type, back)
    assert read_folder(again, shape_of(tiny.load(bases[model_type]))).config.canonical_json() == (
        read_folder(adapter, shape_of(tiny.load(bases[model_type]))).config.canonical_json()
    )


# --- what is refused


def refused(
    bases: dict[str, Path], tmp_path: Path, model_type: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """The last line of what the refusal says; nothing is written."""
    output = tmp_path / "adapter"
    assert run_import([str(checkpoint), "--base", str(bases[model_type]), "--output", str(output)]) == 1
    assert not output.exists()
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1].removeprefix("  - ")


def test_a_tensor_that_is_left_over(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, tensors = made("olmoe", "S", "LoRA")
    tensors["model.layers.0.mlp.shared_adapter.0.unit.bias"] = torch.zeros(3)
    folder = authors.write(tmp_path / "published", config, tensors)
    assert refused(bases, tmp_path, "olmoe", folder, capsys) == "model.layers.0.mlp.shared_adapter.0.unit.bias [3]"


def lacking(name: str) -> Any:
    return lambda config, tensors: tensors.pop(name)


def changed(**values: Any) -> Any:
    return lambda config, tensors: config.update(values)


def replaced(name: str, tensor: torch.Tensor) -> Any:
    return lambda config, tensors: tensors.update({name: tensor})


ROUTED = "model.layers.1.mlp.shared_routing_adapter"
DAMAGED = [
    (lacking(f"{ROUTED}.2.unit.lora_B.weight"), "layer 1: found no up_proj of expert 2"),
    (lacking(f"{ROUTED}_gate.weight"), "layer 1: found no router"),
    (replaced(f"{ROUTED}_gate.weight", torch.zeros(3, 64)), "layers.1.router: found the shape [3, 64]"),
    (replaced(f"{ROUTED}.0.unit.lora_A.weight", torch.zeros(5, 64)), "layer 1: the experts' down_proj have different"),
    (replaced(f"{ROUTED}.0.unit.lora_A.weight", torch.full((6, 64), torch.nan)), "1.down_proj: found values that"),
    (changed(shared_routing_adapter_num_experts=5), "config.json says 5 experts, and the tensors are of 4"),
    (changed(shared_routing_adapter_type="Parallel_Adapter"), "the tensors are of lora experts"),
    (changed(shared_routing_adapter_num_experts_per_tok=None), "give it with --top-k"),
    (changed(shared_routing_adapter_num_experts_per_tok=9), "top_k: found 9"),
    (changed(shared_routing_adapter_args={"r": 6}), "give it with --alpha"),
    (changed(shared_routing_adapter_args={"r": 7, "lora_alpha": 1}), "config.json says r 7, and the tensors have 6"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_a_damaged_checkpoint(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str
) -> None:
    config, tensors = made("olmoe", "R", "LoRA")
    damage(config, tensors)
    folder = authors.write(tmp_path / "published", config, tensors)
    assert message in refused(bases, tmp_path, "olmoe", folder, capsys)


def test_a_layer_that_is_missing(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, tensors = made("olmoe", "D", "LoRA", layers=3)
    folder = authors.write(tmp_path / "published", config, tensors)
    assert refused(bases, tmp_path, "olmoe", folder, capsys).startswith("layer 3: found no tensor")


def test_two_adapters_in_one(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, tensors = made("olmoe", "S", "LoRA")
    other, more = made("olmoe", "E", "LoRA")
    folder = authors.write(tmp_path / "published", config | {k: v for k, v in other.items() if v}, tensors | more)
    assert "holds 2 adapters at once" in refused(bases, tmp_path, "olmoe", folder, capsys)


LORA = {"r": 8, "lora_alpha": 16, "peft_type": "LORA"}
P = "base_model.model.model.layers.0"
MISTAKES: list[tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = [
    ("needs no import", LORA, {f"{P}.self_attn.q_proj.lora_A.weight": (8, 64)}),
    ("target_parameters", LORA | {"target_parameters": ["gate_up_proj"]}, {f"{P}.mlp.experts.lora_A.weight": (8, 64)}),
    ("target_parameters", LORA, {f"{P}.mlp.experts.base_layer.lora_A.weight": (8, 64)}),
    ("per-expert LoRA", LORA, {f"{P}.mlp.experts.0.gate_proj.lora_A.weight": (8, 64)}),
    ("per-expert LoRA", LORA, {f"{P}.mlp.experts.3.w1.lora_A.weight": (8, 64)}),
    ("as Tinker trains it", LORA, {f"{P}.mlp.experts.gate_up_proj.lora_A.weight": (1, 8, 64)}),
    ("MixLoRA", {"peft_type": "MIXLORA"}, {"mixlora.layers.0.mlp.moe_gate.weight": (8, 64)}),
    ("our own format", {"peft_type": "PERFT"}, {"layers.0.down_proj": (1, 8, 64)}),
    ("another kind (PREFIX_TUNING)", {"peft_type": "PREFIX_TUNING"}, {"prompt_embeddings": (8, 64)}),
    ("a whole model", {}, {"model.embed_tokens.weight": (8, 64), "model.layers.0.self_attn.q_proj.weight": (64, 64)}),
    ("as ESFT saves them", {}, {"model.layers.0.mlp.experts.1.gate_proj.weight": (8, 64)}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "config", "shapes"), MISTAKES, ids=[each[0] for each in MISTAKES])
def test_what_people_hand_in_by_mistake(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str, config: Any, shapes: Any
) -> None:
    folder = tmp_path / "handed in"
    folder.mkdir()
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert message in refused(bases, tmp_path, "olmoe", folder, capsys)


def test_esft_is_known_by_its_file(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "handed in"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "expert_cfg.json").write_text("{}")
    assert "this is ESFT" in refused(bases, tmp_path, "olmoe", folder, capsys)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.pt", "model.ckpt"])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_pickle_is_never_opened(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, as_file: bool
) -> None:
    folder = tmp_path / "handed in"
    folder.mkdir()
    torch.save(Bomb(tmp_path / "exploded"), folder / name)
    message = refused(bases, tmp_path, "olmoe", folder / name if as_file else folder, capsys)
    assert "a pickle, which can run code" in message
    assert not (tmp_path / "exploded").exists()


def test_no_checkpoint_at_all(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "found nothing at" in refused(bases, tmp_path, "olmoe", tmp_path / "none", capsys)
    (tmp_path / "empty").mkdir()
    assert "found no .safetensors file" in refused(bases, tmp_path, "olmoe", tmp_path / "empty", capsys)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "found no safetensors in" in refused(bases, tmp_path, "olmoe", tmp_path / "broken", capsys)


def test_an_output_that_is_there_is_left_alone(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tensors = made("olmoe", "S", "LoRA")
    folder, output = authors.write(tmp_path / "published", config, tensors), tmp_path / "mine"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert run_import([str(folder), "--base", str(bases["olmoe"]), "--output", str(output)]) == 1
    assert "is there already" in capsys.readouterr().err and [*output.iterdir()] == [output / "notes.txt"]


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("olmoe", {}, "weights PERFT-R's experts by the base's router"),
        ("mixtral", {"renormalize": False}, "always divides the selected weights"),
        ("mixtral", {"layers": (0, 1)}, "an adapter in every one"),
        ("qwen3_moe", {}, "the authors' code knows olmoe and mixtral"),
    ],
)
def test_what_the_authors_layout_cannot_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str, changes: Any, message: str
) -> None:
    from perft.hf import save

    base = tiny.build(model_type, tmp_path / model_type)
    model = tiny.load(base)
    save(attach(model, tiny.adapter_config(model, "R", "lora", **changes)), tmp_path / "adapter")
    output = tmp_path / "published"
    assert run_export([str(tmp_path / "adapter"), "--base", str(base), "--output", str(output)]) == 1
    assert message in capsys.readouterr().err and not output.exists()
