"""Owns polling the workers: their counters, and whether they hold what the server expects.

Invariant: one poll at a time; while the engine does not answer, the last known values stay.
"""

import asyncio
import logging
from collections.abc import Mapping
from itertools import zip_longest

from server.engine.protocol import Engine, EngineCounters, EngineStatus
from server.metrics.counters import EventCounters
from server.metrics.exposition import clear_vllms_adapter_lists
from server.residency.reconciliation import Reconciler

POLL_EVERY_S = 5.0
ANSWER_TIMEOUT_S = 1.0
"""Seconds that a scrape waits for the workers, which answer between two steps."""

logger = logging.getLogger(__name__)


class EngineMonitor:
    """Polls the engine. names: engine id of every version that is served -> its bare name (live)."""

    def __init__(
        self,
        engine: Engine,
        status: EngineStatus,
        metrics: EventCounters,
        reconciler: Reconciler,
        names: Mapping[int, str],
    ) -> None:
        self._engine, self._metrics, self._reconciler, self._names = engine, metrics, reconciler, names
        self.status, self.counters = status, EngineCounters()
        self._last_error = ""
        self._poll_task: asyncio.Task[None] | None = None
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._loop_task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        for task in (self._loop_task, self._poll_task):
            if task is not None:
                task.cancel()

    async def refresh(self) -> None:
        """Poll now; the last known values stay if the workers do not answer in time."""
        if self._poll_task is None or self._poll_task.done():
            self._poll_task = asyncio.get_running_loop().create_task(self._poll())
        await asyncio.wait([self._poll_task], timeout=ANSWER_TIMEOUT_S)

    async def _run(self) -> None:
        while True:
            await self.refresh()
            clear_vllms_adapter_lists()
            await asyncio.sleep(POLL_EVERY_S)

    async def _poll(self) -> None:
        try:
            self.status = await self._engine.status()
            before, self.counters = self.counters, await self._engine.counters()
            self._count_experts(before.expert_tokens, self.counters.expert_tokens)
            await self._reconciler.run()
        except Exception as error:  # an engine that is down, most of all: /ready says so
            if repr(error) != self._last_error:
                logger.warning("the engine could not be polled: %r", error)
            self._last_error = repr(error)
        else:
            self._last_error = ""

    def _count_experts(self, before: Mapping[int, tuple[int, ...]], now: Mapping[int, tuple[int, ...]]) -> None:
        """Count the tokens of each expert since the last poll, for every version that still exists."""
        for engine_id, tokens in now.items():
            known = before.get(engine_id, ())
            if engine_id in self._names and tokens != known:
                grown = [count - then for count, then in zip_longest(tokens, known, fillvalue=0)]
                self._metrics.experts_worked(self._names[engine_id], grown)
