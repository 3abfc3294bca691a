"""Owns the `Engine` on vLLM: its EngineClient, called through public methods and our worker extension."""

import asyncio
import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest

from adapters.ref import AdapterRef
from perft.base_model import BaseShape
from server.engine.protocol import AdapterLoadError, EngineCounters, EngineStatus, LoadedTier, RankInventory

RPC_TIMEOUT_S, PATIENCE_S = 60.0, 5.0
FIRST_POLL_S, LAST_POLL_S = 0.02, 0.5


def lora_request(adapter: AdapterRef) -> LoRARequest:
    """The LoRA request that selects a version in vLLM; name and path are part of vLLM's prefix-cache key."""
    return LoRARequest(adapter.name, adapter.engine_id, str(adapter.folder))


class VllmEngine:
    """See `server.engine.protocol.Engine`."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    async def status(self) -> EngineStatus:
        ranks = await self._ask("perft_status")
        lacking = next((rank for rank in ranks if not rank["moe_layers"]), None)
        if lacking is not None:
            problem = lacking.get("problem", "no MoE layer carries the operator")
            return EngineStatus(0, None, 0, 0, problem=problem)
        return EngineStatus(
            moe_layers=min(rank["moe_layers"] for rank in ranks),
            base=base_shape_of(ranks[0]["base"]),
            rows_total=min(rank["rows_total"] for rank in ranks),
            rows_used=max(rank["rows_used"] for rank in ranks),
            lora_slots=min(rank["lora_slots"] for rank in ranks),
        )

    async def prepare(self, adapter: AdapterRef) -> None:
        started = await self._ask("perft_prepare", adapter.to_wire())
        try:
            await self._finish("prepare", adapter, started)
        except AdapterLoadError:
            await self.drop(adapter)  # it may have succeeded on other ranks
            raise

    async def place(self, adapter: AdapterRef, evict: Sequence[AdapterRef] = ()) -> None:
        started = await self._ask("perft_place", adapter.to_wire(), [leaving.to_wire() for leaving in evict])
        try:
            await self._finish("place", adapter, started)
        except AdapterLoadError:
            await self.evict(adapter)
            raise

    async def evict(self, adapter: AdapterRef) -> None:
        await self._ask("perft_evict", adapter.to_wire())

    async def drop(self, adapter: AdapterRef) -> None:
        await self._ask("perft_drop", adapter.to_wire())

    async def forget(self, adapter: AdapterRef) -> None:
        await self._ask("perft_forget", adapter.engine_id)

    async def counters(self) -> EngineCounters:
        ranks = await self._ask("perft_counters")
        step_load_bytes = sum(rank["step_load_bytes"] for rank in ranks)
        tokens = {int(number): tuple(counts) for number, counts in ranks[0]["expert_tokens"].items()}
        return EngineCounters(step_load_bytes, tokens)

    async def inventory(self) -> list[RankInventory]:
        ranks = await self._ask("perft_inventory")
        return [
            RankInventory(
                host=frozenset(rank["host"]),
                device=frozenset(rank["device"]),
                rows_used=rank["rows_used"],
                moving=frozenset(rank["moving"]),
            )
            for rank in ranks
        ]

    async def discard(self, key: str, tier: LoadedTier) -> None:
        await self._ask("perft_evict_key" if tier == "device" else "perft_drop_key", key)

    async def _finish(self, move: str, adapter: AdapterRef, outcomes: list[dict[str, Any]]) -> None:
        """Poll until every rank has finished a move. Raises AdapterLoadError if one of them failed."""
        pause = FIRST_POLL_S
        ended = [_end_of_move(outcome, move, adapter) for outcome in outcomes]
        while not all(ended):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_POLL_S)
            asked = await self._ask("perft_outcome", move, adapter.to_wire())
            ended = [before or _end_of_move(now, move, adapter) for before, now in zip(ended, asked, strict=True)]
        failed = next((outcome for outcome in ended if outcome and outcome["state"] == "failed"), None)
        if failed is not None:
            raise AdapterLoadError(failed["reason"])

    async def _ask(self, method: str, *arguments: Any) -> list[Any]:
        """Call every rank. Raises TimeoutError if the engine hangs: vLLM's own timeout runs in that process."""
        async with asyncio.timeout(RPC_TIMEOUT_S + PATIENCE_S):
            answers: list[Any] = await self._client.collective_rpc(method, timeout=RPC_TIMEOUT_S, args=arguments)
        return answers


def _end_of_move(outcome: dict[str, Any], move: str, adapter: AdapterRef) -> dict[str, Any] | None:
    """How a move ended on a rank whose end was not reported before; None while it goes on."""
    if outcome["state"] == "reported":
        return {"state": "failed", "reason": f"a worker lost the move ({move} of {adapter.name}); retry"}
    return None if outcome["state"] == "running" else outcome


class VllmProcesses:
    """The engine's own processes (`server.engine.health.EngineProcesses`), as they run when this is made.

    The workers of a tensor-parallel engine are children of these, which end with them.
    """

    NAME = "EngineCore"

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._processes = [each for each in multiprocessing.active_children() if each.name.startswith(self.NAME)]

    def is_dead(self) -> bool:
        return bool(self._client.errored)

    def death(self) -> str:
        ended = [f"process {each.name} ({each.pid}) {_end_of(each.exitcode)}" for each in self._ended()]
        return "; ".join(ended) or f"{self.NAME} met a fatal error, which the log above shows"

    def was_asked_to_end(self) -> bool:
        asked = (0, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
        return bool(self._ended()) and all(each.exitcode in asked for each in self._ended())

    def _ended(self) -> list[BaseProcess]:
        return [each for each in self._processes if each.exitcode is not None]


def _end_of(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended with exit status {exitcode}"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was killed by signal {-exitcode}"


def base_shape_of(values: dict[str, Any]) -> BaseShape:
    """A BaseShape from the plain values in which it travelled between processes."""
    plain = {"dtype": getattr(torch, values["dtype"]), "moe_layers": tuple(values["moe_layers"])}
    return BaseShape(**values | plain)
