"""Owns what one inference request is while it is answered: its caller, the version that answers, what it used.

`middleware/adapter_routing` makes it, vLLM's handler knows nothing of it, and `inference/engine_hook` finds it again
through a context variable when the handler calls the engine. Invariant: `failure`, once set, is what the client gets.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from server.auth.keys import Caller
from server.errors import ServerError
from server.registry.version import Version
from server.residency.scheduler import ResidencyScheduler


@dataclass
class RequestFacts:
    """What the server learns of a request on its way (scope["state"]["facts"]); the access log writes it at the end."""

    adapter: str | None = None
    version: int | None = None
    prompt_tokens: int | None = None
    generation_tokens: int | None = None


@dataclass(eq=False)
class RequestContext:
    """One request. began: its arrival (monotonic seconds). first_lease: the device lease that the middleware waited
    for, taken over by the first sequence. leases: device leases held now. refusal: by which the engine
    refused the request's parameters."""

    caller: Caller
    version: Version | None
    facts: RequestFacts
    began: float
    first_lease: AsyncExitStack = field(default_factory=AsyncExitStack)
    has_first_lease: bool = False
    leases: int = 0
    sequences: int = 0
    """Sequences that its calls of the engine ask for now."""
    failure: ServerError | None = None
    refusal: Exception | None = None

    @asynccontextmanager
    async def lease(self, scheduler: ResidencyScheduler, timeout_s: float) -> AsyncIterator[None]:
        """Hold the version on the device; a request that holds it already does not wait behind others' adapters."""
        assert self.version is not None
        async with scheduler.lease(self.version.ref, timeout_s, self.leases > 0, self.caller.label):
            self.leases += 1
            try:
                yield
            finally:
                self.leases -= 1

    async def acquire(self, scheduler: ResidencyScheduler, timeout_s: float) -> None:
        """Hold the version on the device until `first_lease` is closed, or a sequence has taken it over."""
        await self.first_lease.enter_async_context(self.lease(scheduler, timeout_s))
        self.has_first_lease = True

    @asynccontextmanager
    async def sequence_lease(self, scheduler: ResidencyScheduler, timeout_s: float) -> AsyncIterator[None]:
        """Hold the version on the device for one sequence: by the first lease, if no other sequence took it over."""
        async with AsyncExitStack() as stack:
            if self.has_first_lease:
                self.has_first_lease = False
                await stack.enter_async_context(self.first_lease.pop_all())
            else:
                await stack.enter_async_context(self.lease(scheduler, timeout_s))
                await self.first_lease.aclose()
            yield

    def add_tokens(self, prompt_tokens: int, generation_tokens: int) -> None:
        """Count the tokens of one engine request into the request's line of the access log."""
        self.facts.prompt_tokens = (self.facts.prompt_tokens or 0) + prompt_tokens
        self.facts.generation_tokens = (self.facts.generation_tokens or 0) + generation_tokens


CURRENT: ContextVar[RequestContext | None] = ContextVar("perft_request", default=None)
