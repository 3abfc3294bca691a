"""Archives of an adapter: what tools write is taken, what is damaged is described, and nothing is written elsewhere."""

import io
import os
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.archive.extract import AdapterTooLargeError, extract
from adapters.archive.inflate import BLOCK_BYTES, GZIP, RAW_DEFLATE, DamagedArchiveError, inflated
from tests.hostile.good import TRAINERS
from tests.hostile.zip_writer import Member, archive, archive64, deflated

LIMIT = 1024 * 1024
CONFIG, WEIGHTS, README = "adapter_config.json", "adapter_model.safetensors", "README.md"
FILES = {CONFIG: b'{"a": 1}' * 100, WEIGHTS: random.Random(0).randbytes(300_000), README: b"read me"}
KEPT = {CONFIG: FILES[CONFIG], WEIGHTS: FILES[WEIGHTS]}
Maker = Callable[[dict[str, bytes]], bytes]


class Unseekable(io.RawIOBase):
    """Where a zip is written to a pipe: sizes follow the data."""

    def __init__(self) -> None:
        self.written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self.written += bytes(data)  # type: ignore[call-overload]
        return len(memoryview(data))  # type: ignore[arg-type]


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, force_zip64: bool = False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            with archive.open(info, "w", force_zip64=force_zip64) as member:
                member.write(data)
    return buffer.getvalue()


def streamed(files: dict[str, bytes]) -> bytes:
    pipe = Unseekable()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            archive.writestr(name, data)
    return bytes(pipe.written)


def tarred(files: dict[str, bytes], format: int = tarfile.PAX_FORMAT, with_root: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=format) as archive:
        if with_root:
            root = tarfile.TarInfo("./")
            root.type = tarfile.DIRTYPE
            archive.addfile(root)
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}" if with_root else name)
            info.size, info.mtime = len(data), 1234567890.5
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def prefixed(make: Maker) -> Maker:
    return lambda files: make({f"./{name}": data for name, data in files.items()})


GOOD: dict[str, Maker] = {
    "zip, deflated": zipped,
    "zip, stored": lambda files: zipped(files, zipfile.ZIP_STORED),
    "zip of ./": prefixed(zipped),
    "zip written to a pipe": streamed,
    "zip with zip64 sizes": lambda files: zipped(files, force_zip64=True),
    "zip with a comment": lambda files: archive(
        [Member(n.encode(), data) for n, data in files.items()], comment=b"hello"
    ),
    "zip64": lambda files: archive64([Member(name.encode(), data) for name, data in files.items()]),
    "tar.gz, pax": tarred,
    "tar.gz, GNU": lambda files: tarred(files, tarfile.GNU_FORMAT),
    "tar.gz, ustar": lambda files: tarred(files, tarfile.USTAR_FORMAT),
    "tar.gz of a folder": lambda files: tarred(files, with_root=True),
}


def unpack(folder: Path, raw: bytes, limit: int = LIMIT) -> tuple[list[str], dict[str, bytes]]:
    """The violations and the files that lie there afterwards."""
    (folder / "into").mkdir()
    (folder / "archive").write_bytes(raw)
    violations = extract(folder / "archive", folder / "into", limit)
    assert sorted(path.name for path in folder.iterdir()) == ["archive", "into"]
    return violations, {path.name: path.read_bytes() for path in (folder / "into").iterdir()}


@pytest.mark.parametrize("files", [FILES, {k: v for k, v in FILES.items() if k != README}], ids=["README", "none"])
@pytest.mark.parametrize("kind", GOOD)
def test_what_tools_write_is_taken(tmp_path: Path, kind: str, files: dict[str, bytes]) -> None:
    assert unpack(tmp_path, GOOD[kind](files)) == ([], KEPT)


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_sizes_at_the_seams(tmp_path: Path, kind: str, size: int) -> None:
    files = {CONFIG: b"{}", WEIGHTS: bytes(size)}
    assert unpack(tmp_path, GOOD[kind](files)) == ([], files)


@pytest.mark.parametrize("kind", GOOD)
def test_the_limit_of_the_weights(tmp_path: Path, kind: str) -> None:
    raw = GOOD[kind](FILES)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert unpack(tmp_path / "a", raw, 300_000) == ([], KEPT)
    with pytest.raises(AdapterTooLargeError, match="unpacks to 300000 bytes, expected at most 299999"):
        unpack(tmp_path / "b", raw, 299_999)
    assert WEIGHTS not in os.listdir(tmp_path / "b" / "into")


