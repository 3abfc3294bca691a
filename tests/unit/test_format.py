"""docs/format.md's rules: each kind of broken adapter folder is refused by name, every good one passes, identity holds.

One fault gives one line of the answer: the tables list exactly the violations expected, no more and no fewer.
"""

import io
import json
import os
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import InvalidAdapterError
from adapters.format.files import Limits
from adapters.format.folder import check_folder, check_handed_in, read_folder
from adapters.format.recognize import BOM, recognized
from adapters.format.values import BLOCK_BYTES, read_values
from adapters.identity import content_digest, digest_of, file_hash
from perft.base_model import BaseShape
from perft.config import AdapterConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VECTORS = Path(__file__).parents[1] / "vectors"
BASE = BaseShape(
    hidden_size=8, num_layers=5, moe_layers=(0, 1, 3), num_experts=4, top_k=2, dtype=torch.float32, fingerprint="a" * 64
)  # fmt: skip
MISSING: Any = object()
Tensors = dict[str, torch.Tensor]

_COMMON = {"peft_type": "PERFT", "format_version": 1, "base_model_name_or_path": "tiny", "bottleneck": 3}
_VARIANTS: dict[str, dict[str, Any]] = {
    "R": {"variant": "R", "num_experts": 4, "top_k": 2, "renormalize": True},
    "E": {"variant": "E", "num_experts": 4},
    "D": {"variant": "D", "num_experts": 3},
    "S": {"variant": "S", "num_experts": 1},
}
_TYPES: dict[str, dict[str, Any]] = {
    "lora": {"expert_type": "lora", "alpha": 6.0},
    "parallel": {"expert_type": "parallel", "activation": "relu"},
}


def config_dict(start: str = "R-lora", **changes: Any) -> dict[str, Any]:
    """A good configuration, `start` being 'variant-type'; `changes` set keys, MISSING takes one away."""
    variant, expert_type = start.split("-")
    values = _COMMON | _VARIANTS[variant] | _TYPES[expert_type] | changes
    return {key: value for key, value in values.items() if value is not MISSING}


