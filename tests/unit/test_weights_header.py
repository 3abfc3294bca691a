"""The header of a safetensors file: sound ones pass, unsound ones are described, and the library never knows better."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from adapters.format.header import BITS, header_problems

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


def changed(**entry: Any) -> Header:
    """The sound header with keys of tensor `b` replaced."""
    return SOUND | {"b": SOUND["b"] | entry}


def test_a_sound_header(tmp_path: Path) -> None:
    assert header_problems(write(tmp_path / "w", SOUND)) == []
    assert header_problems(write(tmp_path / "w", SOUND | {"__metadata__": {"format": "pt"}})) == []
    assert header_problems(write(tmp_path / "w", json.dumps(SOUND).encode() + b"   ")) == []


TORCH_TYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
def test_what_the_library_writes_is_sound(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"t{i}": torch.zeros(i, i + 1).to(dtype) for i in range(5)}
    save_file(tensors, tmp_path / "w", {"k": "v"})
    assert header_problems(tmp_path / "w") == []


def test_the_table_of_types_is_the_librarys(tmp_path: Path) -> None:
    """Each type of ours is one of the library's, of that size: 8 values fill as many bytes as a value has bits."""
    for dtype, bits in BITS.items():
        header = {"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}
        path = write(tmp_path / "w", header, bytes(bits))
        assert header_problems(path) == []
        with safe_open(path, framework="pt") as file:
            assert list(file.keys()) == ["a"]


UNSOUND: dict[str, tuple[Header | bytes, tuple[str, ...]]] = {
    "dtype": (changed(dtype="F37"), ("b: found dtype 'F37'",)),
    "offsets and shape": (
        changed(shape=[-3], data_offsets=[22, 16]),
        ("b: found shape [-3]", "b: found data_offsets [22, 16]"),
    ),
    "all three": (
        changed(dtype=7, shape=None, data_offsets=[1]),
        ("b: found dtype 7", "b: found shape None", "b: found data_off"),
    ),
    "two tensors": (
        changed(shape=[4]) | {"a": {}},
        ("a: found {}, expected an object", "b: found 6 bytes at data_offsets [16, 22]"),
    ),
    "tensor and metadata": (changed(dtype="") | {"__metadata__": 1}, ("__metadata__: found 1", "b: found dtype ''")),
    "overlap and gap": (
        changed(data_offsets=[10, 16]),
        ("b: begins at 10, overlapping what ends at 16", "empty: begins at 22, leaving a"),
    ),
    "gap at the start": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [22, 23]}}, ("leaving a gap from 0",)),
    "bytes at the end": ({"a": SOUND["a"]}, ("7 bytes at the end belong to no tensor",)),
    "outside": (changed(data_offsets=[18, 24]), ("b: found data_offsets [18, 24], which lie outside the 23 bytes",)),
    "bool offsets": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, ("ascending integers",)),
    "float shape": (changed(shape=[3.0]), ("b: found shape [3.0]",)),
    "one bit too few": (
        {"a": {"dtype": "F4", "shape": [45], "data_offsets": [0, 23]}},
        ("not the size of shape [45]",),
    ),
    "overflow hidden by a zero": (changed(shape=[2**64, 0], data_offsets=[16, 16]), ("not the size of shape",)),
    "a long name": (
        {"x" * 5000: {"dtype": "F32"}},
        ("x" * 120 + ": found {'dtype': 'F32'}, expected an object of dtype",),
    ),
    "list": (b"[]", ("does not begin with '{'",)),
    "deep": (b'{"a":' * 20_000, ("nested too deeply",)),
    "duplicates": (b'{"a": 1, "a": 1, "b": {"c": 1, "c": 2}}', ("key 'a' stands", "key 'c' stands")),
    "NaN": (b'{"a": NaN}', ("found NaN",)),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", ("not JSON",)),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_every_problem_is_named(tmp_path: Path, case: str) -> None:
    header, expected = UNSOUND[case]
    problems = header_problems(write(tmp_path / "w", header))
    assert len(problems) == len(expected), problems
    for problem, part in zip(sorted(problems), sorted(expected), strict=True):
        assert part in problem and len(problem) < 400


@pytest.mark.parametrize(("allowed", "limits"), [(True, (1000, 4)), (False, (300, 4)), (False, (1000, 3))])
def test_the_limits_are_the_callers(tmp_path: Path, allowed: bool, limits: tuple[int, int]) -> None:
    path = write(tmp_path / "w", json.dumps(SOUND).encode().ljust(301))
    assert (header_problems(path, *limits) == []) is allowed


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    """A sparse file of 8 GB that says it is all header."""
    path = tmp_path / "w"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 8 * 1024**3))
        file.truncate(8 + 8 * 1024**3)
    assert header_problems(path) == ["the header's length is 8589934592, expected at most 1048576"]


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


def test_what_passes_here_the_library_opens(tmp_path: Path) -> None:
    """Thousands of spoiled files: whatever this finds no fault with, the library reads without an error."""
    source = random.Random(0)
    sound = save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.ones(1)})
    kinds = mutations(source)
    passed = 0
    for _ in range(1200):
        raw = bytearray(sound)
        for _ in range(source.randint(1, 2)):
            source.choice(kinds)(raw)
        path = tmp_path / "w"
        path.write_bytes(raw)
        if header_problems(path):
            continue
        passed += 1
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                    file.get_tensor(name)
        except SafetensorError as error:
            raise AssertionError(f"the library refuses what passed: {error}\n{bytes(raw)!r}") from error
    assert passed > 20
