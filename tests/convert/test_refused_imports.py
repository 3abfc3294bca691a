"""`perft import` refuses what it would have to guess, what contradicts itself, and files that are not what they seem.

Every refusal is one message without a traceback, and leaves nothing behind.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from perft.convert.routers import fingerprint_in
from perft.hf.base import fingerprint_of, load_config, shape_on_meta
from server.commands.convert import run_import
from tests.convert import authors
from tests.convert.test_import import config_of, imported, made

Refusal = Callable[..., str]
MLP = "model.layers.0.mlp"
ARGUMENTS = "shared_routing_adapter_args"
WEIGHTS = "model.safetensors"


@pytest.fixture
def refusal(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Imports a folder that has to be refused, and returns all that is said."""

    def refused(folder: Path, *flags: str, base: str | Path = "olmoe") -> str:
        output, named = tmp_path / "adapter", bases.get(str(base), base)
        assert run_import([str(folder), "--base", str(named), "--output", str(output), *flags]) == 1
        assert not output.exists() and not list(tmp_path.glob(".perft-*"))
        captured = capsys.readouterr()
        assert captured.out == "" and "Traceback" not in captured.err
        return captured.err

    return refused


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """PERFT-R for OLMoE."""
    return authors.write(tmp_path / "published", *made("olmoe", "R", "LoRA"))


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(file: Path, header: str, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + data)


# --- which family


@pytest.mark.parametrize(
    ("family", "variant", "model_type", "base", "named"),
    [
        ("mixtral", "R", "mixtral-adapter", "olmoe", ("'mixtral-adapter'", "is olmoe")),
        ("mixtral", "D", "mixtral-adapter", "olmoe", ("'mixtral-adapter'", "is olmoe")),
        ("olmoe", "R", "olmoe-adapter", "mixtral", ("'olmoe-adapter'", "is mixtral")),
        ("olmoe", "R", "llama", "olmoe", ("'llama'", "is olmoe")),
        ("olmoe", "S", 7, "olmoe", ("model_type 7", "is olmoe")),
        ("olmoe", "R", "mixtral-adapter", "olmoe", ("'mixtral-adapter'", "is olmoe")),
        ("mixtral", "R", "olmoe-adapter", "olmoe", ("as in mixtral", "is olmoe")),
        ("mixtral", "R", None, "olmoe", ("as in mixtral", "is olmoe")),
        ("olmoe", "S", None, "mixtral", ("as in olmoe", "is mixtral")),
    ],
)
def test_a_checkpoint_of_another_family(
    refusal: Refusal, tmp_path: Path, family: str, variant: str, model_type: Any, base: str, named: tuple[str, str]
) -> None:
    config, tensors = made(family, variant, "LoRA")
    config |= {"model_type": model_type}
    said = refusal(authors.write(tmp_path / "published", config, tensors), base=base)
    assert all(each in said for each in named), said


def test_names_of_two_families(refusal: Refusal, tmp_path: Path) -> None:
    config, tensors = made("olmoe", "S", "LoRA")
    renamed = {name.replace("3.mlp", "3.block_sparse_moe"): tensor for name, tensor in tensors.items()}
    assert "of mixtral and olmoe" in refusal(authors.write(tmp_path / "published", config, renamed))


@pytest.mark.parametrize(
    ("family", "flags", "expected"),
    [
        ("olmoe", (), ("base_slot", False)),
        ("olmoe", ("--gate-weight", "adapter"), ("adapter", False)),
        ("mixtral", (), ("adapter", True)),
    ],
)
def test_without_a_model_type_the_names_decide(
    bases: dict[str, Path], tmp_path: Path, family: str, flags: tuple[str, ...], expected: tuple[str, bool]
) -> None:
    config, tensors = made(family, "R", "LoRA")
    del config["model_type"]
    found = config_of(imported(bases, tmp_path, family, authors.write(tmp_path / "p", config, tensors), *flags))
    assert (found["gate_weight"], found["renormalize"]) == expected


