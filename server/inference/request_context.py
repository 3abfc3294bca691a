"""Owns what one inference request is while it is answered: who asked, which version answers, what it cost.

The gate makes it, vLLM's handler knows nothing of it, and `server.inference.engine_hook` finds it again through a
context variable when the handler asks the engine. Invariant: `failure`, once set, is what the client is told.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from server.auth.keys import Caller
from server.errors import ApiError
from server.middleware.access_log import RequestFacts
from server.registry.version import Version
from server.residency.scheduler import ResidencyScheduler


@dataclass(eq=False)
class RequestContext:
    """One request. began: time.monotonic() of its arrival. place: the device lease that the gate waited for, given up
    once the engine's own request holds one. held: its device leases."""

    caller: Caller
    version: Version | None
    facts: RequestFacts
    began: float
    place: AsyncExitStack = field(default_factory=AsyncExitStack)
    held: int = 0
    failure: ApiError | None = None

    @asynccontextmanager
    async def hold(self, plan: ResidencyScheduler, timeout_s: float) -> AsyncIterator[None]:
        """Hold the version on the device; who holds it already does not wait for it again."""
        assert self.version is not None
        async with plan.lease(self.version.engine, timeout_s, joins=self.held > 0):
            self.held += 1
            try:
                yield
            finally:
                self.held -= 1

    async def take_place(self, plan: ResidencyScheduler, timeout_s: float) -> None:
        """Hold the version on the device until `place` is closed."""
        await self.place.enter_async_context(self.hold(plan, timeout_s))

    def used(self, prompt_tokens: int, generation_tokens: int) -> None:
        """Count tokens of one engine request into the request's line of the log."""
        self.facts.prompt_tokens = (self.facts.prompt_tokens or 0) + prompt_tokens
        self.facts.generation_tokens = (self.facts.generation_tokens or 0) + generation_tokens


CURRENT: ContextVar[RequestContext | None] = ContextVar("perft_exchange", default=None)
