"""Owns how viewers of the console share the metrics: one rendering a second, whoever and however many ask."""

import gzip
import time
from collections.abc import Callable
from typing import Protocol

from starlette.concurrency import run_in_threadpool

from server.sharing.once import OncePerSecond


class Page(Protocol):
    """What renders the metrics. `refresh` asks the workers for their counters; `choice` is slow with many adapters."""

    async def refresh(self) -> None: ...

    def choice(self, adapter: str | None) -> bytes: ...


class SharedMetrics:
    """The metrics of the console (server.api.dependencies.SharedMetrics). clock: monotonic seconds."""

    def __init__(self, page: Page, clock: Callable[[], float] = time.monotonic) -> None:
        self._page = page
        self._refreshed = OncePerSecond[None, None](clock)
        self._rendered = OncePerSecond[str | None, tuple[bytes, bytes]](clock)

    async def text(self, adapter: str | None = None) -> tuple[bytes, bytes]:
        """The choice of all adapters' metrics, or one adapter's series: as they are, and compressed with gzip.

        The workers are asked for one adapter alone, whose experts only they count; that takes time between two steps.
        """
        return await self._rendered.result(adapter, lambda: self._render(adapter))

    async def _render(self, adapter: str | None) -> tuple[bytes, bytes]:
        if adapter is not None:
            await self._refreshed.result(None, self._page.refresh)
        return await run_in_threadpool(self._rendering, adapter)

    def _rendering(self, adapter: str | None) -> tuple[bytes, bytes]:
        plain = self._page.choice(adapter)
        return plain, gzip.compress(plain, compresslevel=1)