# --- config.json


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({ARGUMENTS: {"use_rslora": True}}, "use_rslora True"),
    ({ARGUMENTS: {"use_dora": True}}, "use_dora True"),
    ({"use_dora": True}, "use_dora True"),
    ({ARGUMENTS: {"use_rslora": "false"}}, "use_rslora 'false'"),
    ({"rank_pattern": {"layers.0": 3}}, "rank_pattern {'layers.0': 3}"),
    ({ARGUMENTS: {"act": "gelu"}}, "'act' in shared_routing_adapter_args"),
    ({ARGUMENTS: {"hidden_act": "silu"}}, "'hidden_act' in shared_routing_adapter_args"),
    ({ARGUMENTS: {"lora_alpha": True}}, "lora_alpha True"),
    ({ARGUMENTS: {"lora_alpha": "12"}}, "lora_alpha '12'"),
    ({ARGUMENTS: {"lora_alpha": 0}}, "lora_alpha 0, expected a number above 0"),
    ({ARGUMENTS: {"lora_alpha": 10**400}}, "lora_alpha 1000"),
    ({ARGUMENTS: {"lora_alpha": float("nan")}}, "lora_alpha nan"),
    ({ARGUMENTS: {"r": "6"}}, "r '6', and the tensors have 6"),
    ({ARGUMENTS: {"r": 6.0}}, "r 6.0, and the tensors have 6"),
    ({ARGUMENTS: []}, "shared_routing_adapter_args [], expected an object"),
    ({"shared_adapter": True}, "shared_adapter true, and the tensors are of shared_routing_adapter alone"),
    ({"shared_routing_adapter": False}, "shared_routing_adapter false, and the tensors are"),
    ({"shared_routing_adapter": "true"}, "shared_routing_adapter 'true', expected true or false"),
    ({"shared_adapter": "false"}, "shared_adapter 'false', expected true or false"),
    ({"embedded_routing_adapter": 0}, "embedded_routing_adapter 0, expected true or false"),
    ({"shared_routing_adapter_type": ["LoRA"]}, "shared_routing_adapter_type ['LoRA']"),
    ({"shared_routing_adapter_num_experts": "4"}, "'4' experts"),
    ({"shared_routing_adapter_num_experts_per_tok": True}, "num_experts_per_tok True, expected a whole number"),
    ({"shared_routing_adapter_num_experts_per_tok": 0}, "top_k"),
    ({"norm_topk_prob": True}, "norm_topk_prob True, and the base has False"),
    ({"hidden_size": 128}, "hidden_size 128, and the base has 64"),
    ({"num_hidden_layers": 16}, "num_hidden_layers 16, and the base has 4"),
    ({"num_experts": 64}, "num_experts 64, and the base has 8"),
    ({"num_experts_per_tok": 8}, "num_experts_per_tok 8, and the base has 3"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS, ids=[each[1] for each in CONTRADICTIONS])
def test_a_config_that_contradicts(refusal: Refusal, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config, tensors = made("olmoe", "R", "LoRA")
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) and key in config else value
    assert message in refusal(authors.write(tmp_path / "published", config, tensors))


@pytest.mark.parametrize("key", ["act", "use_bias"])
def test_an_argument_of_parallel_experts_that_is_not_known(refusal: Refusal, tmp_path: Path, key: str) -> None:
    config, tensors = made("olmoe", "S", "Parallel_Adapter")
    config["shared_adapter_args"][key] = "gelu"
    assert f"'{key}' in shared_adapter_args" in refusal(authors.write(tmp_path / "published", config, tensors))


def test_another_number_of_shared_experts(refusal: Refusal, tmp_path: Path) -> None:
    config, tensors = made("olmoe", "D", "LoRA")
    config["shared_adapter_num"] = 1
    assert "says 1 experts, and the tensors are of 4" in refusal(authors.write(tmp_path / "p", config, tensors))


def test_the_two_config_files_differ(refusal: Refusal, published: Path) -> None:
    (published / "adapter_config.json").write_text('{"model_type": "mixtral-adapter"}')
    assert "config.json and adapter_config.json differ" in refusal(published)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"lora_alpha": 1, "lora_alpha": 2}', "given twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"r": ', "not valid JSON"),
        ("[]", "found no object"),
    ],
)
def test_a_config_that_is_no_json_object(refusal: Refusal, published: Path, text: str, message: str) -> None:
    (published / "config.json").write_text(text)
    assert message in refusal(published)


