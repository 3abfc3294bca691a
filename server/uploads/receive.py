"""Owns receiving an upload: from the request's body to an adapter's files in a staged folder.

Invariant: everything is bounded while it arrives (bytes, parts, headers, time), at most one block of the files is in
memory, and parsing and writing happen off the event loop.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adapters.archive.extract import AdapterTooLargeError, extract
from adapters.format.config import foreign_first
from adapters.format.files import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE, Limits
from adapters.format.folder import check_folder
from adapters.format.recognize import START_BYTES, recognized
from adapters.identity import config_bytes, peft_type_of
from adapters.store import UNCHANGED, Unchanged
from perft.threads import compute_alone
from server.errors import (
    InvalidUploadError,
    InvalidUploadNameError,
    MalformedUploadError,
    UploadEncodingError,
    UploadStorageFullError,
    UploadTimeoutError,
    UploadTooLargeError,
)
from server.uploads.form import EXAMPLE, MultipartForm, PartRule, boundary_of, malformed

T = TypeVar("T")
MIB = 1024 * 1024
BLOCK_BYTES = MIB
MAX_NAME_BYTES = 256
MAX_FLAG_BYTES = 16
MAX_KEYS_BYTES = 128 * 1024
ARCHIVE_FILE = "upload.archive"
TRUE, FALSE = ("true", "1", "yes", "on", "t", "y"), ("false", "0", "no", "off", "f", "n")
_THREADS = ThreadPoolExecutor(4, "perft-upload", initializer=compute_alone)


@dataclass(frozen=True)
class UploadLimits:
    """The limits of one upload. max_adapter_bytes: of the weights file, also once unpacked.

    timeout_s: seconds from the request's headers to the body's last byte; idle_timeout_s: seconds between two arrivals.
    """

    max_adapter_bytes: int
    timeout_s: float
    idle_timeout_s: float

    @property
    def archive_bytes(self) -> int:
        """The largest archive: one of incompressible weights at their limit is slightly larger than they are."""
        return self.max_adapter_bytes + self.max_adapter_bytes // 256 + MIB

    @property
    def body_bytes(self) -> int:
        """The largest body: any form whose parts are within their limits."""
        return self.archive_bytes + MIB


@dataclass(frozen=True)
class ReceivedUpload:
    """A complete upload, not yet validated. folder: holds the adapter's files. notes: what of it was ignored.

    allowed_keys: what was given as labels (None: every key), unchecked; UNCHANGED if nothing was given.
    """

    name: str
    activate: bool
    folder: Path
    notes: tuple[str, ...] = ()
    allowed_keys: list[Any] | Unchanged | None = UNCHANGED


async def receive_upload(
    headers: Mapping[str, str],
    body: AsyncIterator[bytes],
    staged: Path,
    limits: UploadLimits,
    query: Mapping[str, str] | None = None,
) -> ReceivedUpload:
    """Read the form of POST /v1/adapters into the empty folder `staged`, which the caller discards.

    headers: of the request, names in any case. query: its parameters, of which none may be a field. Raises UploadError.
    The name and the content of the files are not checked here.
    """
    _check_headers(headers, limits)
    rules = _rules(limits, staged)
    _check_query(query or {}, rules)
    form = MultipartForm(boundary_of(headers.get("content-type", "")), rules, staged)
    try:
        await _read_body(form, body, limits)
    finally:
        form.close()
    name, activate = _text_fields(form)
    allowed_keys = _allowed_keys(form.texts["allowed_keys"]) if "allowed_keys" in form.texts else UNCHANGED
    _check_files(form)
    notes = await _in_thread(_unpack, form.files["file"], staged, limits) if "file" in form.files else []
    return ReceivedUpload(name, activate, staged, tuple(notes), allowed_keys)


def _check_headers(headers: Mapping[str, str], limits: UploadLimits) -> None:
    declared = headers.get("content-length", "0")
    if not (declared.isascii() and declared.isdigit()):
        raise malformed(f"found Content-Length {declared[:40]!r}, expected a number")
    if len(declared) > 18 or int(declared) > limits.body_bytes:
        raise _too_large(f"found a body of {declared[:40]} bytes", limits.max_adapter_bytes)
    if (encoding := headers.get("content-encoding", "identity")) != "identity":
        raise UploadEncodingError(f"found Content-Encoding {encoding[:40]!r}, expected none")


def _check_query(query: Mapping[str, str], rules: Mapping[str, PartRule]) -> None:
    """A field in the URL would be ignored."""
    for field in query:
        if field in rules:
            raise malformed(f"found {field!r} as a query parameter, expected a field of the form, {EXAMPLE}", field)


def _rules(limits: UploadLimits, staged: Path) -> dict[str, PartRule]:
    """The parts of the form. A config slightly over its limit is received, to be reported with all other violations."""
    weights = partial(_too_large, "found weights over the limit", limits.max_adapter_bytes)
    archive = partial(_too_large, "found an archive over the limit", limits.max_adapter_bytes)
    long_name = f"found a name of more than {MAX_NAME_BYTES} bytes, expected at most 63 characters"
    return {
        "name": PartRule(MAX_NAME_BYTES, lambda: InvalidUploadNameError(long_name)),
        "activate": PartRule(MAX_FLAG_BYTES, lambda: _invalid_flag(f"more than {MAX_FLAG_BYTES} bytes")),
        "allowed_keys": PartRule(MAX_KEYS_BYTES, lambda: _invalid_keys(f"more than {MAX_KEYS_BYTES} bytes")),
        "config": PartRule(2 * MAX_CONFIG_BYTES, partial(_config_too_large, staged / CONFIG_FILE), CONFIG_FILE),
        "weights": PartRule(limits.max_adapter_bytes, weights, WEIGHTS_FILE),
        "file": PartRule(limits.archive_bytes, archive, ARCHIVE_FILE),
    }


async def _read_body(form: MultipartForm, body: AsyncIterator[bytes], limits: UploadLimits) -> None:
    """Feed the whole body to the form, a block at a time."""
    block, total = bytearray(), 0
    async for chunk in _chunks(body, limits):
        total += len(chunk)
        if total > limits.body_bytes:
            raise _too_large(f"found a body of more than {limits.body_bytes} bytes", limits.max_adapter_bytes)
        block += chunk
        if len(block) >= BLOCK_BYTES:
            await _in_thread(form.feed, bytes(block))
            block.clear()
    await _in_thread(form.feed, bytes(block))
    if not form.is_finished:
        raise malformed("the body ends before the closing boundary of its multipart/form-data: it was cut off")


async def _chunks(body: AsyncIterator[bytes], limits: UploadLimits) -> AsyncIterator[bytes]:
    """The chunks of the body. Raises UploadTimeoutError if they arrive too slowly."""
    now = asyncio.get_running_loop().time
    end = now() + limits.timeout_s
    while True:
        try:
            async with asyncio.timeout_at(min(end, now() + limits.idle_timeout_s)):
                chunk = await anext(body, b"")
        except TimeoutError as error:
            message = (
                f"the body was too slow: at most {limits.idle_timeout_s:g} s between two arrivals and "
                f"{limits.timeout_s:g} s in all are allowed"
            )
            raise UploadTimeoutError(message) from error
        if not chunk:
            return
        yield chunk


async def _in_thread(work: Callable[..., T], *arguments: object) -> T:
    """Run blocking work on an upload thread. Raises UploadStorageFullError for a full disk."""
    try:
        return await asyncio.get_running_loop().run_in_executor(_THREADS, partial(work, *arguments))
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        message = "the server's disk is full, so nothing was stored; delete adapters, or ask the operator for space"
        raise UploadStorageFullError(message) from error


def _text_fields(form: MultipartForm) -> tuple[str, bool]:
    """The adapter's name and `activate`."""
    if "name" not in form.texts:
        raise malformed(f"found no field 'name', expected the adapter's name, {EXAMPLE}", "name")
    try:
        name = form.texts["name"].decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidUploadNameError("found a name that is not UTF-8") from error
    return name, _flag(form.texts.get("activate", b"true"))


