"""Owns the HTTP client of the adapter routes (docs/api.md): typed responses, streamed files, errors in one sentence.

Invariant: no weights and no archive are ever whole in memory, and nothing raised or returned contains the key.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.identity import HashedFile, content_digest
from server.api.schemas import AdapterObject, VersionObject
from server.client.connection import ClientError, Server

PAGE = 200

Answer = TypeVar("Answer", bound=BaseModel)

_VERSION_IN_LOCATION = re.compile(r"/versions/([1-9][0-9]{0,9})$")
OWN_CODES = ("adapter_not_found", "version_not_found")
"""Of the 404s that the adapter routes themselves answer."""


class AdapterPage(BaseModel):
    """A page of adapters. next: the `after` of the next one. total: of all that match, if the server says so."""

    data: list[AdapterObject]
    has_more: bool
    next: str | None = None
    total: int | None = None


class PushAnswer(AdapterObject):
    """The response to an upload."""

    notes: list[str] = []


@dataclass(frozen=True)
class Pushed:
    """The result of an upload. version: None if the response does not identify one of several versions.

    notes: what the server ignored of it.
    """

    adapter: AdapterObject
    version: VersionObject | None
    is_new: bool
    notes: tuple[str, ...] = ()


class AdaptersClient:
    """The adapter routes of one server, as a context manager. The constructor and every method raise ClientError."""

    def __init__(self, server: Server, transport: httpx.BaseTransport | None = None) -> None:
        self._of, self._server = server, server.url
        self._http = server.open(httpx.Client, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def adapters(self) -> Iterator[AdapterObject]:
        """Every adapter that the key may see, by name, page after page."""
        after: str | None = None
        while True:
            parameters: dict[str, str | int] = {"limit": PAGE} | ({"after": after} if after else {})
            page = self.page(**parameters)
            yield from page.data
            if not page.has_more or not page.next or page.next == after:
                return
            after = page.next

    def page(self, **parameters: str | int) -> AdapterPage:
        """One page of GET /v1/adapters."""
        return self._ask(AdapterPage, "GET", "/v1/adapters", params=parameters)[0]

    def get(self, path: str, parameters: Sequence[tuple[str, str]] = ()) -> str:
        """The text of another route."""
        with self._of.sentences():
            response = self._http.get(self._server + path, params=list(parameters))
        if not response.is_success:
            raise self._of.refusal(response)
        return response.text

    def adapter(self, name: str) -> AdapterObject:
        return self._ask(AdapterObject, "GET", _path(name))[0]

    def patch(self, name: str, changes: dict[str, Any]) -> AdapterObject:
        return self._ask(AdapterObject, "PATCH", _path(name), json=changes)[0]

    def delete(self, name: str, version: int | None) -> AdapterObject:
        return self._ask(AdapterObject, "DELETE", _path(name, version))[0]

    def push(
        self,
        name: str,
        path: Path,
        activate: bool,
        allowed_keys: Sequence[str] | None = None,
        sent: Callable[[int], object] = lambda count: None,
    ) -> Pushed:
        """Upload a folder (its two files) or an archive, read as it is sent. allowed_keys: None to send none.

        sent: takes the bytes of each block as it is sent. Raises OSError if a file cannot be read, ClientError also if
        the server stored other bytes than were sent.
        """
        fields = {"name": name, "activate": "true" if activate else "false"}
        if allowed_keys is not None:
            fields["allowed_keys"] = json.dumps(list(allowed_keys))
        files = files_of(path)
        with ExitStack() as stack:
            opened = {field: stack.enter_context(HashedFile(file, sent)) for field, file in files.items()}
            answer, response = self._ask(
                PushAnswer,
                "POST",
                "/v1/adapters",
                data=fields,
                files={field: (files[field].name, file) for field, file in opened.items()},
            )
            digest = None
            if "weights" in opened:
                digest = content_digest(files["config"].read_bytes(), opened["weights"].digest())
        is_new = response.status_code == httpx.codes.CREATED
        version = _pushed_version(answer, response, digest, is_new, activate)
        return Pushed(answer, version, is_new, tuple(answer.notes))

    @contextmanager
    def download(self, name: str, version: int, file: Literal["config", "weights"]) -> Iterator[Iterator[bytes]]:
        """The bytes of one file of a version, as they arrive."""
        path = f"{_path(name, version)}/files/{file}"
        with self._of.sentences(), self._http.stream("GET", self._server + path) as response:
            if not response.is_success:
                response.read()
                raise self._refused(response)
            yield response.iter_bytes()

    def _ask(self, answer: type[Answer], method: str, path: str, **content: Any) -> tuple[Answer, httpx.Response]:
        with self._of.sentences():
            response = self._http.request(method, self._server + path, **content)
        if not response.is_success:
            raise self._refused(response)
        try:
            return answer.model_validate_json(response.content), response
        except ValidationError:
            message = f"{self._server} answered {method} {path} with something other than {answer.__name__}"
            raise ClientError(f"{message}: is it a perft server of this version?", response.status_code) from None

    def _refused(self, response: httpx.Response) -> ClientError:
        """The server's error, or that another route than the adapters' answered."""
        error, is_elsewhere = self._of.refusal(response), response.status_code in (404, 405)
        if not is_elsewhere or error.code in OWN_CODES or httpx.URL(self._server).path == "/":
            return error
        message = f"found no adapter routes at {self._server}; expected --server (or PERFT_SERVER) to be the server's "
        return ClientError(
            f"{message}address, without a route behind it, such as {_origin(self._server)}", error.status
        )


def files_of(path: Path) -> dict[str, Path]:
    """The files of an upload by the form's fields: of a folder its two, else the archive."""
    return {"config": path / CONFIG_FILE, "weights": path / WEIGHTS_FILE} if path.is_dir() else {"file": path}


def _origin(server: str) -> str:
    return str(httpx.URL(server).copy_with(path="/")).rstrip("/")


def _path(name: str, version: int | None = None) -> str:
    path = f"/v1/adapters/{quote(name, safe='')}"
    return path if version is None else f"{path}/versions/{version}"


def _pushed_version(
    adapter: AdapterObject, response: httpx.Response, digest: str | None, is_new: bool, activate: bool
) -> VersionObject | None:
    """The version that the upload became: by digest, by the Location header, or by elimination; None if not known."""
    by_number = {version.version: version for version in adapter.versions}
    if digest is not None:
        found = [version for version in adapter.versions if version.digest == digest]
        if not found:
            raise ClientError(
                f"{adapter.name}: sent content of digest {digest}, but the server lists no version with it: was a file "
                "changed while it was sent? Compare with `perft adapters verify` and push again",
                response.status_code,
            )
        return found[-1]
    if match := _VERSION_IN_LOCATION.search(response.headers.get("location", "")):
        return by_number.get(int(match[1]))
    if is_new or len(by_number) == 1:
        return by_number[max(by_number)] if by_number else None
    return by_number.get(adapter.active) if activate and adapter.active is not None else None
