"""Owns whether a structured-output spec may reach the engine: bounded, then compiled where it can be killed.

A compile has two lanes. The short one takes every spec and gives up early; what it gave up waits for the long one, in
which one spec is compiled at a time. So cheap specs never wait for expensive ones. Invariant: no spec passes that was
not compiled within its limits, and the engine, which compiles it again, gets compiles more slowly than it ends them.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

from server.errors import EngineUnavailableError, InvalidRequestError
from server.structured_outputs.bounds import check_bounds
from server.structured_outputs.key_slots import KeySlots, Label
from server.structured_outputs.spec import Spec, spec_of
from server.structured_outputs.wire import Verdict

SHORT_S = 0.2
"""CPU seconds of the short lane; what took longer is compiled again each time, at the long lane's pace."""
SHORT_SLOTS, LONG_SLOTS = 2, 1
SHORT_REST, LONG_REST = 2.0, 1.0
"""A slot rests for this many times what its compile took: together they keep the engine's one grammar thread (of a
machine with two cores, which a long compile keeps both busy) less than fully busy."""
MAX_WAITING = 64
CACHED = 4096
"""Verdicts kept."""


class SpecCompiler(Protocol):
    """The compile process (`process.CompilerProcess`)."""

    async def compile(self, spec: Spec, cpu_s: float) -> Verdict: ...

    async def close(self) -> None: ...


@dataclass
class _Flight:
    """A compile under way, and how many callers wait for it."""

    task: asyncio.Task[Verdict]
    callers: int = 0


class SpecChecker:
    """max_bytes: of one spec. compile_s: CPU seconds of one compile."""

    def __init__(self, compiler: SpecCompiler, max_bytes: int, compile_s: float) -> None:
        self._compiler, self._max_bytes, self._compile_s = compiler, max_bytes, compile_s
        self._short, self._long = KeySlots(SHORT_SLOTS, MAX_WAITING), KeySlots(LONG_SLOTS, MAX_WAITING)
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._flights: dict[tuple[Label, bytes], _Flight] = {}

    async def close(self) -> None:
        await self._compiler.close()

    def check_bounds(self, structured_outputs: Any) -> None:
        """The cheap half, for vLLM's validation in this process. Raises InvalidRequestError."""
        if (spec := spec_of(structured_outputs)) is not None:
            check_bounds(spec, self._max_bytes)

    async def check(self, sampling_params: Any, label: Label) -> None:
        """Raises InvalidRequestError if the engine must not get this request, EngineUnavailableError if it is unknown.

        label: of the caller's key. Cancelled with its caller: a compile without waiting callers ends.
        """
        structured = getattr(sampling_params, "structured_outputs", None)
        if structured is None or (spec := spec_of(structured, sampling_params.all_stop_token_ids)) is None:
            return
        check_bounds(spec, self._max_bytes)
        verdict = self._verdicts.get(spec.digest)
        if verdict is None:
            verdict = await self._joined(label, spec)
        else:
            self._verdicts.move_to_end(spec.digest)
        self._raise_unless_passed(verdict)

    async def _joined(self, label: Label, spec: Spec) -> Verdict:
        """The verdict, of one compile for all requests of the key that ask for the same at once."""
        key = label, spec.digest
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(self._compiled(label, spec)))
        flight.callers += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.callers -= 1
            if flight.callers == 0 or flight.task.done():
                flight.task.cancel()
                if self._flights.get(key) is flight:
                    del self._flights[key]

    async def _compiled(self, label: Label, spec: Spec) -> Verdict:
        lanes = [(self._short, min(SHORT_S, self._compile_s), SHORT_REST), (self._long, self._compile_s, LONG_REST)]
        for slots, cpu_s, rest in lanes:
            async with slots.hold(label) as hold:
                verdict = await self._compiler.compile(spec, cpu_s)
                hold.rest_s = verdict.cpu_s * rest if verdict.outcome == "passed" else 0.0
            if verdict.outcome != "too_slow":
                break
        if verdict.outcome != "stalled" and (verdict.outcome != "passed" or verdict.cpu_s <= SHORT_S):
            self._verdicts[spec.digest] = verdict
            if len(self._verdicts) > CACHED:
                self._verdicts.popitem(last=False)
        return verdict

    def _raise_unless_passed(self, verdict: Verdict) -> None:
        if verdict.outcome == "passed":
            return
        if verdict.outcome == "stalled":
            message = "the server is too busy to compile the structured-output spec; retry in a few seconds"
            raise EngineUnavailableError(message, retry_after_s=5)
        reasons = {
            "refused": verdict.reason,
            "too_slow": f"it takes more than {self._compile_s:g} s to compile (the setting structured_compile_s)",
            "too_large": "it takes too much memory (the setting structured_memory_bytes)",
            "crashed": "it is too complex to compile",
        }
        raise InvalidRequestError(
            f"the structured-output spec cannot be served: {reasons[verdict.outcome]}; change or simplify it"
        )
