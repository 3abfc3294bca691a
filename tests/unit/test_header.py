"""The header of a safetensors file: sound ones pass, unsound ones are refused by the library or by us."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from adapters.format.header import TensorEntry, UnreadableWeightsError, read_header

Header = dict[str, Any]
SOUND: Header = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "F16", "shape": [3], "data_offsets": [16, 22]},
    "empty": {"dtype": "BF16", "shape": [0, 7], "data_offsets": [22, 22]},
    "scalar": {"dtype": "U8", "shape": [], "data_offsets": [22, 23]},
}


def write(path: Path, header: Header | bytes, data: bytes = bytes(23)) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def header_problem(path: Path, *limits: int) -> str | None:
    """Why the header of the file at `path` is refused; None if it is not."""
    try:
        with path.open("rb") as file:
            read_header(file, *limits)
    except UnreadableWeightsError as error:
        return str(error)
    return None


def changed(**entry: Any) -> Header:
    """The sound header with keys of tensor `b` replaced."""
    return SOUND | {"b": SOUND["b"] | entry}


def test_a_sound_header(tmp_path: Path) -> None:
    assert header_problem(write(tmp_path / "w", SOUND)) is None
    assert header_problem(write(tmp_path / "w", SOUND | {"__metadata__": {"format": "pt"}})) is None
    assert header_problem(write(tmp_path / "w", json.dumps(SOUND).encode() + b"   ")) is None


TORCH_TYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
def test_what_the_library_writes_is_sound(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"t{i}": torch.zeros(i, i + 1).to(dtype) for i in range(5)}
    save_file(tensors, tmp_path / "w", {"k": "v"})
    assert header_problem(tmp_path / "w") is None


UNSOUND: dict[str, tuple[Header | bytes, str]] = {
    "dtype": (changed(dtype="F37"), "unknown variant `F37`"),
    "offsets and shape": (changed(shape=[-3], data_offsets=[22, 16]), "invalid value"),
    "all three": (changed(dtype=7, shape=None, data_offsets=[1]), "invalid type: integer `7`"),
    "an empty entry": (changed(shape=[4]) | {"a": {}}, "missing field `dtype`"),
    "metadata": (SOUND | {"__metadata__": 1}, "invalid type: integer `1`"),
    "metadata of numbers": (SOUND | {"__metadata__": {"a": 1}}, "invalid type: integer `1`, expected a string"),
    "metadata that is null": (SOUND | {"__metadata__": None}, "found null, expected an object of strings"),
    "metadata twice": (b'{"__metadata__": {}, "__metadata__": {}}', "duplicate field `__metadata__`"),
    "overlap and gap": (changed(data_offsets=[10, 16]), "invalid offset for tensor `b`"),
    "gap at the start": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [22, 23]}}, "invalid offset"),
    "bytes at the end": ({"a": SOUND["a"]}, "file not fully covered"),
    "outside": (changed(data_offsets=[18, 24]), "invalid offset"),
    "bool offsets": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, "invalid type: boolean"),
    "float shape": (changed(shape=[3.0]), "invalid type: floating point"),
    "one bit too few": ({"a": {"dtype": "F4", "shape": [45], "data_offsets": [0, 23]}}, "subbytes"),
    "overflow hidden by a zero": (changed(shape=[2**64, 0], data_offsets=[16, 16]), "invalid type: floating point"),
    "a long name": ({"x" * 5000: {"dtype": "F32"}}, "missing field `shape`"),
    "a long name in the wrong place": ({"x" * 5000: SOUND["b"]}, "invalid offset for tensor `xxx"),
    "key more": (changed(stride=[1]), "b: found {'dtype': 'F16', 'shape': [3]"),
    "a list": (SOUND | {"b": ["F16", [3], [16, 22]]}, "b: found ['F16', [3], [16, 22]], expected an object of dtype"),
    "dtype in an object": (changed(dtype={"F16": None}), "expected an object of dtype, shape and data_offsets"),
    "list": (b"[]", "expected struct HashMetadata"),
    "space first": (b" " + json.dumps(SOUND).encode(), "does not begin with '{'"),
    "deep": (b'{"a":' * 20_000, "recursion limit"),
    "duplicates": (
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {"dtype": "U8", "shape": [23], '
        b'"data_offsets": [0, 23]}, "__metadata__": {"c": "1", "c": "2"}}',
        "duplicate key 'c': keep one of them; the header: duplicate key 'a'",
    ),
    "NaN": (b'{"a": NaN}', "expected value"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "number out of range"),
    "half a surrogate pair": (b'{"\\ud800": {"dtype": "U8", "shape": [23], "data_offsets": [0, 23]}}', "hex escape"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSOUND)
def test_an_unsound_header_is_one_violation(tmp_path: Path, case: str) -> None:
    header, expected = UNSOUND[case]
    problem = header_problem(write(tmp_path / "w", header))
    assert problem is not None and expected in problem and len(problem) < 400, problem


def test_every_strange_entry_is_named(tmp_path: Path) -> None:
    strange = {name: entry | {"more": 1} for name, entry in SOUND.items()}
    problem = header_problem(write(tmp_path / "w", strange))
    assert problem is not None and all(f"{name}: found" in problem for name in SOUND)


def test_the_tensors_come_in_the_order_of_their_data(tmp_path: Path) -> None:
    path = write(tmp_path / "w", dict(reversed(SOUND.items())) | {"__metadata__": {"k": "v"}})
    with path.open("rb") as file:
        header = read_header(file)
        assert file.tell() == len(header.raw) == path.stat().st_size - 23
    assert header.metadata == {"k": "v"}
    assert header.tensors == (
        TensorEntry("a", "F32", (2, 2), 16),
        TensorEntry("b", "F16", (3,), 6),
        TensorEntry("empty", "BF16", (0, 7), 0),
        TensorEntry("scalar", "U8", (), 1),
    )


@pytest.mark.parametrize(("allowed", "limits"), [(True, (1000, 4)), (False, (300, 4)), (False, (1000, 3))])
def test_the_limits_are_the_callers(tmp_path: Path, allowed: bool, limits: tuple[int, int]) -> None:
    path = write(tmp_path / "w", json.dumps(SOUND).encode().ljust(301))
    assert (header_problem(path, *limits) is None) is allowed


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    """A sparse file of 8 GB that says it is all header."""
    path = tmp_path / "w"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 8 * 1024**3))
        file.truncate(8 + 8 * 1024**3)
    problem = header_problem(path)
    assert problem is not None and "the header's length is 8589934592, expected at most 1048576" in problem


def mutations(random_source: random.Random) -> list[Callable[[bytearray], object]]:
    """Ways to spoil a file."""

    def at(raw: bytearray) -> int:
        return random_source.randrange(min(len(raw), 400))

    def flip(raw: bytearray) -> None:
        raw[at(raw)] ^= 1 << random_source.randrange(8)

    def digit(raw: bytearray) -> None:
        places = [i for i, byte in enumerate(raw[8:400], 8) if chr(byte).isdigit()]
        raw[random_source.choice(places)] = random_source.choice(b"0123456789")

    def drop(raw: bytearray) -> None:
        del raw[at(raw)]

    def repeat(raw: bytearray) -> None:
        begin = at(raw)
        raw[begin:begin] = raw[begin : begin + 20]

    return [flip, digit, digit, drop, repeat]


def test_a_header_that_passes_is_the_librarys(tmp_path: Path) -> None:
    """Thousands of spoiled files: whatever passes, the library reads as the same tensors."""
    source = random.Random(0)
    sound = save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.ones(1)})
    kinds = mutations(source)
    passed = 0
    path = tmp_path / "w"
    for _ in range(1200):
        raw = bytearray(sound)
        for _ in range(source.randint(1, 2)):
            source.choice(kinds)(raw)
        path.write_bytes(raw)
        if header_problem(path):
            continue
        passed += 1
        with path.open("rb") as file, safe_open(path, framework="pt") as theirs:
            ours = read_header(file)
            assert [tensor.name for tensor in ours.tensors] == theirs.offset_keys()
            for tensor in ours.tensors:
                view = theirs.get_slice(tensor.name)
                assert (list(tensor.shape), tensor.dtype) == (view.get_shape(), view.get_dtype())
                assert tensor.size == theirs.get_tensor(tensor.name).nbytes
    assert passed > 20