def _flag(raw: bytes) -> bool:
    """A flag in one of the spellings that forms and scripts write."""
    text = raw.decode("utf-8", "replace").strip().lower()
    if text not in TRUE + FALSE:
        raise _invalid_flag(ascii(raw.decode("utf-8", "replace")))
    return text in TRUE


def _allowed_keys(raw: bytes) -> list[Any] | None:
    """A JSON list of labels, or labels separated by commas; null is every key, and [] none.

    Nothing is neither: a script whose variable is not set must not make an adapter public.
    """
    try:
        text = raw.decode("utf-8").strip()
        if not text:
            raise _invalid_keys("nothing")
        if text == "null":
            return None
        if not text.startswith("["):
            return [label.strip() for label in text.split(",")]
        labels = json.loads(text)
    except (ValueError, RecursionError):
        raise _invalid_keys(ascii(raw[:80].decode("utf-8", "replace"))) from None
    assert isinstance(labels, list)
    return labels


def _check_files(form: MultipartForm) -> None:
    """Either both files or an archive."""
    given = sorted(form.files)
    if given not in (["config", "weights"], ["file"]):
        found = " and ".join(repr(part) for part in given) or "no file"
        message = (
            f"found {found}, expected either 'config' and 'weights' or 'file' (a .zip or .tar.gz) alone, {EXAMPLE}"
        )
        raise malformed(message, "file" if "file" in given or not given else given[0])


def _unpack(archive: Path, staged: Path, limits: UploadLimits) -> list[str]:
    """Unpack the archive into the adapter's files; returns what it had beside them, as notes.

    Raises InvalidUploadError with every violation.
    """
    notes: list[str] = []
    try:
        violations = extract(archive, staged, limits.max_adapter_bytes, notes)
    except AdapterTooLargeError as error:
        raise _too_large(f"found an archive: {error}", limits.max_adapter_bytes) from error
    archive.unlink()
    if not violations:
        return notes
    are_there = (staged / CONFIG_FILE).exists() and (staged / WEIGHTS_FILE).exists()
    if are_there and peft_type_of(config_bytes(staged)) != "LORA":  # whose rules are the engine's
        violations += check_folder(staged, None, Limits(limits.max_adapter_bytes))[1]
    raise InvalidUploadError(foreign_first(violations))


def _config_too_large(config: Path) -> InvalidUploadError:
    """The error for a `config` over its limit, which is often another file. config: what arrived of it."""
    with config.open("rb") as file:
        found = recognized(file.read(START_BYTES))
    what = f", {found.text}" if found is not None and found.kind != "json" else ""
    size = f"found more than {2 * MAX_CONFIG_BYTES} bytes{what}"
    return InvalidUploadError([f"{CONFIG_FILE}: {size}; expected at most {MAX_CONFIG_BYTES}"])


def _invalid_keys(found: str) -> MalformedUploadError:
    expected = (
        'null for every key, [] for the admin key alone, or a JSON list of labels of API keys, such as ["alice"]; '
        "leave the field out to keep what the name has"
    )
    return malformed(f"allowed_keys: found {found}, expected {expected}", "allowed_keys")


def _invalid_flag(found: str) -> MalformedUploadError:
    return malformed(f"activate: found {found}, expected true or false", "activate")


def _too_large(found: str, limit: int) -> UploadTooLargeError:
    message = f"{found}; expected at most {limit} bytes of weights (max_adapter_bytes)"
    return UploadTooLargeError(message)
