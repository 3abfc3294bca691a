"""Owns the connection to a running server: whether it is there, requests that wait for room, refusals as sentences.

Invariant: whatever a server does, the caller gets a reply or an InputError that names the server; no wait is endless.
"""

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self
from urllib.parse import quote

import httpx

from perft.errors import InputError
from perft.reading import parse_json, printable

RETRIED = (429, 503)
PATIENCE_SECONDS = 600.0
"""How long one question waits for room in all, however often the server says that it has none."""
TRIES = 7
"""Tries of a question whose connection breaks, some 15 seconds; FIRST_TRIES where nothing was answered yet."""
FIRST_TRIES = 2
LOOK_SECONDS = 5.0
MOST_BYTES = 16 * 1024 * 1024
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HINTS = {
    401: "; set an inference key with PERFT_API_KEY or --key",
    403: "; set an inference key with PERFT_API_KEY or --key",
    429: "; ask less with --at-once, or later",
    503: "; try again later",
}


@dataclass(frozen=True)
class Server:
    """Where to ask. url: without /v1. timeout: seconds for one answer."""

    url: str
    key: str | None
    timeout: float = 600.0


@dataclass(frozen=True)
class Reply:
    """What a server sent back."""

    status: int
    headers: httpx.Headers
    content: bytes

    @property
    def excerpt(self) -> str:
        """Its beginning as one line."""
        text = printable(self.content[:200].decode("utf-8", "replace").strip())
        return text or "nothing"


class Connection:
    """Requests to one server, at most `at_once` at a time. say: takes a line for the user while a request waits."""

    def __init__(self, server: Server, at_once: int = 1, say: Callable[[str], None] = lambda line: None) -> None:
        self._server, self._say = server, say
        self._has_answered = self._has_said = False
        try:
            self._client = httpx.AsyncClient(
                base_url=server.url,
                headers={} if server.key is None else {"Authorization": f"Bearer {server.key}"},
                timeout=httpx.Timeout(None, connect=LOOK_SECONDS),  # the whole request has one: see _send
                limits=httpx.Limits(max_connections=at_once),
                trust_env=httpx.URL(server.url).host not in LOOPBACK,
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise InputError(f"found a proxy in the environment that cannot be used: {error}") from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *reason: object) -> None:
        await self._client.aclose()

    async def look(self, models: Sequence[str]) -> None:
        """Raises InputError, within seconds, for no server, a refused key, and models that the server does not list."""
        reply = await self._look_at("/v1/models")
        if reply.status in (401, 403):
            raise self.refusal(reply, "GET /v1/models")
        listed = _listed(reply)
        unknown = [model for model in models if listed and model not in listed and not await self._is_there(model)]
        if unknown:
            named = ", ".join(unknown)
            raise InputError(
                f"{self._server.url} has no model {named} for this key; it has:", sorted(map(printable, listed))
            )

    async def post(self, path: str, body: dict[str, Any]) -> Reply:
        """The reply, once the server has room; a connection that broke is tried again. Raises InputError."""
        waited, broken = 0.0, 0
        for attempt in itertools.count():
            pause = min(0.25 * 2**attempt, 15.0)
            try:
                reply = await self._send("POST", path, body, self._server.timeout)
            except TimeoutError:
                raise self._silent(f"POST {path}", f" within {self._server.timeout:g} s") from None
            except httpx.RequestError as error:
                broken += 1
                if broken == (TRIES if self._has_answered else FIRST_TRIES):
                    raise self._silent(f"POST {path}", f": {_reason(error)}") from None
            else:
                self._has_answered = True
                if reply.status not in RETRIED or reply.headers.get("x-should-retry") == "false":
                    return reply
                pause = max(pause, retry_after(reply.headers.get("Retry-After")))
                if waited + pause > PATIENCE_SECONDS:
                    return reply
                self._say_once(f"the server answered {reply.status} ({_message(reply)}): waiting {math.ceil(pause)} s")
            waited += pause
            await asyncio.sleep(pause)
        raise AssertionError("the loop ends by itself")

    def refusal(self, reply: Reply, what: str) -> InputError:
        """The sentence for a reply that is no answer. what: the model or the request it was for."""
        hint = HINTS.get(reply.status, "")
        if wait := retry_after(reply.headers.get("Retry-After")):
            hint = f", and asks to wait {math.ceil(wait)} s{hint}"
        if location := reply.headers.get("Location"):
            hint = f", and sends on to {printable(location)}; expected --server to be the address that answers"
        return InputError(
            f"the server at {self._server.url} answered {reply.status} for {printable(what)}: {_message(reply)}{hint}"
        )

    def strange(self, reply: Reply, path: str, expected: str) -> InputError:
        """The sentence for a reply that is not what its route gives."""
        return InputError(
            f"the server at {self._server.url} answered POST {path} with {reply.excerpt}; expected {expected}: "
            "is it a server with OpenAI's API?"
        )

    async def _send(self, method: str, path: str, body: dict[str, Any] | None, seconds: float) -> Reply:
        """One request. Raises TimeoutError, httpx.RequestError, and InputError for a reply that does not end."""
        content = bytearray()
        async with asyncio.timeout(seconds), self._client.stream(method, path, json=body) as response:
            async for part in response.aiter_bytes():
                content += part
                if len(content) > MOST_BYTES:
                    raise InputError(f"the server at {self._server.url} answered {method} {path} with more than 16 MiB")
        return Reply(response.status_code, response.headers, bytes(content))

    async def _look_at(self, path: str) -> Reply:
        try:
            return await self._send("GET", path, None, LOOK_SECONDS)
        except TimeoutError:
            raise self._silent(f"GET {path}", f" within {LOOK_SECONDS:g} s") from None
        except httpx.RequestError as error:
            raise self._silent(f"GET {path}", f": {_reason(error)}") from None

    async def _is_there(self, model: str) -> bool:
        """Whether the server has a model that it does not list, such as one version of an adapter."""
        return (await self._look_at(f"/v1/models/{quote(model)}")).status != 404

    def _silent(self, request: str, how: str) -> InputError:
        return InputError(
            f"the server at {self._server.url} did not answer {request}{how}; start one with `perft serve`, or give "
            "its address with --server or PERFT_SERVER"
        )

    def _say_once(self, line: str) -> None:
        if not self._has_said:
            self._has_said = True
            self._say(line)


def retry_after(value: str | None) -> float:
    """The seconds of a Retry-After header, a number or a date; 0 for none, and for what is neither."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _listed(reply: Reply) -> set[str]:
    """The names in a list of models; none where the reply is something else."""
    try:
        found = parse_json(reply.content, "models")
    except InputError:
        return set()
    match found:
        case {"data": [*models]}:
            return {each["id"] for each in models if isinstance(each, dict) and isinstance(each.get("id"), str)}
    return set()


def _message(reply: Reply) -> str:
    """The message of an error object, or the reply's beginning."""
    try:
        found = parse_json(reply.content, "error")
    except InputError:
        return reply.excerpt
    match found:
        case {"error": {"message": str(message)}}:
            return printable(message)
    return reply.excerpt


def _reason(error: httpx.RequestError) -> str:
    return printable(str(error)) or type(error).__name__