def good_tensors(values: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensors:
    """The tensors docs/format.md asks for, written down here a second time: `tensor_shapes` is under test too."""
    generator = torch.Generator().manual_seed(0)
    m, b, d = values["num_experts"], values["bottleneck"], BASE.hidden_size
    tensors: Tensors = {}
    for layer in values.get("layers") or BASE.moe_layers:
        if layer in BASE.moe_layers:
            shapes = {"down_proj": (m, b, d), "up_proj": (m, d, b)} | ({"router": (m, d)} if "top_k" in values else {})
            for name, shape in shapes.items():
                tensors[f"layers.{layer}.{name}"] = torch.randn(shape, generator=generator).to(dtype)
    return tensors


def write(folder: Path, values: dict[str, Any], tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """An adapter folder with its two files."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(values))
    save_file(tensors, folder / WEIGHTS, metadata)
    return folder


def good_folder(folder: Path, start: str = "R-lora", **changes: Any) -> Path:
    values = config_dict(start, **changes)
    return write(folder, values, good_tensors(values))


def expect(folder: Path, expected: tuple[str, ...], base: BaseShape = BASE, limits: Limits | None = None) -> None:
    """`read_folder` refuses with exactly the expected violations, each on one line that can be sent and logged."""
    with pytest.raises(InvalidAdapterError) as caught:
        read_folder(folder, base, limits or Limits())
    violations = caught.value.violations
    unnamed = [part for part in expected if not any(part in violation for violation in violations)]
    assert not unnamed, f"not named: {unnamed}; found {violations}"
    assert len(violations) == len(expected), violations
    for violation in violations:
        assert violation.encode() and violation.isprintable(), repr(violation)
        assert violation in str(caught.value)


HUGE = 10**400
NEEDED = ("bottleneck", "num_experts", "top_k", "renormalize")
CONFIG_CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    # the two constants
    ("R-lora", {"peft_type": MISSING}, ("peft_type: missing",)),
    ("R-lora", {"peft_type": "LORA"}, ("peft_type: found 'LORA'",)),
    ("R-lora", {"peft_type": None}, ("peft_type: found null",)),
    ("R-lora", {"format_version": MISSING}, ("format_version: missing",)),
    ("R-lora", {"format_version": 2}, ("format_version: found 2",)),
    ("R-lora", {"format_version": 0}, ("format_version: found 0",)),
    ("R-lora", {"format_version": True}, ("format_version: found True",)),
    ("R-lora", {"format_version": 1.0}, ("format_version: found 1.0",)),
    ("R-lora", {"format_version": "1"}, ("format_version: found '1'",)),
    # strings
    ("R-lora", {"base_model_name_or_path": MISSING}, ("base_model_name_or_path: missing",)),
    ("R-lora", {"base_model_name_or_path": 7}, ("base_model_name_or_path: found 7",)),
    ("R-lora", {"base_model_name_or_path": None}, ("base_model_name_or_path: found null",)),
    ("R-lora", {"base_fingerprint": "a" * 63}, ("base_fingerprint: found",)),
    ("R-lora", {"base_fingerprint": "a" * 65}, ("base_fingerprint: found",)),
    ("R-lora", {"base_fingerprint": "g" * 64}, ("base_fingerprint: found",)),
    ("R-lora", {"base_fingerprint": "a" * 64 + "\n"}, ("base_fingerprint: found",)),
    ("R-lora", {"base_fingerprint": "g" * 64}, ("base_fingerprint: found",)),
    ("R-lora", {"base_fingerprint": 1}, ("base_fingerprint: found 1",)),
    ("R-lora", {"description": "x" * 1025}, ("description: found",)),
    ("R-lora", {"description": 3}, ("description: found 3",)),
    ("R-lora", {"description": None}, ("description: found null",)),
    # choices
    ("R-lora", {"variant": "X"}, ("variant: found 'X'",)),
    ("R-lora", {"variant": "r"}, ("variant: found 'r'",)),
    ("R-lora", {"variant": ["R"]}, ("variant: found ['R']",)),
    ("R-lora", {"variant": MISSING}, ("variant: missing",)),
    ("R-lora", {"variant": None}, ("variant: found null",)),
    ("R-lora", {"expert_type": "LoRA"}, ("expert_type: found 'LoRA'",)),
    ("R-lora", {"expert_type": MISSING}, ("expert_type: missing",)),
    ("R-parallel", {"activation": "swish"}, ("activation: found 'swish'",)),
    ("R-parallel", {"activation": None}, ("activation: found null",)),
    ("R-lora", {"gate_weight": "base"}, ("gate_weight: found 'base'",)),
    ("R-lora", {"gate_weight": None}, ("gate_weight: found null",)),
    # integers
    *(
        ("R-lora", {key: value}, (f"{key}: found {value!r}"[:60],))
        for key, value in product(("bottleneck", "num_experts"), (0, -1, 1025, True, 4.0, "4", [4], HUGE))
    ),
    *(("R-lora", {key: None}, (f"{key}: found null",)) for key in NEEDED),
    *(("R-lora", {key: MISSING}, (f"{key}: missing",)) for key in NEEDED),
    *(("R-lora", {"top_k": value}, (f"top_k: found {value!r}",)) for value in (0, -1, 5, True, 2.0, "2")),
    ("E-lora", {"num_experts": MISSING}, ("num_experts: missing",)),
    # the scale
    *(("R-lora", {"alpha": v}, (f"alpha: found {v!r}",)) for v in (0, 0.0, -1, 65536.5, 70000, True, "8", [8])),
    ("R-lora", {"alpha": HUGE}, ("alpha: found 1000",)),
    ("R-lora", {"alpha": None}, ("alpha: found null",)),
    ("R-lora", {"alpha": float("nan")}, ("found NaN, which is not a JSON number", "alpha: found nan")),
    ("R-lora", {"alpha": float("inf")}, ("found Infinity, which is not a JSON number", "alpha: found inf")),
    ("R-lora", {"alpha": float("-inf")}, ("found -Infinity, which is not a JSON number", "alpha: found -inf")),
    ("R-lora", {"alpha": MISSING}, ("alpha: missing, but expert_type 'lora' needs it",)),
    ("S-parallel", {"alpha": 6.0}, ("alpha: found 6.0, but expert_type 'parallel' has no scale",)),
    ("S-lora", {"activation": "silu"}, ("activation: found 'silu', but it is for expert_type 'parallel'",)),
    # routing
    *(("R-lora", {"renormalize": v}, (f"renormalize: found {v!r}",)) for v in (0, 1, "true", [True])),
    *(
        (start, {key: value}, (f"{key}: found {value!r}, but it is for variant 'R' and this is",))
        for start in ("E-lora", "D-parallel", "S-lora")
        for key, value in (("top_k", 1), ("renormalize", False), ("gate_weight", "adapter"))
    ),
    ("R-lora", {"gate_weight": "base_slot"}, ("renormalize: found true, but gate_weight 'base_slot' needs false",)),
    ("S-lora", {"num_experts": 2}, ("num_experts: found 2, but variant 'S' has exactly 1",)),
    # layers
    ("R-lora", {"layers": []}, ("layers: found []",)),
    ("R-lora", {"layers": [1, 0]}, ("layers: found [1, 0], expected ascending",)),
    ("R-lora", {"layers": [0, 0]}, ("layers: found [0, 0], expected ascending",)),
    *(("R-lora", {"layers": value}, ("layers: found",)) for value in (0, "0", "01", {"0": 1}, True)),
    *(("R-lora", {"layers": [0, v]}, (f"layers.1: found {v!r}"[:60],)) for v in (-1, 65536, True, 1.0, "1", None)),
    ("R-lora", {"layers": [0, HUGE]}, ("layers.1: found 1000",)),
    ("R-lora", {"layers": [True]}, ("layers.0: found True",)),
    # keys nobody knows
    ("R-lora", {"extra": 1}, ("extra: unknown key",)),
    ("R-lora", {"Variant": "R"}, ("Variant: unknown key",)),
    ("R-lora", {"extra": None}, ("extra",)),
    ("R-lora", {"": 1}, ("unknown key",)),
    ("R-lora", {"x" * 5000: 1}, ("unknown key",)),
    ("R-lora", {"a\n  - forged": 1}, ("unknown key",)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("start", "changes", "expected"),
    CONFIG_CASES,
    ids=[f"{start} {changes!r:.60}" for start, changes, _ in CONFIG_CASES],
)
def test_broken_key(tmp_path: Path, start: str, changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    expect(write(tmp_path / "a", config_dict(start, **changes), good_tensors(config_dict(start))), expected)


GOOD_RAW = json.dumps(config_dict()).encode()
RAW_CASES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("adapter_config.json: not JSON",)),
    "no object": (b"[1]", ("adapter_config.json: found an array, expected an object",)),
    "null": (b"null", ("adapter_config.json: found null",)),
    "string": (b'"R"', ("adapter_config.json: found a string",)),
    "two values": (GOOD_RAW + b"{}", ("adapter_config.json: not JSON",)),
    "single quotes": (GOOD_RAW.replace(b'"', b"'"), ("adapter_config.json: not JSON",)),
    "comment": (GOOD_RAW + b"// x", ("adapter_config.json: not JSON",)),
    "trailing comma": (GOOD_RAW[:-1] + b",}", ("adapter_config.json: not JSON",)),
    "two byte order marks": (b"\xef\xbb\xbf" * 2 + GOOD_RAW, ("adapter_config.json: not JSON",)),
    "latin-1": (GOOD_RAW.replace(b"tiny", b"t\xe9ny"), ("adapter_config.json: not UTF-8",)),
    "utf-16": (GOOD_RAW.decode().encode("utf-16"), ("adapter_config.json: not UTF-8",)),
    "too large": (GOOD_RAW + b" " * 65536, ("adapter_config.json: found", )),
    "deep list": (b"[" * 30000 + b"]" * 30000, ("adapter_config.json: nested too deeply",)),
    "deep value": (GOOD_RAW[:-1] + b', "description": ' + b"[" * 9000 + b"]" * 9000 + b"}", ("nested too deeply",)),
    "duplicate key": (GOOD_RAW[:-1] + b', "bottleneck": 3}', ("duplicate key 'bottleneck'",)),
    "duplicate key, two values": (b'{"top_k": 9,' + GOOD_RAW[1:], ("duplicate key 'top_k'",)),
    "escaped duplicate": (GOOD_RAW[:-1] + b', "bottl\\u0065neck": 3}', ("duplicate key 'bottleneck'",)),
    "1e999": (GOOD_RAW.replace(b"6.0", b"1e999"), ("alpha: found inf",)),
    "5,000 digits": (GOOD_RAW.replace(b"6.0", b"9" * 5000), ("adapter_config.json: not JSON",)),
    "NaN where none belongs": (GOOD_RAW[:-1] + b', "description": NaN}', ("found NaN", "description: found")),
}  # fmt: skip


@pytest.mark.parametrize("case", RAW_CASES)
def test_broken_config_bytes(tmp_path: Path, case: str) -> None:
    raw, expected = RAW_CASES[case]
    folder = good_folder(tmp_path / "a")
    (folder / CONFIG).write_bytes(raw)
    expect(folder, expected)


def test_a_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "a")
    before, raw = read_folder(folder, BASE).digest, (folder / CONFIG).read_bytes()
    (folder / CONFIG).write_bytes(BOM + raw)
    assert read_folder(folder, BASE).digest == before
    weights_hash = sha256((folder / WEIGHTS).read_bytes()).digest()
    assert content_digest(BOM + raw, weights_hash) == before
    lora = b'{"peft_type": "LORA"}'
    assert content_digest(BOM + lora, weights_hash) == content_digest(lora, weights_hash)


METHODS = {
    "LORA": "LoRA", "IA3": "IA3", "ia3": "IA3", "PREFIX_TUNING": "prefix", "P_TUNING": "prompt", "CPT": "prompt",
    "MIXLORA": "MixLoRA", "MixLoRA": "MixLoRA", "XLORA": "X-LoRA", "X-LoRA": "X-LoRA", "ADALORA": "relative of LoRA",
    "VERA": "relative of LoRA", "OFT": "of the PEFT library", "perft": "written exactly so", "X": "not a method",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_foreign_method_is_named_first(tmp_path: Path, method: str) -> None:
    values = {"peft_type": method, "r": 8, "target_modules": ["q_proj"], "layers": [1, 0], "num_experts": "x"}
    folder = write(tmp_path / "a", values, {"base_model.q_proj.lora_A.weight": torch.full((2, 2), float("nan"))})
    (folder / "README.md").write_bytes(b"x" * 70000)
    _, violations = check_folder(folder, BASE)
    assert violations[0].startswith(f"peft_type: found {method!r}") and METHODS[method] in violations[0]
    assert "'PERFT'" in violations[0] and len(violations) > 5
    assert any(v.startswith("target_modules: unknown key") for v in violations)
    assert sum("peft_type" in v.split(":")[0] for v in violations) == 1


@pytest.mark.parametrize("found", [None, MISSING, 7, ["LORA"]])
def test_a_type_that_is_none_is_named_first_too(tmp_path: Path, found: Any) -> None:
    _, violations = check_folder(write(tmp_path / "a", config_dict(peft_type=found, top_k=9, x=1), {}), BASE)
    assert violations[0].startswith("peft_type: ")


@pytest.mark.parametrize(
    "changes", [{"\ud800": 1}, {"base_model_name_or_path": "\ud800"}, {"description": "\udfff"}, {"variant": "\udc00"}]
)
def test_strings_that_are_no_unicode(tmp_path: Path, changes: dict[str, Any]) -> None:
    """JSON can write half of a surrogate pair; nothing that holds one can be sent or written again."""
    _, violations = check_folder(write(tmp_path / "a", config_dict(**changes), good_tensors(config_dict())), BASE)
    assert violations and all(violation.encode() for violation in violations)


@pytest.mark.parametrize("depth", range(900, 1001, 4))
def test_any_depth_is_answered(tmp_path: Path, depth: int) -> None:
    """Around Python's recursion limit, where reading may still succeed and quoting the value no longer does."""
    folder = good_folder(tmp_path / "a")
    (folder / CONFIG).write_bytes(GOOD_RAW[:-1] + b', "description": ' + b"[" * depth + b"]" * depth + b"}")
    with pytest.raises(InvalidAdapterError) as caught:
        read_folder(folder, BASE)
    assert len(caught.value.violations) == 1


LIST_BASE = replace(BASE, embedded_problem="its experts are grouped")
BASE_CASES: list[tuple[str, dict[str, Any], BaseShape, Limits, tuple[str, ...]]] = [
    ("E-lora", {"num_experts": 5}, BASE, Limits(), ("num_experts: found 5, expected 4: variant 'E'",)),
    ("E-lora", {}, LIST_BASE, Limits(), ("variant: found 'E', which is not served on this base: its experts",)),
    ("R-lora", {"renormalize": False, "gate_weight": "base_slot", "top_k": 3}, BASE, Limits(),
     ("top_k: found 3, 'base_slot' needs at most the base's top-k 2",)),
    ("S-lora", {"layers": [0, 5]}, BASE, Limits(), ("layers: found 5, the base has layers 0 to 4",)),
    ("S-lora", {"layers": [0, 2]}, BASE, Limits(), ("layers: found 2, which is not an MoE layer of the base",)),
    ("S-lora", {"layers": [2, 4, 9]}, BASE, Limits(), ("layers: found 2", "layers: found 4", "layers: found 9")),
    ("D-lora", {"base_fingerprint": "b" * 64}, BASE, Limits(), ("base_fingerprint: found bbbb",)),
    ("D-lora", {}, BASE, Limits(max_weights_bytes=100), ("adapter_model.safetensors: found",)),
]  # fmt: skip


@pytest.mark.parametrize(("start", "changes", "base", "limits", "expected"), BASE_CASES)
def test_does_not_fit_the_base(
    tmp_path: Path, start: str, changes: dict[str, Any], base: BaseShape, limits: Limits, expected: tuple[str, ...]
) -> None:
    expect(good_folder(tmp_path / "a", start, **changes), expected, base, limits)


def _link(name: str) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return mutate


def _as_folder(name: str) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return mutate


def _add(name: str, size: int = 1) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"x" * size)


def _dangling(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to("nowhere")


FILE_CASES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), ("adapter_config.json: missing",)),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ("adapter_model.safetensors: missing",)),
    "extra file": (_add("tokenizer.json"), ("tokenizer.json: not part of an adapter",)),
    "pickle": (_add("adapter_model.bin"), ("adapter_model.bin: not part of an adapter",)),
    "hidden file": (_add(".gitattributes"), (".gitattributes: not part of an adapter",)),
    "readme of other case": (_add("readme.md"), ("readme.md: not part of an adapter",)),
    "file name with a newline": (_add("a\n  - forged"), ("not part of an adapter",)),
    "file name that is no UTF-8": (_add(os.fsdecode(b"\xff.bin")), ("not part of an adapter",)),
    "subfolder": (lambda f: (f / "deeper").mkdir(), ("deeper: not part of an adapter",)),
    "config is a folder": (_as_folder(CONFIG), ("adapter_config.json: found a link, folder or device",)),
    "weights are a folder": (_as_folder(WEIGHTS), ("adapter_model.safetensors: found a link, folder or device",)),
    "linked config": (_link(CONFIG), ("adapter_config.json: found a link",)),
    "linked weights": (_link(WEIGHTS), ("adapter_model.safetensors: found a link",)),
    "README is a link": (_dangling("README.md"), ("README.md: found a link",)),
    "README is a folder": (lambda f: (f / "README.md").mkdir(), ("README.md: found a link, folder",)),
    "README is a pipe": (lambda f: os.mkfifo(f / "README.md"), ("README.md: found a link, folder or device",)),
    "README too big": (_add("README.md", 65537), ("README.md: found 65537 bytes, expected at most 65536",)),
}


