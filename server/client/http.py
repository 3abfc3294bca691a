"""Owns the HTTP client of the adapter routes (docs/api.md): typed responses, streamed files, errors in one sentence.

Invariant: no weights and no archive are ever whole in memory, and nothing raised or returned contains the key.
"""

import json
import re
import ssl
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.identity import HashedFile, content_digest
from server.api.schemas import AdapterList, AdapterObject, ErrorDetail, ErrorObject, VersionObject

CONNECT_TIMEOUT_S = 10.0
PAGE = 200

Answer = TypeVar("Answer", bound=BaseModel)

_VERSION_IN_LOCATION = re.compile(r"/versions/([1-9][0-9]{0,9})$")
_ROUTE_IN_SERVER = re.compile(r"(/+v1(/+adapters)?)?/*$")
"""What people copy behind a server's address from the API's paths."""
OWN_CODES = ("adapter_not_found", "version_not_found")
"""Of the 404s that the adapter routes themselves answer."""


class ClientError(Exception):
    """The server rejected the request, or cannot be reached. status: of its response, 0 without one.

    violations: every one that it listed. code: the API's, empty without one.
    """

    def __init__(self, message: str, status: int = 0, violations: tuple[str, ...] = (), code: str = "") -> None:
        super().__init__(message)
        self.status, self.violations, self.code = status, violations, code


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
    """The adapter routes of one server, as a context manager. The constructor and every method raise ClientError.

    trusted: the certificates to trust, else those of SSL_CERT_FILE or SSL_CERT_DIR, else the usual authorities'.
    """

    def __init__(
        self,
        server: str,
        key: str | None,
        timeout_s: float,
        trusted: ssl.SSLContext | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._server, self._timeout_s = _ROUTE_IN_SERVER.sub("", server), timeout_s
        url = httpx.URL(self._server)
        try:
            self._http = httpx.Client(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
                verify=trusted or (httpx.create_ssl_context() if url.scheme == "https" else True),
                trust_env=not _is_loopback(url.host),
                transport=transport,
            )
        except OSError:
            message = "found no readable certificates at SSL_CERT_FILE or SSL_CERT_DIR; set --cacert"
            raise ClientError(message) from None
        except (ImportError, ValueError, httpx.InvalidURL):
            raise ClientError(
                "found a proxy in the environment that cannot be used (ALL_PROXY, HTTPS_PROXY or HTTP_PROXY), expected "
                "http://HOST:PORT; for socks5:// run `pip install 'httpx[socks]'`"
            ) from None

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
            page = self._ask(AdapterList, "GET", "/v1/adapters", params=parameters)[0]
            yield from page.data
            if not page.has_more or not page.next or page.next == after:
                return
            after = page.next

    def adapter(self, name: str) -> AdapterObject:
        return self._ask(AdapterObject, "GET", _path(name))[0]

    def patch(self, name: str, changes: dict[str, Any]) -> AdapterObject:
        return self._ask(AdapterObject, "PATCH", _path(name), json=changes)[0]

    def delete(self, name: str, version: int | None) -> AdapterObject:
        return self._ask(AdapterObject, "DELETE", _path(name, version))[0]

    def push(self, name: str, path: Path, activate: bool, allowed_keys: Sequence[str] | None = None) -> Pushed:
        """Upload a folder (its two files) or an archive, read as it is sent. allowed_keys: None to send none.

        Raises OSError if a file cannot be read, ClientError also if the server stored other bytes than were sent.
        """
        fields = {"name": name, "activate": "true" if activate else "false"}
        if allowed_keys is not None:
            fields["allowed_keys"] = json.dumps(list(allowed_keys))
        files = {"config": path / CONFIG_FILE, "weights": path / WEIGHTS_FILE} if path.is_dir() else {"file": path}
        with ExitStack() as stack:
            opened = {field: stack.enter_context(HashedFile(file)) for field, file in files.items()}
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
        with self._sentences(), self._http.stream("GET", self._server + path) as response:
            if not response.is_success:
                response.read()
                raise self._refused(response)
            yield response.iter_bytes()

    def _ask(self, answer: type[Answer], method: str, path: str, **content: Any) -> tuple[Answer, httpx.Response]:
        with self._sentences():
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
        error, is_elsewhere = _refusal(response), response.status_code in (404, 405)
        if not is_elsewhere or error.code in OWN_CODES or httpx.URL(self._server).path == "/":
            return error
        message = f"found no adapter routes at {self._server}; expected --server (or PERFT_SERVER) to be the server's "
        return ClientError(
            f"{message}address, without a route behind it, such as {_origin(self._server)}", error.status
        )

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """Turn errors of the connection into one sentence."""
        try:
            yield
        except httpx.ConnectError as error:
            raise ClientError(_no_connection(self._server, error)) from None
        except httpx.TimeoutException:
            message = f"{self._server} did not answer within {self._timeout_s:g} s; raise --timeout to wait longer"
            raise ClientError(message) from None
        except httpx.RequestError as error:
            raise ClientError(f"{self._server} closed the connection early ({error or type(error).__name__})") from None


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


def _refusal(response: httpx.Response) -> ClientError:
    """The server's error, with what to do about it where that is known here."""
    try:
        detail = ErrorObject.model_validate_json(response.content).error
    except ValidationError:
        request = f"{response.request.method} {response.request.url.path}"
        message = f"the server answered {response.status_code} to {request}, without an error object of its API"
        detail = ErrorDetail(message=message, type="", param=None, code="", violations=None)
    hints = {
        401: "; set the admin key with PERFT_ADMIN_KEY or --key",
        403: "; this key may not do that: set the admin key with PERFT_ADMIN_KEY or --key",
    }
    violations = tuple(detail.violations or ())
    message = detail.message + hints.get(response.status_code, "")
    if violations:  # which are listed, the first one too
        message = message.partition(f": {violations[0]}")[0]
    if wait := response.headers.get("retry-after"):
        message += f"; retry after {wait} s"
    return ClientError(message, response.status_code, violations, detail.code)


def _no_connection(server: str, error: httpx.ConnectError) -> str:
    """Why connecting failed: the certificate, another TLS error, or no server."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"found a certificate at {server} that is not trusted ({cause.verify_message}); pass its authority with "
            "--cacert FILE, and the name it is issued for with --server"
        )
    if cause is not None:
        return f"found no TLS at {server} ({error}); use http:// for a server without a certificate"
    return f"found no server at {server} ({error}); start one with `perft serve`, or set --server or PERFT_SERVER"


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine, which is never reached through a proxy of the environment."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
