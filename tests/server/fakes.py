"""A fake engine, for fast tests of routes, names and residency; no test of answers uses it.

It tracks what is where and holds its caller to the rules of `server.engine.protocol`: a broken rule raises an
AssertionError, and stays in `broken_rules` in case a background task swallows that.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.ref import AdapterRef
from perft.base_model import BaseShape
from perft.config import AdapterConfig
from perft.operator.tables import adapter_rows
from server.engine.protocol import AdapterLoadError, EngineCounters, EngineStatus, LoadedTier, RankInventory

BASE = BaseShape(
    hidden_size=8, num_layers=2, moe_layers=(0, 1), num_experts=4, top_k=2, dtype=torch.float32, fingerprint="0" * 64
)


def ready_status(rows_total: int = 1000, lora_slots: int = 0) -> EngineStatus:
    """What a healthy engine with `rows_total` rows says."""
    return EngineStatus(2, BASE, rows_total, 0, lora_slots)


@dataclass
class FakeEngine:
    """An engine with scripted answers, delays and failures.

    delays: seconds of each operation ("prepare", "place", ...). holds: a file for an operation, which waits for as long
    as the file is there. failures: (operation, NAME@version) -> how many more
    times it fails. calls: the calls so far, as (operation, NAME@version).
    """

    answer: EngineStatus = field(default_factory=ready_status)
    down: bool = False
    delays: dict[str, float] = field(default_factory=dict)
    holds: dict[str, Path] = field(default_factory=dict)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    counted: EngineCounters = field(default_factory=EngineCounters)
    calls: list[tuple[str, str]] = field(default_factory=list)
    on_host: set[str] = field(default_factory=set)
    on_device: dict[str, int] = field(default_factory=dict)
    running: Counter[str] = field(default_factory=Counter)
    most_rows: int = 0
    evictions: int = 0
    broken_rules: list[str] = field(default_factory=list)
    _known: dict[int, AdapterRef] = field(default_factory=dict)
    _forgotten: set[int] = field(default_factory=set)

    async def status(self) -> EngineStatus:
        await self._work("status")
        return replace(self.answer, rows_used=self.rows_used)

    async def counters(self) -> EngineCounters:
        await self._work("counters")
        return self.counted

    async def inventory(self) -> list[RankInventory]:
        await self._work("inventory")
        return [RankInventory(frozenset(self.on_host), frozenset(self.on_device), self.rows_used)]

    async def discard(self, key: str, tier: LoadedTier) -> None:
        self.calls.append(("discard", f"{tier} {key}"))
        await self._work("discard")
        if tier == "host":
            self.on_host.discard(key)
        else:
            self._rule(not self.running[key], f"discard of {key}, which a request runs on")
            self.on_device.pop(key, None)

    async def prepare(self, adapter: AdapterRef) -> None:
        self._meet("prepare", adapter)
        await self._work("prepare", adapter)
        if not (adapter.folder / CONFIG_FILE).is_file() or not (adapter.folder / WEIGHTS_FILE).is_file():
            raise AdapterLoadError(f"found no adapter in {adapter.folder}")
        self.on_host.add(adapter.key)

    async def place(self, adapter: AdapterRef, evict: Sequence[AdapterRef] = ()) -> None:
        self._meet("place", adapter)
        for leaving in evict:
            self._leave("place", leaving)
        self._rule(adapter.key in self.on_host, f"place of {adapter.name}, which is not on the host")
        if adapter.key in self.on_device:
            return await self._work("place", adapter)
        self.on_device[adapter.key] = rows_of(adapter)
        self.most_rows = max(self.most_rows, self.rows_used)
        rows_fit = self.rows_used <= self.answer.rows_total
        self._rule(rows_fit, f"place of {adapter.name}: {self.rows_used} rows of {self.answer.rows_total}")
        lora = sum(rows == 0 for rows in self.on_device.values())
        self._rule(lora <= self.answer.lora_slots, f"place of {adapter.name}: {lora} of {self.answer.lora_slots} slots")
        try:
            await self._work("place", adapter)
        except AdapterLoadError:
            del self.on_device[adapter.key]
            raise

    async def evict(self, adapter: AdapterRef) -> None:
        self._meet("evict", adapter)
        self._leave("evict", adapter)
        await self._work("evict", adapter)

    async def drop(self, adapter: AdapterRef) -> None:
        self._meet("drop", adapter)
        self._rule(adapter.key in self.on_host, f"drop of {adapter.name}, which is not on the host")
        await self._work("drop", adapter)
        self.on_host.discard(adapter.key)

    async def forget(self, adapter: AdapterRef) -> None:
        self._meet("forget", adapter)
        await self._work("forget", adapter)
        self._known.pop(adapter.engine_id, None)
        self._forgotten.add(adapter.engine_id)

    def restart(self) -> None:
        """Become a new process: nothing is resident, no id is known."""
        for kept in (self.on_host, self.on_device, self.running, self._known, self._forgotten):
            kept.clear()

    @asynccontextmanager
    async def request(self, adapter: AdapterRef | None) -> AsyncIterator[None]:
        """A request that runs on `adapter` (None: on the base) for as long as the context lasts."""
        if adapter is None:
            yield
            return
        self._meet("request", adapter)
        self._rule(adapter.key in self.on_device, f"a request on {adapter.name}, which is not on the device")
        self.running[adapter.key] += 1
        try:
            yield
        finally:
            self._rule(adapter.key in self.on_device, f"{adapter.name} left the device under a running request")
            self.running[adapter.key] -= 1

    @property
    def rows_used(self) -> int:
        """Rows of the device that are taken now."""
        return sum(self.on_device.values())

    def count(self, operation: str) -> int:
        """How often `operation` was called."""
        return sum(done == operation for done, _ in self.calls)

    def _meet(self, operation: str, adapter: AdapterRef) -> None:
        """Record a call, and check that an id means one version for ever."""
        self.calls.append((operation, adapter.name))
        self._rule(adapter.engine_id not in self._forgotten, f"{operation} of {adapter.name}, whose id was forgotten")
        known = self._known.setdefault(adapter.engine_id, adapter)
        self._rule(known == adapter, f"{operation}: id {adapter.engine_id} is {known.name} and {adapter.name}")

    def _leave(self, operation: str, adapter: AdapterRef) -> None:
        self._rule(adapter.key in self.on_device, f"{operation} evicts {adapter.name}, which is not on the device")
        self._rule(not self.running[adapter.key], f"{operation} evicts {adapter.name}, which a request runs on")
        del self.on_device[adapter.key]
        self.evictions += 1

    def _rule(self, kept: bool, otherwise: str) -> None:
        if not kept:
            self.broken_rules.append(otherwise)
            raise AssertionError(otherwise)

    async def _work(self, operation: str, adapter: AdapterRef | None = None) -> None:
        """Take the scripted time, then fail if that is scripted."""
        await asyncio.sleep(self.delays.get(operation, 0))
        while operation in self.holds and self.holds[operation].exists():
            await asyncio.sleep(0.01)
        if self.down:
            raise RuntimeError("engine dead")
        if adapter is not None and self.failures[operation, adapter.name] > 0:
            self.failures[operation, adapter.name] -= 1
            raise AdapterLoadError(f"told to fail: {operation} of {adapter.name}")


def rows_of(adapter: AdapterRef) -> int:
    """Rows of the device pool that `adapter` takes on BASE; a PEFT LoRA adapter takes a slot and no row."""
    if adapter.kind == "LORA":
        return 0
    config = AdapterConfig.model_validate_json((adapter.folder / CONFIG_FILE).read_bytes())
    return adapter_rows(config, BASE.moe_layers)
