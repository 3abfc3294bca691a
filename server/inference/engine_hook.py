"""Owns what happens around every engine request of vLLM's handlers: its lease on the device, its measurements, its end.

`install` wraps `EngineClient.generate`, the one call through which all of vLLM's generating routes reach the
engine, so whatever carries an adapter goes through the residency scheduler. Invariant: an engine request of an adapter
runs only while it holds a lease on the device.
"""

import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError

from perft.engine.scheduler import OUTPUT_INVALID
from server.auth.rate_limits import RateLimits
from server.engine.health import EngineHealth
from server.errors import (
    AdapterOutputInvalidError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelNotFoundError,
    ServerError,
)
from server.inference.engine_call import EngineCall
from server.inference.request_context import CURRENT, RequestContext
from server.inference.timing import RequestMetrics
from server.registry.registry import Registry
from server.registry.version import Version, adapter_deleted
from server.residency.scheduler import ResidencyScheduler

REFUSED = "invalid_request"
"""The finish reason of a request whose parameters vLLM's engine rejected."""


async def _refuse_every_spec(sampling_params: Any, label: str | None) -> None:
    """Where nothing checks specs, none is served."""
    if getattr(sampling_params, "structured_outputs", None) is not None:
        raise EngineUnavailableError("structured outputs are not served here")


@dataclass
class EngineHook:
    """Wraps every engine request. base_running: requests without an adapter that run now.

    as_vllm_error: the exception that makes vLLM's handler answer with one of our errors. health: of the engine, with
    which every request ends. check_spec: raises a ServerError unless the engine may get the request's structured
    outputs (its sampling parameters, the label of its key).
    """

    registry: Registry
    scheduler: ResidencyScheduler
    metrics: RequestMetrics
    rate_limits: RateLimits
    load_timeout_s: float
    as_vllm_error: Callable[[ServerError], Exception]
    base_running: int = 0
    check_spec: Callable[[Any, str | None], Awaitable[None]] = _refuse_every_spec
    health: EngineHealth = field(default_factory=lambda: EngineHealth(math.inf))

    def install(self, client: EngineClient) -> None:
        """Wrap the client's `generate` permanently."""
        inner = client.generate

        async def generate(
            prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **options: Any
        ) -> AsyncGenerator[Any, None]:
            context = CURRENT.get()
            request = _Request(self, client, partial(inner, lora_request=lora_request, **options), context)
            began = time.monotonic() if context is None else context.began
            own_id = f"{request_id}-{uuid4().hex}"  # clients choose theirs: two may be equal
            call = EngineCall(request, prompt, sampling_params, own_id, began)
            failure: Exception | None = None
            try:
                request.version = self._version(lora_request)
                await self.check_spec(sampling_params, None if context is None else context.caller.label)
                request.count_in(call)
                async for output in call.outputs():
                    yield output
            except Exception as error:
                failure = error
                if isinstance(error, ServerError):
                    if context is not None:
                        context.failure = error
                    raise self.as_vllm_error(error) from error
                if _is_refusal(error, call) and context is not None:
                    context.refusal = error
                raise
            finally:
                await call.end(failure)

        client.generate = generate

    def _version(self, lora_request: Any) -> Version | None:
        if lora_request is None:
            return None
        version = self.registry.by_id(lora_request.lora_name)
        if version is None:
            raise ModelNotFoundError(lora_request.lora_name)
        return version