@pytest.mark.parametrize(
    ("variant", "kind", "flags", "message"),
    [
        ("R", "LoRA", ("--alpha", "99"), "the checkpoint says 12"),
        ("R", "LoRA", ("--top-k", "1"), "the checkpoint says 2"),
        ("S", "LoRA", ("--top-k", "1"), "--top-k, and the checkpoint is not of PERFT-R"),
        ("E", "LoRA", ("--gate-weight", "adapter"), "--gate-weight, and the checkpoint is not of PERFT-R"),
        ("S", "Parallel_Adapter", ("--alpha", "1"), "--alpha, and the checkpoint's experts are parallel"),
    ],
)
def test_flags_that_contradict(
    refusal: Refusal, tmp_path: Path, variant: str, kind: str, flags: tuple[str, ...], message: str
) -> None:
    assert message in refusal(authors.write(tmp_path / "p", *made("olmoe", variant, kind)), *flags)


def test_flags_that_agree(bases: dict[str, Path], tmp_path: Path, published: Path) -> None:
    found = config_of(imported(bases, tmp_path, "olmoe", published, "--alpha", "12", "--top-k", "2"))
    assert (found["alpha"], found["top_k"]) == (12.0, 2)


def test_base_slot_needs_a_base_that_does_not_divide(refusal: Refusal, tmp_path: Path) -> None:
    folder = authors.write(tmp_path / "p", *made("mixtral", "R", "LoRA"))
    assert "divides them by their sum" in refusal(folder, "--gate-weight", "base_slot", base="mixtral")


def test_published_olmoe_code_on_a_base_that_divides(
    refusal: Refusal, bases: dict[str, Path], tmp_path: Path, published: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["olmoe"], base)
    changed_base(norm_topk_prob=True)(base)
    assert "divides them by their sum" in refusal(published, base=base)


# --- tensors


TYPES = [torch.int8, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn, torch.int64]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_type_that_is_not_imported(refusal: Refusal, tmp_path: Path, dtype: torch.dtype) -> None:
    config, tensors = made("olmoe", "R", "LoRA")
    name = f"{MLP}.shared_routing_adapter.0.unit.lora_A.weight"
    tensors[name] = tensors[name].to(dtype)
    said = refusal(authors.write(tmp_path / "published", config, tensors))
    assert "expected float32, float16 or bfloat16" in said and f"{name}: found '" in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_type_that_is_imported(bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    config, tensors = made("olmoe", "R", "LoRA")
    halves = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    assert imported(bases, tmp_path, "olmoe", authors.write(tmp_path / "published", config, halves))


def test_a_name_given_twice_in_the_header(refusal: Refusal, published: Path) -> None:
    header, data = header_of(published / WEIGHTS)
    name = next(name for name in header if name != "__metadata__")
    write_raw(published / WEIGHTS, f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}", data)
    assert "given twice" in refusal(published)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers.3.", "layers.03."),
        ("layers.3.", "layers.\u0663."),
        ("layers.3.", f"layers.{'9' * 5000}."),
        ("adapter.0.", "adapter.00."),
        ("adapter.0.", "adapter.\u0660."),
        ("layers.3.mlp", "layers.3.feed_forward"),
    ],
)
def test_a_name_written_otherwise(refusal: Refusal, tmp_path: Path, old: str, new: str) -> None:
    config, tensors = made("olmoe", "R", "LoRA")
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    said = refusal(authors.write(tmp_path / "published", config, renamed))
    assert "tensors that no PERFT checkpoint has" in said


def test_control_characters_are_not_printed(refusal: Refusal, tmp_path: Path) -> None:
    config, tensors = made("olmoe", "S", "LoRA")
    tensors["\x1b[31mred\n\x07"] = torch.zeros(2)
    said = refusal(authors.write(tmp_path / "published", config, tensors))
    assert r"\x1b[31mred\n\x07 [2]" in said and "\x1b" not in said and "\x07" not in said


def test_no_tensors(refusal: Refusal, tmp_path: Path) -> None:
    assert "found no tensors" in refusal(authors.write(tmp_path / "p", made("olmoe", "S", "LoRA")[0], {}))


