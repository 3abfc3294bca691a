"""Owns a multipart/form-data body as a form of known parts, parsed block by block as it arrives.

Invariant: a part that `rules` does not name, or that is over its bound, is rejected before more of it is stored;
file parts go straight to files named by the rules, and none of these is open after `close`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters.format.recognize import START_BYTES
from server.errors import MalformedUploadError, UploadError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_HEADER_BYTES = 1024
MAX_HEADERS = 8
PLAIN_ENCODINGS = ("", "7bit", "8bit", "binary")
EXAMPLE = (
    "such as curl -F name=NAME -F config=@adapter_config.json -F weights=@adapter_model.safetensors URL/v1/adapters, "
    "or with -F file=@adapter.zip in place of the two"
)
LIKELY_FIELDS = {
    **dict.fromkeys(("adapter_config.json", "adapter_config", "config.json", "config_file", "configuration"), "config"),
    **dict.fromkeys(
        ("adapter_model.safetensors", "adapter_model", "model.safetensors", "model", "weight", "weights_file"),
        "weights",
    ),
    **dict.fromkeys(("files", "archive", "zip", "tar", "upload", "adapter", "data", "file[]", "files[]"), "file"),
    **dict.fromkeys(("adapter_name", "adapter_id", "model_name", "lora_name", "id"), "name"),
    **dict.fromkeys(("active", "activated", "enable"), "activate"),
}
"""What people call a field -> what it is called here."""


@dataclass(frozen=True)
class PartRule:
    """The rule of one part. too_large: makes the error for more than `max_bytes`. file_name: None for a text field."""

    max_bytes: int
    too_large: Callable[[], UploadError]
    file_name: str | None = None


def malformed(message: str, param: str | None = None) -> MalformedUploadError:
    """The error for a body that is not a valid form."""
    return MalformedUploadError(message, param=param)


def boundary_of(content_type: str) -> bytes:
    """The boundary between the parts, from the request's Content-Type."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        found = f"Content-Type {content_type[:80]!r}" if content_type else "no Content-Type"
        raise malformed(f"found {found}, expected multipart/form-data, {EXAMPLE}")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise malformed(f"found a boundary of {len(boundary)} bytes in Content-Type, expected 1 to 70")
    return boundary


def _unknown_field(field: str, known: list[str]) -> str:
    likely = LIKELY_FIELDS.get(field.strip().lower()) or next(iter(get_close_matches(field.lower(), known, 1)), None)
    hint = f": did you mean {likely!r}?" if likely in known else ""
    return f"found the field {field[:80]!r}, expected only {', '.join(known)}{hint}"


def _given_twice(field: str) -> str:
    hint = "; a single archive is sent as 'file', the two files as 'config' and 'weights'" if field == "file" else ""
    return f"found the field {field!r} more than once, expected it once{hint}"


class MultipartForm:
    """A form being received: `texts` and `files` (part -> path) hold what has arrived so far.

    `feed` may run in any thread, one at a time; `close` waits for it.
    """

    def __init__(self, boundary: bytes, rules: Mapping[str, PartRule], folder: Path) -> None:
        self.texts: dict[str, bytes] = {}
        self.files: dict[str, Path] = {}
        self.is_finished = False
        self._rules, self._folder = rules, folder
        self._headers: dict[str, str] = {}
        self._header = (bytearray(), bytearray())
        self._part, self._rule = "", PartRule(0, lambda: malformed("a part without headers"))
        self._size = 0
        self._file: FileIO | None = None
        self._is_closed = False
        self._lock = Lock()
        callbacks: MultipartCallbacks = {
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_part,
            "on_part_data": self._write,
            "on_part_end": self._end_part,
            "on_end": self._finish,
        }
        self._parser = MultipartParser(
            boundary, callbacks, max_header_count=MAX_HEADERS, max_header_size=MAX_HEADER_BYTES
        )

    def feed(self, block: bytes) -> None:
        """Take the next bytes of the body. Raises UploadError, or OSError where writing fails."""
        with self._lock:
            if self._is_closed:
                return
            try:
                self._parser.write(block)
            except FormParserError as error:
                raise malformed(f"the body is not multipart/form-data as its Content-Type says: {error}") from error

    def close(self) -> None:
        """Close the open file, if there is one; what is fed later is dropped."""
        with self._lock:
            self._is_closed = True
            self._close_file()

    def _end_header(self) -> None:
        field, value = (part.decode("latin-1") for part in self._header)
        self._header = (bytearray(), bytearray())
        if field.lower() in self._headers:
            raise malformed(f"found the header {field!r} twice in one part")
        self._headers[field.lower()] = value

    def _begin_part(self) -> None:
        """Find out from the headers which part this is, and reject it unless a rule names it."""
        disposition, options = parse_options_header(self._headers.get("content-disposition"))
        encoding = self._headers.get("content-transfer-encoding", "").strip().lower()
        self._headers = {}
        if disposition != b"form-data" or b"name" not in options:
            raise malformed("found a part without 'Content-Disposition: form-data; name=...'")
        self._part = options[b"name"].decode("utf-8", "backslashreplace")
        if encoding not in PLAIN_ENCODINGS:
            raise malformed(f"found Content-Transfer-Encoding {encoding!r}, expected none", self._part[:80])
        if self._part not in self._rules:
            raise malformed(_unknown_field(self._part, list(self._rules)), self._part[:80])
        if self._part in self.texts or self._part in self.files:
            raise malformed(_given_twice(self._part), self._part)
        self._rule, self._size = self._rules[self._part], 0
        if self._rule.file_name is None:
            self.texts[self._part] = b""
        else:
            self.files[self._part] = self._folder / self._rule.file_name
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._file = os.fdopen(os.open(self.files[self._part], flags, 0o600), "wb", buffering=0)

    def _write(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        is_too_large = self._size > self._rule.max_bytes
        if is_too_large:
            end = min(end, start + START_BYTES)  # enough to tell what it is
        if self._file is None:
            self.texts[self._part] += data[start:end]
        else:
            view = memoryview(data)[start:end]
            while view:
                view = view[self._file.write(view) :]
        if is_too_large:
            raise self._rule.too_large()

    def _end_part(self) -> None:
        self._close_file()

    def _finish(self) -> None:
        self.is_finished = True

    def _close_file(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()
