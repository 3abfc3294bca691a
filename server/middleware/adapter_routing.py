"""Owns what happens to an inference request before vLLM sees it: its `model` is resolved ONCE, to a version that is
then leased and named in the body, its cache salt becomes the tenant's own, and it waits until its adapter is on the
device.

An ASGI middleware inside access control. Invariant: vLLM sees either the base's name or NAME@version of a version whose
lease is held; what a client wrote as `model` decides nothing after this.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.format.strict_json import json_kind
from server.api.dependencies import Services, services_of
from server.api.error_responses import ApiError, as_api_error
from server.api.route_table import Route
from server.auth.keys import Caller
from server.errors import InvalidRequestError, ServerError
from server.inference.request_context import CURRENT, RequestContext
from server.middleware.stream_errors import FailureSender
from server.registry.registry import Registry
from server.registry.version import Version

MAX_BODY_BYTES = 64 * 1024**2


class AdapterRouting:
    """See the module."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route: Route | None = scope.get("state", {}).get("route") if scope["type"] == "http" else None
        if route is None or not route.selects_model:
            return await self._app(scope, receive, send)
        services = services_of(scope["app"])
        assert services is not None, "access control rejects every request until there are services"
        state = scope["state"]
        began = time.monotonic()
        try:
            values = _parse(await _read_body(receive))
            version = _resolve(values, services.registry, state["caller"])
            if version is not None:
                state["facts"].adapter, state["facts"].version = version.name, version.number
                values["model"] = version.id
            if route.generates:
                _salt(values, services.cache_salt_secret, state["caller"].label)
            body = _serialize(values)
            context = RequestContext(state["caller"], version, state["facts"], began)
            async with _admitted(context, route, receive, services):
                await self._forward(context, scope, body, receive, FailureSender(context, route.path, send))
        except (ServerError, ApiError) as error:
            await as_api_error(error, field="model").response()(scope, receive, send)
        except _ClientLeftError:
            pass

    async def _forward(
        self, context: RequestContext, scope: Scope, body: bytes, receive: Receive, sender: FailureSender
    ) -> None:
        """Let vLLM answer the rewritten body."""
        MutableHeaders(scope=scope)["content-length"] = str(len(body))
        token = CURRENT.set(context)
        try:
            await self._app(scope, _replay(body, receive), sender)
        except Exception:
            if not await sender.send_failure():
                raise
        finally:
            CURRENT.reset(token)


class _ClientLeftError(Exception):
    """The client has gone away."""


@asynccontextmanager
async def _admitted(context: RequestContext, route: Route, receive: Receive, services: Services) -> AsyncIterator[None]:
    """Keep the version alive and, where the route generates, wait until it is on the device; the engine request takes
    over that lease. Raises ServerError, or _ClientLeftError."""
    version = context.version
    with ExitStack() as kept:
        async with context.first_lease:
            if version is not None:
                try:
                    kept.enter_context(services.registry.lease(version))
                    if route.generates:
                        timeout_s = services.settings.load_timeout_s
                        await _unless_client_leaves(receive, context.acquire(services.scheduler, timeout_s))
                except (ServerError, _ClientLeftError) as error:
                    if route.generates:
                        reason = error.code if isinstance(error, ServerError) else "abort"
                        seconds = time.monotonic() - context.began
                        services.metrics.request_finished(version.name, reason, 0, 0, seconds)
                    raise
            yield


async def _unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work` while the client waits. Raises _ClientLeftError; uvicorn reports a disconnect only on `receive`."""
    doing, leaving = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise _ClientLeftError
        await doing
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.wait((doing, leaving))


async def _disconnected(receive: Receive) -> None:
    """Return when the client goes away; its body was read to the end."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _resolve(values: dict[str, Any], registry: Registry, caller: Caller) -> Version | None:
    """The version that `model` selects; None for the base, which has to be named too.

    Raises InvalidRequestError if no model is named, ModelNotFoundError if there is none of that name.
    """
    model = values.get("model")
    if not isinstance(model, str) or not model:
        found = "no model" if "model" not in values else "an empty string" if model == "" else json_kind(model)
        message = f"found {found}, expected the name of the base or of an adapter; GET /v1/models lists them"
        raise InvalidRequestError(message, param="model")
    return registry.resolve(model, caller)


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
        raise _not_json(error) from None
    if not isinstance(values, dict):
        raise ApiError(400, "invalid_request", f"found {json_kind(values)} as the body, expected a JSON object")
    return values


def _serialize(values: dict[str, Any]) -> bytes:
    """The body that vLLM reads. Raises ApiError for nesting that could just be parsed, but not be written again."""
    try:
        return json.dumps(values).encode()
    except RecursionError as error:
        raise _not_json(error) from None


def _not_json(error: Exception) -> ApiError:
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return ApiError(400, "invalid_request", f"the body is not valid JSON: {reason}")


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
    """A `receive` that returns the rewritten body first."""
    sent = False

    async def next_message() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message
