"""Owns how a command reaches a server: its address, key and certificates, and what went wrong in one sentence.

Invariant: nothing raised or returned contains the key.
"""

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, TypeVar

import httpx
from pydantic import ValidationError

from server.api.schemas import ErrorDetail, ErrorObject

CONNECT_TIMEOUT_S = 10.0
ADMIN_KEY, API_KEY = "PERFT_ADMIN_KEY", "PERFT_API_KEY"
KINDS = {ADMIN_KEY: "the admin key", API_KEY: "an API key"}
"""Where a command takes its key from -> what kind of key it needs."""

Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)

_ROUTE_IN_SERVER = re.compile(r"(/+v1(/+adapters)?)?/*$")
"""What people copy behind a server's address from the API's paths."""


class ClientError(Exception):
    """The server rejected the request, or cannot be reached. status: of its response, 0 without one.

    violations: every one that it listed. code: the API's, empty without one.
    """

    def __init__(self, message: str, status: int = 0, violations: tuple[str, ...] = (), code: str = "") -> None:
        super().__init__(message)
        self.status, self.violations, self.code = status, violations, code

    @property
    def may_pass(self) -> bool:
        """Whether the same request may go well later: the server is away, starting, or has no room."""
        return self.status in (0, 429) or self.status >= 500


@dataclass(frozen=True)
class Server:
    """A server to ask. timeout_s: the longest silence that is accepted. variable: the one that holds this kind of key.

    trusted: the certificates to trust, else those of SSL_CERT_FILE or SSL_CERT_DIR, else the usual authorities'.
    """

    address: str
    key: str | None = field(repr=False)
    timeout_s: float
    trusted: ssl.SSLContext | None = None
    variable: str = ADMIN_KEY

    @property
    def url(self) -> str:
        """The address without the start of a route."""
        return _ROUTE_IN_SERVER.sub("", self.address)

    def open(self, kind: type[Http], **more: Any) -> Http:
        """A client of httpx for this server. Raises ClientError."""
        url = httpx.URL(self.url)
        try:
            return kind(
                headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
                timeout=httpx.Timeout(self.timeout_s, connect=min(self.timeout_s, CONNECT_TIMEOUT_S)),
                verify=self.trusted or (httpx.create_ssl_context() if url.scheme == "https" else True),
                trust_env=not _is_loopback(url.host),
                **more,
            )
        except OSError:
            message = "found no readable certificates at SSL_CERT_FILE or SSL_CERT_DIR; set --cacert"
            raise ClientError(message) from None
        except (ImportError, ValueError, httpx.InvalidURL):
            raise ClientError(
                "found a proxy in the environment that cannot be used (ALL_PROXY, HTTPS_PROXY or HTTP_PROXY), expected "
                "http://HOST:PORT; for socks5:// run `pip install 'httpx[socks]'`"
            ) from None

    @contextmanager
    def sentences(self) -> Iterator[None]:
        """Turn errors of the connection into one sentence, a ClientError."""
        try:
            yield
        except httpx.ConnectError as error:
            raise ClientError(_no_connection(self.url, error)) from None
        except httpx.TimeoutException:
            message = f"{self.url} did not answer within {self.timeout_s:g} s; raise --timeout to wait longer"
            raise ClientError(message) from None
        except httpx.RequestError as error:
            raise ClientError(f"{self.url} closed the connection early ({error or type(error).__name__})") from None

    def refusal(self, response: httpx.Response) -> ClientError:
        """The server's error (of a response that is read), with what to do about it where that is known here."""
        try:
            detail = ErrorObject.model_validate_json(response.content).error
        except ValidationError:
            request = f"{response.request.method} {response.request.url.path}"
            message = f"the server answered {response.status_code} to {request}, without an error object of its API"
            detail = ErrorDetail(message=message, type="", param=None, code="", violations=None)
        hints = {
            401: f"; set {KINDS[self.variable]} with {self.variable} or --key",
            403: f"; this key may not do that: set {KINDS[self.variable]} with {self.variable} or --key",
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