@pytest.mark.parametrize("kind", GOOD)
def test_every_violation_at_once(tmp_path: Path, kind: str) -> None:
    files = {
        "../a": b"", "/b": b"", "C:c": b"", "d/e": b"", "f.gguf": b"x", "nul": b"", "g\\h": b"", WEIGHTS: b"x",
        "m/ADAPTER_CONFIG.json": b"", README: bytes(65537),
    }  # fmt: skip
    violations, written = unpack(tmp_path, GOOD[kind](files))
    expected = ("leaves the archive", "an absolute path", "Windows drive", "device's name", "a backslash",
                "almost the name", "f.gguf: not part of an adapter",
                f"{CONFIG}: missing", "README.md: found 65537 bytes")  # fmt: skip
    assert len(violations) == len(expected), violations
    for violation, part in zip(violations, expected, strict=True):
        assert part in violation
    assert written == {WEIGHTS: b"x"}


def noted(folder: Path, raw: bytes) -> list[str]:
    """The notes of a sound archive."""
    folder.mkdir()
    (folder / "into").mkdir()
    (folder / "archive").write_bytes(raw)
    notes: list[str] = []
    assert extract(folder / "archive", folder / "into", LIMIT, notes) == []
    assert all(note.isprintable() for note in notes)
    return notes


@pytest.mark.parametrize("kind", ["zip, deflated", "tar.gz, pax", "tar.gz, GNU"])
@pytest.mark.parametrize("top", ["poet/", "./poet/", "a/b/c/", "./a/b/", "poet/./", "poet//", "././", "./././a/././"])
def test_folders_around_the_files_are_stripped(tmp_path: Path, kind: str, top: str) -> None:
    parents = [top[: i + 1] for i, character in enumerate(top) if character == "/" and top[:i].strip("./")][:3]
    members = dict.fromkeys(parents, b"") if kind.startswith("zip") else {}
    files = members | {f"{top}{name}": data for name, data in KEPT.items()}
    assert unpack(tmp_path, GOOD[kind](files)) == ([], KEPT)
    assert noted(tmp_path / "again", GOOD[kind](files)) == []


@pytest.mark.parametrize("kind", ["zip, deflated", "tar.gz, pax", "tar.gz, GNU"])
def test_what_is_ignored_is_noted_and_never_written(tmp_path: Path, kind: str) -> None:
    inside = [f"out/{name}" for name in (*TRAINERS, "x\u00e9.txt", f"{'long-' * 30}/{'name-' * 20}")]
    files = {f"out/{name}": data for name, data in KEPT.items()} | dict.fromkeys(inside, b"x" * 700)
    files |= {"__MACOSX/out/._x": b"x", "out/.DS_Store": b"x", "out/runs/second": b"x", "elsewhere/y": b"x"}
    assert unpack(tmp_path, GOOD[kind](files)) == ([], KEPT)
    notes = " | ".join(noted(tmp_path / "again", GOOD[kind](files)))
    for name in ("optimizer.pt: ignored", "README.md: not kept", "tokenizer.json: ignored", "elsewhere/: ignored"):
        assert name in notes
    assert "runs/: ignored, not part of an adapter (2 files)" in notes or "more files were ignored" in notes
    assert "DS_Store" not in notes and "MACOSX" not in notes


@pytest.mark.parametrize("kind", ["zip, deflated", "tar.gz, pax"])
@pytest.mark.parametrize("is_last", [False, True])
def test_pickles_beside_the_weights_are_noted_and_without_them_refused(
    tmp_path: Path, kind: str, is_last: bool
) -> None:
    names = ["adapter_model.bin", "old/adapter_model.pt", "pytorch_model.bin"]
    pickles = dict.fromkeys(names, b"\x80\x02cos\nsystem\n")
    raw = GOOD[kind](KEPT | pickles if is_last else pickles | KEPT)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert unpack(tmp_path / "a", raw) == ([], KEPT)
    assert noted(tmp_path / "c", raw) == [
        f"adapter_model.bin: ignored and never opened: the adapter's weights are {WEIGHTS}",
        "old/: ignored, not part of an adapter",
        f"pytorch_model.bin: ignored and never opened: the adapter's weights are {WEIGHTS}",
    ]
    violations = unpack(tmp_path / "b", GOOD[kind](pickles | {CONFIG: b"{}"}))[0]
    assert f"{WEIGHTS}: missing in the archive; found {', '.join(names)}" in violations and len(violations) == 4
    for name in names:
        assert any(v.startswith(f"{name}: ") and "a pickle" in v and "convert it" in v for v in violations)


