"""Owns what happens around every engine request of vLLM's handlers: its lease on the device, its measurements, its end.

`install` wraps `EngineClient.generate`, the one call through which all of vLLM's generating routes reach the
engine, so whatever carries an adapter goes through the residency scheduler. Invariant: an engine request of an adapter
runs only while it holds a lease on the device.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError

from perft.engine.scheduler import OUTPUT_INVALID
from server.auth.rate_limits import RateLimits
from server.errors import AdapterOutputInvalidError, ModelNotFoundError, ServerError
from server.inference.request_context import CURRENT, RequestContext
from server.inference.timing import RequestMetrics, RequestTiming
from server.registry.registry import Registry
from server.registry.version import Version, adapter_deleted
from server.residency.scheduler import ResidencyScheduler

REFUSED = "invalid_request"
"""The finish reason of a request whose parameters vLLM's engine rejected."""


@dataclass
class EngineHook:
    """Wraps every engine request. base_running: engine requests without an adapter that run now.

    as_vllm_error: the exception that makes vLLM's handler answer with one of our errors.
    """

    registry: Registry
    scheduler: ResidencyScheduler
    metrics: RequestMetrics
    rate_limits: RateLimits
    load_timeout_s: float
    as_vllm_error: Callable[[ServerError], Exception]
    base_running: int = 0

    def install(self, client: EngineClient) -> None:
        """Wrap the client's `generate` permanently."""
        inner = client.generate

        async def generate(
            prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **options: Any
        ) -> AsyncGenerator[Any, None]:
            context = CURRENT.get()
            timing = RequestTiming(sampling_params, time.monotonic() if context is None else context.began)
            reason = "error"
            version: Version | None = None
            try:
                version = self._version(lora_request)
                async with AsyncExitStack() as stack:
                    own_id = f"{request_id}-{uuid4().hex}"  # clients choose theirs: two may be equal
                    await stack.enter_async_context(self._running(version, own_id, context))
                    timing.submitted(prompt)
                    outputs = inner(prompt, sampling_params, own_id, lora_request=lora_request, **options)
                    async for output in await stack.enter_async_context(aclosing(outputs)):
                        reason = timing.add_output(output) or reason
                        self._raise_if_failed(output, version)
                        yield output
            except (GeneratorExit, asyncio.CancelledError):
                reason = reason if timing.finished else "abort"
                timing.abandoned()
                raise
            except (VLLMValidationError, ValueError):
                reason = reason if timing.has_output else REFUSED
                raise
            except ServerError as error:
                reason = error.code
                if context is not None:
                    context.failure = error
                raise self.as_vllm_error(error) from error
            finally:
                self._finish(version, context, timing, reason)

        client.generate = generate

    def _version(self, lora_request: Any) -> Version | None:
        if lora_request is None:
            return None
        version = self.registry.by_id(lora_request.lora_name)
        if version is None:
            raise ModelNotFoundError(lora_request.lora_name)
        return version

    @asynccontextmanager
    async def _running(
        self, version: Version | None, request_id: str, context: RequestContext | None
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
        async with self._lease(version, context):
            if context is not None:
                await context.first_lease.aclose()
            if version.is_deleted:
                raise adapter_deleted(version)
            version.running.add(request_id)
            try:
                yield
            finally:
                version.running.discard(request_id)

    def _lease(self, version: Version, context: RequestContext | None) -> AbstractAsyncContextManager[None]:
        if context is not None and context.version is version:
            return context.lease(self.scheduler, self.load_timeout_s)
        return self.scheduler.lease(version.ref, self.load_timeout_s)

    @staticmethod
    def _raise_if_failed(output: Any, version: Version | None) -> None:
        """Raises ServerError for an end that the adapter caused: its output was not finite, or it was deleted."""
        if version is None:
            return
        if any(part.stop_reason == OUTPUT_INVALID for part in output.outputs):
            raise AdapterOutputInvalidError(
                f"{version.id} drove the logits to NaN or infinity, so the request was ended; check the adapter's "
                "weights (no other request is affected)"
            )
        if version.is_deleted and any(part.finish_reason == "abort" for part in output.outputs):
            raise adapter_deleted(version)

    def _finish(
        self, version: Version | None, context: RequestContext | None, timing: RequestTiming, reason: str
    ) -> None:
        name = None if version is None else version.name
        timing.report(self.metrics, name)
        prompt, generated = timing.prompt_tokens, timing.generation_tokens
        self.metrics.request_finished(name, reason, prompt, generated, time.monotonic() - timing.began)
        if context is not None:
            context.add_tokens(prompt, generated)
            if not context.caller.is_admin:
                self.rate_limits.charge(context.caller.label, prompt + generated)