@pytest.mark.parametrize(
    ("kept", "message"), [("_gate.weight", "found no experts"), ("lora_B.weight", "found no matrix lora_A")]
)
def test_one_kind_of_tensor_alone(refusal: Refusal, tmp_path: Path, kept: str, message: str) -> None:
    config, tensors = made("olmoe", "R", "LoRA")
    some = {name: tensor for name, tensor in tensors.items() if name.endswith(kept)}
    assert message in refusal(authors.write(tmp_path / "published", config, some))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), "found no matrix lora_A"),
        ((384,), "says r 6, and the tensors have 384"),
        ((6,), "found the shape [1, 6], expected [1, 6, 64]"),
        ((6, 1, 64), "found the shape [1, 6, 1, 64], expected [1, 6, 64]"),
    ],
)
def test_a_matrix_that_is_none(refusal: Refusal, tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    config, tensors = made("olmoe", "S", "LoRA")
    damaged = {name: torch.zeros(shape) if "lora_A" in name else tensor for name, tensor in tensors.items()}
    assert message in refusal(authors.write(tmp_path / "p", config, damaged))


# --- files


def damaged_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        header, data = header_of(file)
        header.pop("__metadata__", None)
        change(next(iter(header.values())))
        write_raw(file, json.dumps(header), data)

    return damage


def replaced_by(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 123\n"
FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("pipe", replaced_by(os.mkfifo), "found no plain file"),
    ("device", replaced_by(lambda file: file.symlink_to("/dev/zero")), "found no plain file"),
    ("folder", replaced_by(Path.mkdir), "found a folder"),
    ("nowhere", replaced_by(lambda file: file.symlink_to("/nowhere")), "No such file"),
    ("sparse", lambda file: os.truncate(file, 100 * 1000**3), "belongs to no tensor"),
    ("cut off", lambda file: os.truncate(file, file.stat().st_size - 8), "is it cut off?"),
    ("empty", lambda file: os.truncate(file, 0), "is it cut off?"),
    ("pointer", lambda file: file.write_text(LFS), "run `git lfs pull`"),
    ("deep", lambda file: write_raw(file, "[" * 100_000, b""), "nested too deeply"),
    ("list", lambda file: write_raw(file, "[]", b""), "no JSON object"),
    ("shape", damaged_header(lambda entry: entry.update(shape=[7, 64])), "another size than its shape"),
    ("negative", damaged_header(lambda entry: entry.update(shape=[-6, -64])), "has no dtype, shape and data_offsets"),
    ("gap", damaged_header(lambda entry: entry.update(data_offsets=[8, 8 + 4 * 6 * 64])), "does not follow on"),
]


@pytest.mark.parametrize(("damage", "message"), [each[1:] for each in FILES], ids=[each[0] for each in FILES])
def test_weights_that_are_not_what_they_seem(
    refusal: Refusal, published: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(published / WEIGHTS)
    assert message in refusal(published)


def test_a_device_as_the_checkpoint(refusal: Refusal) -> None:
    assert "found no plain file" in refusal(Path("/dev/zero"))


@pytest.mark.parametrize(("damage", "message"), [each[1:] for each in FILES[:4]], ids=[each[0] for each in FILES[:4]])
def test_a_config_that_is_no_file(
    refusal: Refusal, published: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(published / "config.json")
    said = refusal(published)
    assert "config.json" in said and message in said


def test_no_config(refusal: Refusal, bases: dict[str, Path], tmp_path: Path, published: Path) -> None:
    (published / "config.json").unlink()
    assert "found no config.json in" in refusal(published)
    assert "found no config.json in" in refusal(published, "--alpha", "12")
    assert imported(bases, tmp_path, "olmoe", published, "--alpha", "12", "--top-k", "2")


def test_a_large_file_is_judged_by_its_header(refusal: Refusal, published: Path) -> None:
    """16 GiB, sparse, which nobody would want to wait for."""
    header, data = header_of(published / WEIGHTS)
    end, size = len(data), 16 * 1024**3
    name = f"{MLP}.shared_routing_adapter.4.unit.lora_A.weight"
    header[name] = {"dtype": "F32", "shape": [size // 256, 64], "data_offsets": [end, end + size]}
    write_raw(published / WEIGHTS, json.dumps(header), data)
    os.truncate(published / WEIGHTS, (published / WEIGHTS).stat().st_size + size)
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | {"shared_routing_adapter_num_experts": 5}))
    assert "layer 0: the experts' down_proj have different shapes" in refusal(published)


def test_more_than_an_adapter_has(refusal: Refusal, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perft.convert.checkpoint.MOST_BYTES", 1000)
    assert "bytes of weights, expected an adapter of at most 1,000" in refusal(published)


# --- shards


def in_shards(folder: Path, **changed_map: str) -> None:
    """The folder's weights in two files, with an index in which `changed_map` overrides the tensors' files."""
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + position % 2}.safetensors" for position, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": weight_map | changed_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def test_shards(bases: dict[str, Path], tmp_path: Path, published: Path) -> None:
    in_shards(published)
    assert imported(bases, tmp_path, "olmoe", published)


@pytest.mark.parametrize(
    ("changed_map", "message"),
    [
        ({"more": "model-3.safetensors"}, "'model-3.safetensors': found no such file"),
        ({"more": "../outside.safetensors"}, "'../outside.safetensors': expected a file of this folder"),
        ({"more": "/etc/passwd"}, "'/etc/passwd': expected a file of this folder"),
        ({"more": ".."}, "'..': expected a file of this folder"),
        ({"more": "model-1.safetensors"}, "more: found no such tensor in 'model-1.safetensors'"),
    ],
)
def test_an_index_that_names_what_is_not_there(
    refusal: Refusal, published: Path, changed_map: dict[str, str], message: str
) -> None:
    shutil.copy(published / WEIGHTS, published.parent / "outside.safetensors")
    in_shards(published, **changed_map)
    assert message in refusal(published)


def test_an_index_beside_whole_weights(refusal: Refusal, published: Path) -> None:
    (published / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    assert "'model-1.safetensors': found no such file" in refusal(published)


@pytest.mark.parametrize("text", ['{"weight_map": [1]}', "[]", '{"weight_map": {"x": 1}}'])
def test_an_index_that_is_none(refusal: Refusal, published: Path, text: str) -> None:
    (published / f"{WEIGHTS}.index.json").write_text(text)
    assert "found no weight_map" in refusal(published)


# --- the base


def changed_base(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def changed_tensors(change: Callable[[authors.Tensors], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        from safetensors.torch import load

        tensors = load((folder / WEIGHTS).read_bytes())
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return changed


GATE = "model.layers.2.mlp.gate.weight"
BROKEN_BASES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no weights", lambda base: (base / WEIGHTS).unlink(), "found no .safetensors file"),
    ("cut off", lambda base: os.truncate(base / WEIGHTS, 100_000), "is it cut off?"),
    ("garbage", lambda base: (base / WEIGHTS).write_text("x" * 1000), "found no safetensors in"),
    ("pointer", lambda base: (base / WEIGHTS).write_text(LFS), "run `git lfs pull`"),
    ("nan", changed_tensors(lambda tensors: tensors[GATE].fill_(torch.nan)), "layer 2: found values in the router"),
    ("no router", changed_tensors(lambda tensors: tensors.pop(GATE)), "layer 2: found no router"),
    (
        "integers",
        changed_tensors(lambda tensors: tensors.update({GATE: tensors[GATE].to(torch.int8)})),
        "layer 2: found a router of I8",
    ),
    ("experts", changed_base(num_experts=4), "layer 0: found a router [8, 64], expected [4, 64]"),
    ("layers", changed_base(num_hidden_layers=6), "layer 4: found no tensor"),
    ("text", changed_base(hidden_size="64"), "cannot be read"),
    ("deep", lambda base: (base / "config.json").write_text("[" * 100_000), "base"),
]


@pytest.mark.parametrize(("damage", "message"), [e[1:] for e in BROKEN_BASES], ids=[e[0] for e in BROKEN_BASES])
def test_a_broken_base(
    refusal: Refusal, bases: dict[str, Path], tmp_path: Path, published: Path, damage: Any, message: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["olmoe"], base)
    damage(base)
    assert message in refusal(published, base=base)


def test_a_base_on_the_hub_that_is_not_here_has_no_fingerprint(bases: dict[str, Path]) -> None:
    shape = shape_on_meta(load_config(str(bases["olmoe"])))
    assert fingerprint_in("nobody/has-this-model", shape) is None
    assert fingerprint_in(str(bases["olmoe"]), shape) == fingerprint_of(str(bases["olmoe"]), shape)
