"""Owns what happens to an inference request before vLLM sees it: its `model` is resolved ONCE, to a version that is
then leased and named in the body, its cache salt becomes the tenant's own, and it waits until its adapter is ready.

An ASGI middleware inside the guard. Invariant: vLLM sees either the base's name or NAME@version of a version whose
lease is held; what a client wrote as `model` decides nothing after this.
"""

import hmac
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access import Route
from server.catalog import Catalog
from server.errors import ApiError
from server.exchange import CURRENT, Exchange
from server.metrics import AdapterMetrics
from server.versions import Version

MAX_BODY_BYTES = 64 * 1024**2
_SSE_ERROR = re.compile(rb'^data: \{"error".*$', re.MULTILINE)


@dataclass(frozen=True)
class GateParts:
    """What the gate works with (app.state.perft_gate)."""

    catalog: Catalog
    metrics: AdapterMetrics
    salt_secret: bytes
    load_timeout_s: float


class Gate:
    """See the module."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route: Route | None = scope.get("state", {}).get("route") if scope["type"] == "http" else None
        if route is None or not route.selects_model:
            return await self._app(scope, receive, send)
        parts: GateParts = scope["app"].state.perft_gate
        state = scope["state"]
        began = time.monotonic()
        try:
            body = await _read_body(receive)
            values = _parse(body)
            version = _resolve(values, parts.catalog, state["caller"])
            if version is not None:
                state["facts"].adapter, state["facts"].version = version.name, version.number
                values["model"] = version.id
            if route.generates:
                _salt(values, parts.salt_secret, state["caller"].label)
            lease = nullcontext() if version is None else parts.catalog.lease(version)
            with lease:
                exchange = Exchange(state["caller"], version, state["facts"], began)
                async with _place(exchange, route, parts):
                    await self._answer(exchange, scope, json.dumps(values).encode(), receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)

    async def _answer(self, exchange: Exchange, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Let vLLM answer the rewritten body."""
        MutableHeaders(scope=scope)["content-length"] = str(len(body))
        token = CURRENT.set(exchange)
        try:
            await self._app(scope, _replay(body, receive), _Answer(exchange, send))
        finally:
            CURRENT.reset(token)


@asynccontextmanager
async def _place(exchange: Exchange, route: Route, parts: GateParts) -> AsyncIterator[None]:
    """Wait until the version is on the device, where the route generates; the engine's request takes the place over."""
    async with exchange.place:
        version = exchange.version
        if version is not None and route.generates:
            try:
                await exchange.place.enter_async_context(parts.catalog.plan.lease(version.engine, parts.load_timeout_s))
            except ApiError as error:
                seconds = time.monotonic() - exchange.began
                parts.metrics.request_finished(version.name, error.code, 0, 0, seconds)
                raise
        yield


def _resolve(values: dict[str, Any], catalog: Catalog, caller: Any) -> Version | None:
    """The version that `model` selects; None for the base. What is no text is left for vLLM to refuse."""
    model = values.get("model")
    return catalog.resolve(model, caller) if isinstance(model, str) and model else None


def _salt(values: dict[str, Any], secret: bytes, label: str | None) -> None:
    """Make the request's cache salt the tenant's own: HMAC(server secret, key label, the client's salt)."""
    given = values.get("cache_salt")
    if given is None or (isinstance(given, str) and given):
        values["cache_salt"] = hmac.digest(secret, json.dumps([label, given]).encode(), "sha256").hex()


def _parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError for anything else."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_request", f"the body is not JSON ({type(error).__name__}: {error})") from None
    if not isinstance(values, dict):
        raise ApiError(400, "invalid_request", f"found a JSON {type(values).__name__} as the body, expected an object")
    return values


async def _read_body(receive: Receive) -> bytes:
    """The whole body. Raises ApiError if it is too large or the client went away."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ApiError(400, "invalid_request", "the client went away before its body was complete")
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(
                413, "request_too_large", f"found a body over {MAX_BODY_BYTES} bytes, expected a smaller one"
            )
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives the rewritten body first."""
    sent = False

    async def next_message() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


class _Answer:
    """`send` that puts the exchange's failure in the place of vLLM's words for it."""

    def __init__(self, exchange: Exchange, send: Send) -> None:
        self._exchange, self._send = exchange, send
        self._replaced = False

    async def __call__(self, message: Message) -> None:
        failure = self._exchange.failure
        if failure is None:
            return await self._send(message)
        if message["type"] == "http.response.start" and message["status"] >= 400:
            body = json.dumps(failure.body()).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            headers += [(name.lower().encode(), value.encode()) for name, value in failure.headers().items()]
            self._replaced = True
            await self._send({"type": "http.response.start", "status": failure.status, "headers": headers})
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        elif message["type"] == "http.response.body" and not self._replaced:
            told = b"data: " + json.dumps(failure.body()).encode()
            await self._send({**message, "body": _SSE_ERROR.sub(lambda _: told, message.get("body", b""))})
        elif not self._replaced:
            await self._send(message)