def test_weights_of_another_name_are_named(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
    alone = unpack(tmp_path / "a", GOOD["zip, deflated"]({CONFIG: b"{}", "out/model.safetensors": b"x"}))[0]
    assert f"out/model.safetensors: the weights must be one file called {WEIGHTS}: rename this one" in " ".join(alone)
    (beside,) = unpack(tmp_path / "b", GOOD["zip, deflated"](KEPT | {"adapter_model_v2.safetensors": b"x"}))[0]
    assert beside == (
        f"adapter_model_v2.safetensors: not part of an adapter, but looks like more weights than {WEIGHTS}: keep the "
        f"adapter's as {WEIGHTS}, and remove or rename the other file"
    )


@pytest.mark.parametrize("kind", ["zip, deflated", "tar.gz, pax"])
def test_notes_are_bounded(tmp_path: Path, kind: str) -> None:
    raw = GOOD[kind](KEPT | {f"{i:03d}-{'x' * 90}.txt": b"" for i in range(900)})
    notes = noted(tmp_path / "a", raw)
    assert len(notes) == 21 and notes[-1] == "880 more files were ignored" and max(map(len, notes)) < 250


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("count", [62, 64, 65, 1000])
def test_how_many_members_there_may_be(tmp_path: Path, kind: str, count: int) -> None:
    """64 were too many for a tar.gz, and are few where a Mac writes a second file for each."""
    files = KEPT | {f"._{i}": b"" for i in range(count - 2)}
    assert unpack(tmp_path, GOOD[kind](files)) == ([], KEPT)


@pytest.mark.parametrize("kind", GOOD)
def test_too_many_members(tmp_path: Path, kind: str) -> None:
    violations, _ = unpack(tmp_path, GOOD[kind](KEPT | {f"._{i}": b"" for i in range(1100)}))
    assert "1024" in violations[-1]


def test_ignored_members_of_a_zip_are_not_unpacked(tmp_path: Path) -> None:
    """Damage in them does not matter, and they cost nothing."""
    members = [Member(name.encode(), data) for name, data in KEPT.items()]
    damaged = Member(b"optimizer.pt", bytes(LIMIT), raw=b"\xff" * 100)
    assert unpack(tmp_path, archive([damaged, *members])) == ([], KEPT)


@pytest.mark.parametrize("kind", GOOD)
def test_what_is_ignored_has_a_limit(tmp_path: Path, kind: str) -> None:
    """Four times the weights' own: with it the archive is taken, with a byte more it is not."""
    for size, is_taken in ((2 * LIMIT, True), (2 * LIMIT + 1, False)):
        folder = tmp_path / str(size)
        folder.mkdir()
        violations, _ = unpack(folder, GOOD[kind]({"optimizer.pt": bytes(size), "scaler.pt": bytes(2 * LIMIT)} | KEPT))
        assert violations == [] if is_taken else "what is not part of an adapter unpacks to more than" in violations[0]


def test_a_link_that_lies_there_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    (tmp_path / "into" / CONFIG).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "archive").write_bytes(zipped(FILES))
    with pytest.raises(FileExistsError):
        extract(tmp_path / "archive", tmp_path / "into", LIMIT)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "kind", ["zip, deflated", "zip, stored", "zip with a comment", "zip64", "tar.gz, pax", "tar.gz, GNU"]
)
def test_damage_is_never_taken_for_content(tmp_path: Path, kind: str) -> None:
    """Thousands of spoiled archives: violations, or exactly the files; no other error, nothing elsewhere."""
    source = random.Random(kind)
    files = {CONFIG: b'{"a": 1}' * 10, WEIGHTS: source.randbytes(200)}
    sound = GOOD[kind](files)
    refused = 0
    for round_ in range(300):
        raw = bytearray(sound)
        change = source.randrange(4)
        if change == 0:
            del raw[source.randrange(len(raw)) :]
        elif change == 1:
            raw[source.randrange(len(raw)) : 0] = source.randbytes(3)
        else:
            for _ in range(change - 1):
                raw[source.randrange(len(raw))] ^= 1 << source.randrange(8)
        folder = tmp_path / str(round_)
        folder.mkdir()
        try:
            violations, written = unpack(folder, bytes(raw))
        except AdapterTooLargeError:
            violations, written = ["too large"], {}
        refused += bool(violations)
        assert violations or written == files, f"round {round_}"
    assert refused > 200


def test_members_of_a_tar_are_held_against_the_gzips_checksum(tmp_path: Path) -> None:
    raw = bytearray(tarred(FILES))
    raw[-8] ^= 1
    violations, _ = unpack(tmp_path, bytes(raw))
    assert len(violations) == 1 and "incorrect data check" in violations[0]


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 5 * BLOCK_BYTES + 7])
def test_inflated_blocks_are_bounded(size: int) -> None:
    packed = deflated(bytes(size))
    blocks = list(inflated(io.BytesIO(b"ab" + packed), 2, len(packed), RAW_DEFLATE))
    assert b"".join(blocks) == bytes(size) and all(len(block) <= BLOCK_BYTES for block in blocks)
    for length, extra in ((len(packed) - 1, b""), (len(packed) + 1, b"x")):
        with pytest.raises(DamagedArchiveError):
            list(inflated(io.BytesIO(packed + extra), 0, length, RAW_DEFLATE))
    with pytest.raises(DamagedArchiveError):
        list(inflated(io.BytesIO(packed), 0, len(packed), GZIP))
