"""Owns receiving an upload: from the request's body to an adapter's files in a staged folder.

Invariant: everything is bounded while it arrives (bytes, parts, headers, time), at most one block of the files is in
memory, and parsing and writing happen off the event loop.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from functools import partial
from pathlib import Path
from typing import TypeVar

from adapters.archive.extract import AdapterTooLargeError, extract
from adapters.format.files import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE, Limits
from adapters.format.folder import check_folder
from perft.threads import compute_alone
from server.errors import (
    InvalidUploadError,
    InvalidUploadNameError,
    MalformedUploadError,
    UploadStorageFullError,
    UploadTimeoutError,
    UploadTooLargeError,
)
from server.uploads.form import MultipartForm, PartRule, boundary_of, malformed

T = TypeVar("T")
MIB = 1024 * 1024
BLOCK_BYTES = MIB
MAX_NAME_BYTES = 256
MAX_FLAG_BYTES = 16
ARCHIVE_FILE = "upload.archive"
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
    """A complete upload, not yet validated. folder: holds the adapter's files."""

    name: str
    activate: bool
    folder: Path


async def receive_upload(
    headers: Mapping[str, str], body: AsyncIterator[bytes], staged: Path, limits: UploadLimits
) -> ReceivedUpload:
    """Read the form of POST /v1/adapters into the empty folder `staged`, which the caller discards.

    headers: of the request, names in any case. Raises UploadError. The name and the content of the files are not
    checked here.
    """
    _check_headers(headers, limits)
    form = MultipartForm(boundary_of(headers.get("content-type", "")), _rules(limits), staged)
    try:
        await _read_body(form, body, limits)
    finally:
        form.close()
    name, activate = _text_fields(form)
    _check_files(form)
    if "file" in form.files:
        await _in_thread(_unpack, form.files["file"], staged, limits)
    return ReceivedUpload(name, activate, staged)


def _check_headers(headers: Mapping[str, str], limits: UploadLimits) -> None:
    declared = headers.get("content-length", "0")
    if not (declared.isascii() and declared.isdigit()):
        raise malformed(f"found Content-Length {declared[:40]!r}, expected a number")
    if len(declared) > 18 or int(declared) > limits.body_bytes:
        raise _too_large(f"found a body of {declared[:40]} bytes", limits.max_adapter_bytes)
    if (encoding := headers.get("content-encoding", "identity")) != "identity":
        raise malformed(f"found Content-Encoding {encoding[:40]!r}, expected none")


def _rules(limits: UploadLimits) -> dict[str, PartRule]:
    """The parts of the form. A config slightly over its limit is received, to be reported with all other violations."""
    weights = partial(_too_large, "found weights over the limit", limits.max_adapter_bytes)
    archive = partial(_too_large, "found an archive over the limit", limits.max_adapter_bytes)
    long_name = f"found a name of more than {MAX_NAME_BYTES} bytes, expected at most 63 characters"
    return {
        "name": PartRule(MAX_NAME_BYTES, lambda: InvalidUploadNameError(long_name)),
        "activate": PartRule(MAX_FLAG_BYTES, _invalid_flag),
        "config": PartRule(2 * MAX_CONFIG_BYTES, _config_too_large, CONFIG_FILE),
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
        raise malformed("found no field 'name', expected the adapter's name", "name")
    try:
        name = form.texts["name"].decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidUploadNameError("found a name that is not UTF-8") from error
    activate = form.texts.get("activate", b"true")
    if activate not in (b"true", b"false"):
        raise _invalid_flag()
    return name, activate == b"true"


def _check_files(form: MultipartForm) -> None:
    """Either both files or an archive."""
    given = sorted(form.files)
    if given not in (["config", "weights"], ["file"]):
        found = " and ".join(repr(part) for part in given) or "no file"
        message = f"found {found}, expected either 'config' and 'weights' or 'file' (a .zip or .tar.gz) alone"
        raise malformed(message, "file" if "file" in given or not given else given[0])


def _unpack(archive: Path, staged: Path, limits: UploadLimits) -> None:
    """Unpack the archive into the adapter's files. Raises InvalidUploadError with every violation."""
    try:
        violations = extract(archive, staged, limits.max_adapter_bytes)
    except AdapterTooLargeError as error:
        raise _too_large(f"found an archive: {error}", limits.max_adapter_bytes) from error
    archive.unlink()
    if not violations:
        return
    if (staged / CONFIG_FILE).exists() and (staged / WEIGHTS_FILE).exists():
        violations += check_folder(staged, None, Limits(limits.max_adapter_bytes))[1]
    raise InvalidUploadError(violations)


def _config_too_large() -> InvalidUploadError:
    found = f"{CONFIG_FILE}: found more than {2 * MAX_CONFIG_BYTES} bytes, expected at most {MAX_CONFIG_BYTES}"
    return InvalidUploadError([found])


def _invalid_flag() -> MalformedUploadError:
    return malformed("activate: found another value, expected true or false", "activate")


def _too_large(found: str, limit: int) -> UploadTooLargeError:
    message = f"{found}; expected at most {limit} bytes of weights (max_adapter_bytes)"
    return UploadTooLargeError(message)