@pytest.mark.parametrize("case", FILE_CASES)
def test_broken_files(tmp_path: Path, case: str) -> None:
    mutate, expected = FILE_CASES[case]
    folder = good_folder(tmp_path / "a")
    mutate(folder)
    expect(folder, expected)


def handed_in(folder: Path) -> tuple[Path, str, list[str]]:
    """What `check_handed_in` says: the folder (relative to the one given), its notes as one text, the violations."""
    found, violations = check_handed_in(folder, BASE)
    assert all(text.isprintable() for text in (*found.notes, *violations))
    return found.folder.relative_to(folder), " | ".join(found.notes), violations


def test_a_trainers_folder_may_be_handed_in(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "out")
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "tokenizer.json",
        "a\n - forged",
        ".DS_Store",
        "._x",
        "README.md",
    ):
        (folder / name).write_bytes(b"x")
    (folder / "latest").symlink_to("/etc/passwd")
    for name in ("checkpoint-500", "checkpoint-1000"):
        good_folder(folder / name)
    where, notes, violations = handed_in(folder)
    assert (where, violations) == (Path("."), [])
    for name in ("optimizer.pt", "training_args.bin", "checkpoint-500/", "README.md", "latest", "a\\n - forged"):
        assert name in notes
    assert ".DS_Store" not in notes and "._x" not in notes