@dataclass(eq=False)
class _Request:
    """One call of `generate` (server.inference.engine_call.Surroundings). inner: vLLM's own."""

    hook: EngineHook
    client: EngineClient
    inner: Callable[[Any, Any, str], AsyncGenerator[Any, None]]
    context: RequestContext | None
    version: Version | None = None
    running_sequences: int = 0
    counted: ExitStack = field(default_factory=ExitStack)
    """Ends what was counted in for the caller's limits."""

    def count_in(self, call: EngineCall) -> None:
        """Count the call among what its key uses. Raises RateLimitedError."""
        context, limits = self.context, self.hook.rate_limits
        if context is None or context.caller.is_admin:
            return
        label = context.caller.label
        is_first = not context.sequences
        if is_first and context.facts.prompt_tokens is None:
            limits.check(label)
        further = call.sequences - is_first  # access control counted the request itself
        limits.claim(label, further)
        self.counted.callback(limits.leave, label, further)
        context.sequences += call.sequences
        self.counted.callback(self._count_out, context, call.sequences)
        self.counted.enter_context(limits.metered(label, call.tokens))

    @staticmethod
    def _count_out(context: RequestContext, sequences: int) -> None:
        context.sequences -= sequences

    @asynccontextmanager
    async def running(self, request_id: str) -> AsyncGenerator[None, None]:
        """Hold a sequence of the engine, and the version on the device, for one engine request."""
        async with AsyncExitStack() as stack:
            await self.hook.health.wait(stack.enter_async_context(self._lease()))
            if self.version is not None:
                if self.version.is_deleted:
                    raise adapter_deleted(self.version)
                self.version.running.add(request_id)
                stack.callback(self.version.running.discard, request_id)
            self._count_running(1)
            stack.callback(self._count_running, -1)
            yield

    def _count_running(self, sequences: int) -> None:
        """Count the call as one request that runs, from its first sequence to its last."""
        before, self.running_sequences = self.running_sequences, self.running_sequences + sequences
        change = bool(self.running_sequences) - bool(before)
        if self.version is None:
            self.hook.base_running += change
        else:
            self.version.requests_running += change

    @asynccontextmanager
    async def _lease(self) -> AsyncGenerator[None, None]:
        hook, version, context = self.hook, self.version, self.context
        label = None if context is None else context.caller.label
        if version is None:
            async with hook.scheduler.base_lease(label):
                yield
            return
        if version.is_deleted:
            raise adapter_deleted(version)
        if context is not None and context.version is version:
            lease: AbstractAsyncContextManager[None] = context.sequence_lease(hook.scheduler, hook.load_timeout_s)
        else:
            lease = hook.scheduler.lease(version.ref, hook.load_timeout_s, label=label)
        async with lease:
            yield

    def start(self, prompt: Any, params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        return self.hook.health.outputs(self.inner(prompt, params, request_id))

    async def abort(self, request_ids: list[str]) -> None:
        await self.client.abort(request_ids)

    def generated_so_far(self, request_id: str) -> int:
        processor = getattr(self.client, "output_processor", None)
        if processor is None:
            return 0
        found = (processor.request_states.get(own) for own in processor.external_req_ids.get(request_id, ()))
        return sum(state.detokenizer.num_output_tokens() for state in found if state is not None and state.detokenizer)

    def check(self, output: Any, params: Any) -> None:
        """Raises ServerError for an end before its time: the adapter's output was not finite, it was deleted, or the
        engine was stopped."""
        _raise_if_grammar_failed(output, params)
        version = self.version
        is_aborted = any(part.finish_reason == "abort" and part.stop_reason is None for part in output.outputs)
        if is_aborted and (version is None or not version.is_deleted):
            raise EngineUnavailableError("the engine was stopped before the request was finished", retry_after_s=5)
        if version is None:
            return
        if any(part.stop_reason == OUTPUT_INVALID for part in output.outputs):
            raise AdapterOutputInvalidError(
                f"{version.id} drove the logits to NaN or infinity, so the request was ended; check the adapter's "
                "weights (no other request is affected)"
            )
        if is_aborted:
            raise adapter_deleted(version)

    def ended(self, call: EngineCall) -> None:
        self.counted.close()
        timing, metrics = call.timing, self.hook.metrics
        name = None if self.version is None else self.version.name
        timing.report(metrics, name)
        prompt, generated = timing.prompt_tokens, timing.generation_tokens
        seconds = time.monotonic() - timing.began
        metrics.request_finished(name, _reason(call), prompt, generated, seconds)
        if self.context is not None:
            self.context.add_tokens(prompt, generated)


def _reason(call: EngineCall) -> str:
    """How a call ended, for the metrics."""
    error = call.error
    if error is None:
        return call.finish_reason or "abort"
    if isinstance(error, ServerError):
        return error.code
    return REFUSED if _is_refusal(error, call) else "error"


def _is_refusal(error: Exception, call: EngineCall) -> bool:
    """Whether the engine refused the request's parameters."""
    return isinstance(error, VLLMValidationError | ValueError) and not call.timing.has_output


def _raise_if_grammar_failed(output: Any, sampling_params: Any) -> None:
    """Raises InvalidRequestError for an end that the request's own grammar caused: the engine reports no reason."""
    if getattr(sampling_params, "structured_outputs", None) is not None and any(
        part.finish_reason == "error" and part.stop_reason is None for part in output.outputs
    ):
        raise InvalidRequestError(
            "the structured-output spec ended the request: no token fits it any more, or it takes too long to choose "
            "one; change or simplify it"
        )
