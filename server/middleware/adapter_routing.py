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
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.dependencies import Services, services_of
from server.api.error_responses import ApiError, error_response
from server.api.route_table import Route
from server.api.translation.vllm_errors import refusal_of
from server.auth.keys import Caller
from server.bodies.body_fields import BodyFields
from server.bodies.check import BodyCheck
from server.bodies.fields import count_sequences
from server.bodies.models import InvalidItemsError
from server.bodies.receive import ReceivedBody, check_json, receive_body
from server.errors import ConnectionLimitError, InvalidRequestError, ServerError
from server.inference.request_context import CURRENT, RequestContext
from server.inference.selection import selected
from server.middleware.stream_errors import FailureSender
from server.registry.version import Version

LONGEST_STEP_S = 0.005
"""Seconds of checking a body before others go on."""
SHORT = 32
"""Bytes of a field that an error may be about by its value."""
T = TypeVar("T")


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
        received: ReceivedBody | None = None
        try:
            received = await self._receive(scope, receive, services)
            preparing = _prepare(received.content, route, state, services)
            if received.is_large:
                received.content = b""
                prepared = await _unless_client_leaves(receive, preparing)
            else:
                prepared = await preparing
            context = RequestContext(state["caller"], prepared.version, state["facts"], began)
            sender = FailureSender(context, route.dialect, send, prepared.fields, state.get("request_id"))
            async with _admitted(context, route, receive, services):
                await self._forward(context, scope, prepared, _replay(prepared, received, receive), sender)
        except (ServerError, ApiError, RequestValidationError) as error:
            is_of_body = isinstance(error, InvalidRequestError | ConnectionLimitError)
            await error_response(error, scope, None if is_of_body else "model")(scope, receive, send)
        except _ClientLeftError:
            pass
        finally:
            if received is not None:
                received.release()

    @staticmethod
    async def _receive(scope: Scope, receive: Receive, services: Services) -> ReceivedBody:
        """The body, of a type that is read as JSON. Raises ServerError."""
        headers = MutableHeaders(scope=scope)
        check_json(headers.get("content-type"))
        headers["content-type"] = "application/json"  # a request without a type is meant so
        caller: Caller = scope["state"]["caller"]
        whose = caller.client if caller.label is None else f"key {caller.label}"
        return await receive_body(receive, headers, services.bodies.limits, services.bodies.budget, whose)

    async def _forward(
        self, context: RequestContext, scope: Scope, prepared: "_Prepared", receive: Receive, sender: FailureSender
    ) -> None:
        """Let vLLM answer the rewritten body."""
        MutableHeaders(scope=scope)["content-length"] = str(len(prepared.body))
        token = CURRENT.set(context)
        try:
            await self._app(scope, receive, sender)
        except Exception as error:
            if not await sender.send_failure(error):
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
    if route.generates and version is None:
        services.engine_health.check()
    with ExitStack() as kept:
        async with context.first_lease:
            if version is not None:
                try:
                    kept.enter_context(services.registry.lease(version))
                    if route.generates:
                        timeout_s = services.settings.load_timeout_s
                        waiting = context.acquire(services.scheduler, timeout_s)
                        await _unless_client_leaves(receive, services.engine_health.wait(waiting))
                except (ServerError, _ClientLeftError) as error:
                    if route.generates:
                        reason = error.code if isinstance(error, ServerError) else "abort"
                        seconds = time.monotonic() - context.began
                        services.metrics.request_finished(version.name, reason, 0, 0, seconds)
                    raise
            yield


async def _unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do `work` while the client waits. Raises _ClientLeftError; uvicorn reports a disconnect only on `receive`."""
    doing, leaving = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise _ClientLeftError
        return await doing
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.wait((doing, leaving))


async def _disconnected(receive: Receive) -> None:
    """Return when the client goes away; its body was read to the end."""
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True)
class _Prepared:
    """A body as vLLM is to see it. fields: its own, long ones as b"". next_turn: waits until a heavy body may be
    parsed."""

    body: bytes
    fields: dict[str, bytes]
    version: Version | None
    next_turn: Callable[[], Coroutine[Any, Any, None]] | None


async def _prepare(content: bytes, route: Route, state: dict[str, Any], services: Services) -> _Prepared:
    """Look at the body, resolve its model, check it. Raises ServerError or RequestValidationError."""
    check = services.bodies.check_of(route.path, route.generates)
    is_heavy = check.is_heavy(content)
    caller: Caller = state["caller"]
    async with services.bodies.turns.turn() if is_heavy else nullcontext():
        fields = BodyFields(content)
        del content
        model = _model_of(fields)
    version = await selected(services, model, caller)  # it may wait for a store: nobody's turn
    async with services.bodies.turns.turn() if is_heavy else nullcontext():
        if version is not None:
            state["facts"].adapter, state["facts"].version = version.name, version.number
            fields.set("model", version.id)
        try:
            await _check(check, fields)
        except (InvalidRequestError, ApiError, RequestValidationError) as error:
            raise error from None
        if route.generates:
            if "check_room" in state:
                state["check_room"](count_sequences(fields, check.limits))
            _salt(fields, services.cache_salt_secret, caller.label)
        next_turn = services.bodies.turns.step if is_heavy else None
        return _Prepared(fields.json(), _shown(fields), version, next_turn)


def _shown(fields: BodyFields) -> dict[str, bytes]:
    """The fields as errors need them: long ones as b""."""
    return {name: raw if len(raw := fields.raw(name)) <= SHORT else b"" for name in fields.names}


def _model_of(fields: BodyFields) -> str:
    """What the body names as `model`: the base has to be named too. Raises InvalidRequestError if it names nothing."""
    model: str | None = fields.value("model") if fields.kind("model") == "a string" else None
    if not model:
        found = "an empty string" if model == "" else fields.kind("model") if "model" in fields else "no model"
        message = f"found {found}, expected the name of the base or of an adapter; GET /v1/models lists them"
        raise InvalidRequestError(message, param="model")
    return model


def _salt(fields: BodyFields, secret: bytes, label: str | None) -> None:
    """Make the request's cache salt the tenant's own: HMAC(server secret, key label, the client's salt)."""
    if fields.is_null("cache_salt") or (fields.kind("cache_salt") == "a string" and fields.raw("cache_salt") != b'""'):
        text = json.dumps([label, fields.value("cache_salt")])
        fields.set("cache_salt", hmac.digest(secret, text.encode(), "sha256").hex())


async def _check(check: BodyCheck, fields: BodyFields) -> None:
    """Check the fields, with pauses in which others go on. Raises InvalidRequestError or RequestValidationError."""
    clock = asyncio.get_running_loop().time
    began = clock()
    try:
        for _ in check.apply(fields):
            if clock() - began > LONGEST_STEP_S:
                await asyncio.sleep(0)
                began = clock()
    except InvalidItemsError as error:
        raise RequestValidationError(error.errors, body=error.body) from None
    except Exception as error:  # a validator of vLLM's may raise its own errors, which pydantic lets through
        if not hasattr(error, "parameter"):
            raise
        raise refusal_of(error, _shown(fields)) from None


def _replay(prepared: _Prepared, received: ReceivedBody, receive: Receive) -> Receive:
    """A `receive` that returns the rewritten body first; a heavy one when it may be parsed."""
    sent = False

    async def next_message() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        if prepared.next_turn is not None:
            await prepared.next_turn()
        sent = True
        asyncio.get_running_loop().call_soon(received.release)  # then it has been parsed
        return {"type": "http.request", "body": prepared.body, "more_body": False}

    return next_message