def test_an_adapter_in_the_one_subfolder_that_has_one_is_found(tmp_path: Path) -> None:
    (tmp_path / "out" / "a").mkdir(parents=True)
    good_folder(tmp_path / "out" / "a" / "poet")
    assert handed_in(tmp_path / "out")[0::2] == (Path("a/poet"), [])
    (tmp_path / "out" / "a" / "runs").mkdir()
    (tmp_path / "out" / "a" / "trainer_state.json").write_text("{}")
    where, notes, violations = handed_in(tmp_path / "out")
    assert (where, violations) == (Path("a/poet"), []) and "poet/: the adapter was found in this subfolder" in notes
    good_folder(tmp_path / "out" / "a" / "clerk")
    assert "found adapters in several subfolders (clerk/, poet/): name one of them" in handed_in(tmp_path / "out")[2]


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "lora.pt", "Adapter_Model.BIN", "x.ckpt"])
def test_a_pickle_beside_an_adapter_is_noted_and_never_opened(tmp_path: Path, name: str) -> None:
    folder = good_folder(tmp_path / "a")
    (folder / name).symlink_to(folder / name)  # to open it fails
    _, notes, violations = handed_in(folder)
    assert name in notes and not violations
    (folder / WEIGHTS).unlink()
    first, second = sorted(handed_in(folder)[2], key=lambda text: text.startswith(name))
    assert first == f"{WEIGHTS}: missing"
    assert second.startswith(f"{name}: the weights must be in {WEIGHTS}; this is a pickle") and "convert it" in second


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model-00001-of-00002.safetensors", "x.gguf"])
def test_more_weights_beside_an_adapter_are_a_violation(tmp_path: Path, name: str) -> None:
    folder = good_folder(tmp_path / "a")
    (folder / name).write_bytes(b"\x80\x02")
    (violation,) = handed_in(folder)[2]
    assert violation.startswith(f"{name}: not part of an adapter, but looks like more weights")
    (folder / WEIGHTS).unlink()
    found = handed_in(folder)[2]
    assert f"{WEIGHTS}: missing" in found and any(text.startswith(f"{name}: the weights must be ") for text in found)


