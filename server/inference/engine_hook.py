"""Owns what happens around every engine request of vLLM's handlers: its place on the device, its measures, its end.

`observe` puts itself before `EngineClient.generate`, the one call through which all of vLLM's generating routes reach
the engine, so whatever carries an adapter goes through the residency plan. Invariant: an engine request of an adapter
runs only while it holds a place on the device.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from perft.engine.scheduler import OUTPUT_INVALID
from server.auth.rate_limits import RateLimits
from server.errors import ApiError
from server.inference.request_context import CURRENT, RequestContext
from server.inference.timing import RequestTiming
from server.metrics.counters import REFUSED, EventCounters
from server.registry.service import AdapterService
from server.registry.version import Version, adapter_deleted


@dataclass
class EngineHook:
    """What is around an engine request. base_running: engine requests without an adapter that run now."""

    catalog: AdapterService
    metrics: EventCounters
    limits: RateLimits
    load_timeout_s: float
    base_running: int = 0

    def observe(self, client: EngineClient) -> None:
        """Put this before the client's `generate`, for good."""
        inner = client.generate

        async def generate(
            prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **options: Any
        ) -> AsyncGenerator[Any, None]:
            exchange = CURRENT.get()
            meter = RequestTiming(sampling_params, time.monotonic() if exchange is None else exchange.began)
            reason = "error"
            version: Version | None = None
            try:
                version = self._version(lora_request)
                async with AsyncExitStack() as stack:
                    own_id = f"{request_id}-{uuid4().hex}"  # clients choose theirs: two may be alike
                    await stack.enter_async_context(self._place(version, own_id, exchange))
                    meter.given(prompt)
                    outputs = inner(prompt, sampling_params, own_id, lora_request=lora_request, **options)
                    async for output in await stack.enter_async_context(aclosing(outputs)):
                        reason = meter.saw(output) or reason
                        self._raise_if_failed(output, version)
                        yield output
            except (GeneratorExit, asyncio.CancelledError):
                reason = reason if meter.finished else "abort"
                meter.left()
                raise
            except (VLLMValidationError, ValueError):
                reason = reason if meter.has_seen else REFUSED
                raise
            except ApiError as error:
                reason = error.code
                if exchange is not None:
                    exchange.failure = error
                raise GracefulHTTPError(error.message, HTTPStatus(error.status)) from error
            finally:
                self._end(version, exchange, meter, reason)

        client.generate = generate

    def _version(self, lora_request: Any) -> Version | None:
        if lora_request is None:
            return None
        version = self.catalog.by_id(lora_request.lora_name)
        if version is None:
            raise ApiError(404, "model_not_found", f"found no adapter version {lora_request.lora_name} here", "model")
        return version

    @asynccontextmanager
    async def _place(
        self, version: Version | None, request_id: str, exchange: RequestContext | None
    ) -> AsyncGenerator[None, None]:
        """Hold the version on the device for one engine request."""
        if version is None:
            self.base_running += 1
            try:
                yield
            finally:
                self.base_running -= 1
            return
        if version.is_deleted:
            raise adapter_deleted(version)
        async with self._lease(version, exchange):
            if exchange is not None:
                await exchange.place.aclose()
            if version.is_deleted:
                raise adapter_deleted(version)
            version.running.add(request_id)
            try:
                yield
            finally:
                version.running.discard(request_id)

    def _lease(self, version: Version, exchange: RequestContext | None) -> AbstractAsyncContextManager[None]:
        if exchange is not None and exchange.version is version:
            return exchange.hold(self.catalog.plan, self.load_timeout_s)
        return self.catalog.plan.lease(version.engine, self.load_timeout_s)

    @staticmethod
    def _raise_if_failed(output: Any, version: Version | None) -> None:
        """Raises ApiError for an end that is the adapter's: its output was no number, or it was deleted."""
        if version is None:
            return
        if any(part.stop_reason == OUTPUT_INVALID for part in output.outputs):
            raise ApiError(
                500,
                "adapter_output_invalid",
                f"{version.id} drove the logits to NaN or infinity: the request was ended; look at the adapter's "
                "weights (nobody else is touched)",
                "model",
            )
        if version.is_deleted and any(part.finish_reason == "abort" for part in output.outputs):
            raise adapter_deleted(version)

    def _end(self, version: Version | None, exchange: RequestContext | None, meter: RequestTiming, reason: str) -> None:
        name = None if version is None else version.name
        meter.tell(self.metrics, name)
        prompt, generated = meter.prompt_tokens, meter.generation_tokens
        self.metrics.request_finished(name, reason, prompt, generated, time.monotonic() - meter.began)
        if exchange is not None:
            exchange.used(prompt, generated)
            if not exchange.caller.is_admin:
                self.limits.charge(exchange.caller.label, prompt + generated)