def test_a_path_in_place_of_its_file_is_recognized() -> None:
    found = recognized(b"w/top.zip")
    assert found is not None and found.kind == "text"
    assert "text ('w/top.zip')" in found.text and "a path that curl sends as it is without @ before it" in found.text


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("x")], ids=["nothing", "file"])
def test_no_folder(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "a")
    expect(tmp_path / "a", ("found no folder at",))


def test_the_size_of_a_config_that_is_too_large_is_the_true_one(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "a")
    (folder / CONFIG).write_bytes(GOOD_RAW + b" " * 200_000)
    expect(folder, (f"{len(GOOD_RAW) + 200_000} bytes, expected at most 65536",))


def _poke(name: str, value: float) -> Callable[[Tensors], Tensors]:
    def mutate(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[3] = value
        return tensors

    return mutate


def _set(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensor}


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


HALF, BRAIN = replace(BASE, dtype=torch.float16), replace(BASE, dtype=torch.bfloat16)
UP, DOWN, ROUTER = "layers.1.up_proj", "layers.1.down_proj", "layers.1.router"
TENSOR_CASES: dict[str, tuple[BaseShape, Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "missing router": (BASE, _without(ROUTER), (f"{ROUTER}: missing, expected shape [4, 8]",)),
    "missing down": (BASE, _without(DOWN), (f"{DOWN}: missing, expected shape [4, 3, 8]",)),
    "missing up": (BASE, _without(UP), (f"{UP}: missing, expected shape [4, 8, 3]",)),
    "all missing": (BASE, lambda t: {}, (": missing, expected shape",) * 9),
    "extra name": (BASE, _set("layers.1.bias", torch.zeros(4)), ("layers.1.bias: this tensor is not part",)),
    "extra empty": (BASE, _set("x", torch.zeros(0)), ("x: this tensor is not part",)),
    "no MoE layer": (BASE, _set("layers.2.up_proj", torch.zeros(4, 8, 3)), ("layers.2.up_proj: this tensor is not",)),
    "layer as 01": (BASE, _set("layers.01.router", torch.zeros(4, 8)), ("layers.01.router: this tensor is not",)),
    "name with a newline": (BASE, _set("a\n  - forged", torch.zeros(1)), ("this tensor is not part",)),
    "up as down": (BASE, _set(UP, torch.zeros(4, 3, 8)), (f"{UP}: found shape [4, 3, 8], expected [4, 8, 3]",)),
    "flat": (BASE, _set(DOWN, torch.zeros(12, 8)), (f"{DOWN}: found shape [12, 8]",)),
    "other width": (BASE, _set(ROUTER, torch.zeros(4, 9)), (f"{ROUTER}: found shape [4, 9]",)),
    "one expert less": (BASE, _set(ROUTER, torch.zeros(3, 8)), (f"{ROUTER}: found shape [3, 8]",)),
    "scalar": (BASE, _set(ROUTER, torch.tensor(1.0)), (f"{ROUTER}: found shape []",)),
    **{
        str(dtype): (BASE, _set(DOWN, torch.zeros(4, 3, 8, dtype=dtype)), (f"{DOWN}: found dtype {name}",))
        for dtype, name in ((torch.int8, "I8"), (torch.float64, "F64"), (torch.int64, "I64"), (torch.bool, "BOOL"),
                            (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2"))
    },
    "NaN": (BASE, _poke(DOWN, float("nan")), (f"{DOWN}: 1 of 96 values are not finite",)),
    "inf": (BASE, _poke(ROUTER, float("inf")), (f"{ROUTER}: 1 of 32 values are not finite",)),
    "-inf": (BASE, _poke(UP, float("-inf")), (f"{UP}: 1 of 96 values are not finite",)),
    "overflow in float16": (HALF, _poke(DOWN, -70000.0), (f"{DOWN}: found values up to 7e+04, which overflow",)),
    "overflow in bfloat16": (BRAIN, _poke(ROUTER, 3.4028e38), (f"{ROUTER}: found values up to 3.4e+38",)),
    "overflow after scale": (HALF, _poke(UP, 40000.0), ("dtype torch.float16 once multiplied by the scale 2",)),
    "overflow of float32 after scale": (BASE, _poke(UP, 3e38), ("dtype torch.float32 once multiplied by the scale 2",)),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_broken_tensors(tmp_path: Path, case: str) -> None:
    base, mutate, expected = TENSOR_CASES[case]
    folder = write(tmp_path / "a", config_dict(), mutate(good_tensors(config_dict())))
    expect(folder, expected, base)


@pytest.mark.parametrize(("base", "name"), [(HALF, DOWN), (HALF, ROUTER), (BASE, DOWN)])
def test_only_up_proj_is_scaled(tmp_path: Path, base: BaseShape, name: str) -> None:
    """What is finite before `scale` passes where `scale` does not apply."""
    value = 40000.0 if base.dtype == torch.float16 else 3e38
    read_folder(write(tmp_path / "a", config_dict(), _poke(name, value)(good_tensors(config_dict()))), base)


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Rewrite the JSON header of a safetensors file."""

    def mutate(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return mutate


def _unsafe_header(text: bytes) -> Callable[[bytes], bytes]:
    return lambda data: struct.pack("<Q", len(text)) + text


UNREADABLE: dict[str, Callable[[bytes], bytes]] = {
    "empty file": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "truncated": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "one byte more": lambda data: data + b"\0",
    "header longer than the file": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "header of no JSON": lambda data: data[:8] + b"\xff" * 64 + data[72:],
    "header is a list": _unsafe_header(b"[1]"),
    "pickle": lambda data: b"\x80\x04" + data[2:],
    "zip": lambda data: b"PK\x03\x04" + data[4:],
    "unknown dtype": _header(lambda h: h[UP].update(dtype="F37")),
    "offsets past the end": _header(lambda h: h[UP].update(data_offsets=[0, 2**40])),
    "offsets backwards": _header(lambda h: h[UP]["data_offsets"].reverse()),
    "overlapping": _header(lambda h: h[UP].update(data_offsets=h[DOWN]["data_offsets"])),
    "size against the shape": _header(lambda h: h[UP].update(shape=[4, 8, 4])),
    "negative shape": _header(lambda h: h[UP].update(shape=[-4, -8, 3])),
    "shape that overflows": _header(lambda h: h[UP].update(shape=[2**62, 2**62, 3])),
    "metadata that is no string": _header(lambda h: h.update(__metadata__={"a": 1})),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_weights(tmp_path: Path, case: str) -> None:
    folder = good_folder(tmp_path / "a")
    (folder / WEIGHTS).write_bytes(UNREADABLE[case]((folder / WEIGHTS).read_bytes()))
    expect(folder, ("adapter_model.safetensors: not a readable safetensors file",))


@pytest.mark.parametrize(("length", "allowed"), [(16 * 1024 - 1, True), (16 * 1024, False)])
def test_metadata_limit(tmp_path: Path, length: int, allowed: bool) -> None:
    """16 KiB in all, keys and values; the key here is one byte."""
    folder = write(tmp_path / "a", config_dict(), good_tensors(config_dict()), {"k": "x" * length})
    if allowed:
        read_folder(folder, BASE)
    else:
        expect(folder, ("__metadata__: found 16385 bytes, expected at most 16384",))


def test_all_violations_of_an_unsound_config_at_once(tmp_path: Path) -> None:
    values = config_dict(alpha=MISSING, bottleneck=True, top_k=9, layers=[1, 0], extra=1, description=None)
    tensors = good_tensors(config_dict()) | {"layers.0.router": torch.full((4, 8), float("nan"))}
    tensors |= {"layers.1.router": torch.zeros(4, 8, dtype=torch.int8)}
    folder = write(tmp_path / "a", values, tensors, {"k": "x" * 20000})
    (folder / "README.md").write_bytes(b"x" * 70000)
    (folder / "run.py").write_text("")
    expected: tuple[str, ...] = (
        "alpha: missing",
        "bottleneck: found True",
        "top_k: found 9",
        "layers: found [1, 0]",
        "extra: unknown",
    )
    expected += ("description: found null", "layers.0.router: 32 of 32", "layers.1.router: found dtype I8")
    expect(folder, (*expected, "__metadata__: found", "README.md: found 70000", "run.py: not part"))


def test_all_violations_against_the_base_at_once(tmp_path: Path) -> None:
    values = config_dict("E-lora", num_experts=5, layers=[0, 1, 2, 9], base_fingerprint="b" * 64)
    tensors = good_tensors(values) | {"layers.0.up_proj": torch.zeros(5, 8, 4), "other": torch.zeros(1)}
    tensors["layers.1.up_proj"][0, 0, 0] = torch.inf
    del tensors["layers.0.down_proj"]
    folder = write(tmp_path / "a", values, tensors)
    expected: tuple[str, ...] = (
        "num_experts: found 5",
        "variant: found 'E'",
        "layers: found 2",
        "layers: found 9",
        "base_fingerprint",
    )
    expected += (
        "layers.0.up_proj: found shape",
        "other: this tensor",
        "layers.1.up_proj: 1 of",
        "layers.0.down_proj: mi",
    )
    expect(folder, expected, LIST_BASE)


STARTS = [f"{variant}-{expert_type}" for variant, expert_type in product(_VARIANTS, _TYPES)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(("start", "dtype", "readme"), list(product(STARTS, DTYPES, (False, True))))
def test_good_folder(tmp_path: Path, start: str, dtype: torch.dtype, readme: bool) -> None:
    values = config_dict(start)
    tensors = good_tensors(values, dtype)
    folder = write(tmp_path / "a", values, tensors, {"format": "pt"})
    if readme:
        (folder / "README.md").write_bytes(b"\xff" * 65536)
    assert check_folder(folder, None)[1] == []
    adapter = read_folder(folder, BASE)
    assert {key: getattr(adapter.config, key) for key in values} == values
    layers = adapter.layer_weights(BRAIN)
    assert tuple(layers) == BASE.moe_layers
    for layer, weights in layers.items():
        for name in ("router", "down_proj", "up_proj"):
            tensor, found = tensors.get(f"layers.{layer}.{name}"), getattr(weights, name)
            assert (tensor is None) == (found is None)
            assert tensor is None or torch.equal(found, tensor.to(torch.bfloat16))


EDGES: list[tuple[str, dict[str, Any]]] = [
    ("R-lora", {"bottleneck": 1, "num_experts": 1, "top_k": 1}),
    ("R-lora", {"num_experts": 1024, "top_k": 1024, "bottleneck": 1}),
    ("S-lora", {"bottleneck": 1024, "alpha": 65536}),
    ("S-lora", {"alpha": 1e-30}),
    ("S-lora", {"layers": [3]}),
    ("S-lora", {"layers": [0, 1, 3]}),
    ("S-lora", {"layers": None, "base_fingerprint": None}),
    ("S-lora", {"base_fingerprint": "a" * 64}),
    ("S-lora", {"description": "x" * 1024}),
    ("S-lora", {"description": "", "base_model_name_or_path": ""}),
    ("S-lora", {"description": "ü\n\t\u4e2d"}),
    ("R-parallel", {"renormalize": False, "gate_weight": "base_slot"}),
    ("R-parallel", {"gate_weight": "adapter"}),
    ("D-parallel", {"activation": MISSING}),
    ("D-parallel", {"num_experts": 1}),
]


@pytest.mark.parametrize(("start", "changes"), EDGES)
def test_the_edges_are_allowed(tmp_path: Path, start: str, changes: dict[str, Any]) -> None:
    read_folder(good_folder(tmp_path / "a", start, **changes), BASE)


def test_float_types_may_be_mixed(tmp_path: Path) -> None:
    tensors = good_tensors(config_dict())
    for tensor_name, dtype in zip(tensors, DTYPES * 3, strict=True):
        tensors[tensor_name] = tensors[tensor_name].to(dtype)
    read_folder(write(tmp_path / "a", config_dict(), tensors), BASE)


@pytest.mark.parametrize(
    ("base", "limits"), [(BASE, Limits(allow_other_base=True)), (replace(BASE, fingerprint=None), Limits())]
)
def test_another_base_can_be_allowed(tmp_path: Path, base: BaseShape, limits: Limits) -> None:
    read_folder(good_folder(tmp_path / "a", base_fingerprint="b" * 64), base, limits)


def test_a_folder_without_a_config_has_a_violation(tmp_path: Path) -> None:
    """`check_folder` never gives nothing at all; a config beside violations is what was sound of it."""
    for index, (start, changes, _) in enumerate(CONFIG_CASES):
        values = config_dict(start, **changes)
        config, violations = check_folder(write(tmp_path / str(index), values, {}), None)
        assert config is not None or violations, changes


DOWNS = ("layers.0.down_proj", "layers.1.down_proj")
HIDING_CASES: list[tuple[str, dict[str, Any], str]] = [
    ("R-lora", {"alpha": 0}, "alpha: found 0"),
    ("R-lora", {"alpha": MISSING}, "alpha: missing"),
    ("R-lora", {"activation": "silu"}, "activation: found 'silu', but it is for"),
    ("S-parallel", {"alpha": 1.0}, "alpha: found 1.0, but"),
    ("S-parallel", {"activation": "swish"}, "activation: found 'swish'"),
    ("R-lora", {"expert_type": "LoRA"}, "expert_type: found 'LoRA'"),
    ("R-lora", {"expert_type": MISSING}, "expert_type: missing"),
    ("R-lora", {"renormalize": 1}, "renormalize: found 1"),
    ("R-lora", {"renormalize": MISSING}, "renormalize: missing"),
    ("R-lora", {"gate_weight": "base"}, "gate_weight: found 'base'"),
    ("R-lora", {"gate_weight": "base_slot"}, "renormalize: found true, but"),
    ("R-lora", {"top_k": 0}, "top_k: found 0"),
    ("R-lora", {"top_k": 9}, "top_k: found 9"),
    ("R-lora", {"top_k": MISSING}, "top_k: missing"),
    ("D-lora", {"top_k": 1}, "top_k: found 1, but it is for variant 'R'"),
    ("S-lora", {"num_experts": 2}, "num_experts: found 2, but variant 'S'"),
    ("S-lora", {"num_experts": "1"}, "num_experts: found '1'"),
    ("S-lora", {"num_experts": MISSING}, "num_experts: missing"),
]


@pytest.mark.parametrize(("start", "changes", "named"), HIDING_CASES)
def test_a_broken_key_that_no_shape_depends_on_hides_no_broken_tensor(
    tmp_path: Path, start: str, changes: dict[str, Any], named: str
) -> None:
    """Nor does it hide that the adapter does not fit the base; and nothing is said that is not so."""
    values = config_dict(start, layers=[0, 1, 7], base_fingerprint="b" * 64) | changes
    tensors = good_tensors(config_dict(start, layers=[0, 1])) | {name: torch.zeros(1) for name in DOWNS}
    tensors |= {"layers.0.up_proj": torch.zeros(2), "layers.1.up_proj": torch.zeros(2)}
    folder = write(tmp_path / "a", {k: v for k, v in values.items() if v is not MISSING}, tensors)
    shapes = tuple(f"layers.{layer}.{name}: found shape" for layer in (0, 1) for name in ("down_proj", "up_proj"))
    expect(folder, (named, *shapes, "layers: found 7", "base_fingerprint: found bbbb"))


def test_alpha_0_hides_no_wrong_shape(tmp_path: Path) -> None:
    tensors = good_tensors(config_dict(layers=[0, 1]))
    tensors |= {f"layers.{layer}.{name}": torch.zeros(2, 2) for layer in (0, 1) for name in ("router", "up_proj")}
    folder = write(tmp_path / "a", config_dict(alpha=0, layers=[0, 1]), tensors)
    expect(folder, ("alpha: found 0", *(f"layers.{i}.{n}: found shape" for i in (0, 1) for n in ("router", "up_proj"))))


def test_an_unknown_key_hides_no_broken_tensor(tmp_path: Path) -> None:
    values = config_dict("R-lora", unknown=1, description=5)
    tensors = good_tensors(config_dict("R-lora"))
    name = next(iter(tensors))
    tensors[f"{name}_more"] = tensors.pop(name)
    _, violations = check_folder(write(tmp_path / "a", values, tensors), BASE)
    for part in ("unknown: unknown key", "description: found 5", f"{name}: missing", f"{name}_more: "):
        assert any(part in violation for violation in violations), part


def test_identity_vector() -> None:
    vector = json.loads((VECTORS / "identity.json").read_text())
    shapes = load_file(VECTORS / "identity" / WEIGHTS)
    base = replace(BASE, hidden_size=shapes["layers.0.router"].shape[1], moe_layers=(0,), num_layers=1)
    adapter = read_folder(VECTORS / "identity", base)
    assert adapter.config.canonical_json().decode() == vector["canonical_config"]
    assert adapter.digest == vector["digest"]


def digest(folder: Path, values: dict[str, Any], tensors: Tensors | None = None) -> str:
    folder = write(folder, values, tensors or good_tensors(values))
    return read_folder(folder, BASE).digest


SAME: list[tuple[str, dict[str, Any]]] = [
    ("R-lora", {"description": "other words"}),
    ("R-lora", {"base_model_name_or_path": "other/name"}),
    ("R-lora", {"base_fingerprint": "a" * 64}),
    ("R-lora", {"gate_weight": "adapter"}),
    ("R-lora", {"alpha": 6}),
    ("R-lora", {"layers": None}),
]


@pytest.mark.parametrize(("start", "changes"), SAME)
def test_what_does_not_change_the_identity(tmp_path: Path, start: str, changes: dict[str, Any]) -> None:
    assert digest(tmp_path / "a", config_dict(start)) == digest(tmp_path / "b", config_dict(start, **changes))


def test_the_default_activation_is_silu(tmp_path: Path) -> None:
    default, silu = config_dict("S-parallel", activation=MISSING), config_dict("S-parallel", activation="silu")
    assert digest(tmp_path / "a", default) == digest(tmp_path / "b", silu)


def test_layout_of_the_config_and_readme_do_not_change_the_identity(tmp_path: Path) -> None:
    first, second = good_folder(tmp_path / "a"), good_folder(tmp_path / "b")
    turned = dict(reversed(config_dict().items()))
    (second / CONFIG).write_text(json.dumps(turned, indent=7).replace("PERFT", "\\u0050ERFT"))
    (second / "README.md").write_text("read me")
    assert read_folder(first, BASE).digest == read_folder(second, BASE).digest


DIFFERENT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("R-lora", {}, {"alpha": 6.000001}),
    ("R-lora", {}, {"top_k": 1}),
    ("R-lora", {}, {"renormalize": False}),
    ("R-lora", {"renormalize": False}, {"renormalize": False, "gate_weight": "base_slot"}),
    ("R-lora", {}, {"num_experts": 5}),
    ("R-lora", {}, {"bottleneck": 4}),
    ("R-lora", {}, {"layers": [0, 1, 3]}),
    ("R-lora", {"layers": [0]}, {"layers": [1]}),
    ("S-parallel", {"activation": "relu"}, {"activation": "gelu"}),
    ("D-parallel", {"num_experts": 1}, {"num_experts": 1, "variant": "S"}),
    ("D-parallel", {"num_experts": 4}, {"num_experts": 4, "variant": "E"}),
    ("S-lora", {}, {"expert_type": "parallel", "alpha": MISSING, "activation": "silu"}),
]


@pytest.mark.parametrize(("start", "first", "second"), DIFFERENT)
def test_what_changes_the_identity(
    tmp_path: Path, start: str, first: dict[str, Any], second: dict[str, Any]
) -> None:  # fmt: skip
    """Over the same weights file, so it is the configuration alone that differs."""
    weights = good_folder(tmp_path / "a") / WEIGHTS
    one, two = (AdapterConfig.model_validate(config_dict(start, **changes)) for changes in (first, second))
    digests = {digest_of(config.canonical_json(), file_hash(weights)) for config in (one, two)}
    assert len(digests) == 2


def test_one_bit_of_the_weights_changes_the_identity(tmp_path: Path) -> None:
    meaning = AdapterConfig.model_validate(config_dict()).canonical_json()
    weights = good_folder(tmp_path / "a") / WEIGHTS
    data = bytearray(weights.read_bytes())
    before = digest_of(meaning, file_hash(weights))
    for position in (0, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[position] ^= 1
        weights.write_bytes(changed)
        assert digest_of(meaning, file_hash(weights)) != before
    weights.write_bytes(data)
    inner = sha256(meaning).digest() + sha256(data).digest()
    assert read_folder(weights.parent, BASE).digest == before == sha256(inner).hexdigest()


class CountedFile(io.FileIO):
    """A file that counts the bytes read from it, by path."""

    counts: ClassVar[Counter[str]] = Counter()

    def readinto(self, buffer: Any, /) -> int:
        read = super().readinto(buffer) or 0
        self.counts[str(self.name)] += read
        return read


def large_folder(folder: Path) -> Path:
    """An adapter whose tensors end neither at a block's end nor at a multiple of a buffer."""
    values = config_dict("S-lora", bottleneck=701, layers=[0])
    shape = (1, 701, WIDE.hidden_size)
    tensors = {"layers.0.down_proj": torch.ones(shape), "layers.0.up_proj": torch.ones(1, shape[2], shape[1]).half()}
    return write(folder, values, tensors)


WIDE = replace(BASE, hidden_size=3001)


def test_an_upload_is_read_once_and_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than a block. The library maps the file besides, to parse its header."""
    folder = large_folder(tmp_path / "a")
    size = (folder / WEIGHTS).stat().st_size
    assert size > 2 * BLOCK_BYTES
    expected = sha256((folder / WEIGHTS).read_bytes()).digest()
    monkeypatch.setattr(Path, "open", lambda path, mode="r", *_: io.BufferedReader(CountedFile(path)))
    tracemalloc.start()
    try:
        adapter = read_folder(folder, WIDE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert CountedFile.counts[str(folder / WEIGHTS)] == size
    assert peak < 1.5 * BLOCK_BYTES
    assert adapter.digest == digest_of(adapter.config.canonical_json(), expected)


@pytest.mark.parametrize("where", [0, BLOCK_BYTES // 4 - 1, BLOCK_BYTES // 4, -1])
def test_a_value_in_any_block_counts(tmp_path: Path, where: int) -> None:
    folder = large_folder(tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    tensors["layers.0.down_proj"].view(-1)[where] = torch.nan
    tensors["layers.0.up_proj"].view(-1)[where] = torch.inf
    save_file(tensors, folder / WEIGHTS)
    expect(folder, ("layers.0.down_proj: 1 of 2103701 values", "layers.0.up_proj: 1 of 2103701 values"), WIDE)


def test_weights_that_get_shorter_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = large_folder(tmp_path / "a")

    def cut_off(*arguments: Any) -> Any:
        with (folder / WEIGHTS).open("r+b") as file:
            file.truncate((folder / WEIGHTS).stat().st_size - 100)
        return read_values(*arguments)

    monkeypatch.setattr("adapters.format.weights.read_values", cut_off)
    expect(folder, ("the file became shorter while it was read",), WIDE)
