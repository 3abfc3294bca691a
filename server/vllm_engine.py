"""Owns the real `Engine`: vLLM's EngineClient, asked through its public calls and our worker extension."""

from typing import Any

import torch
from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest

from perft.base import BaseShape
from server.engine import EngineStatus
from server.registry import ServedVersion

RPC_TIMEOUT_S = 60.0


def lora_request(version: ServedVersion) -> LoRARequest:
    """The LoRA request an adapter version rides on; name and path are part of vLLM's prefix-cache key."""
    return LoRARequest(version.id, version.engine_id, str(version.adapter.folder))


class VllmEngine:
    """See `server.engine.Engine`."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    async def status(self) -> EngineStatus:
        ranks: list[dict[str, Any]] = await self._client.collective_rpc("perft_status", timeout=RPC_TIMEOUT_S)
        lacking = next((rank for rank in ranks if not rank["moe_layers"]), None)
        if lacking is not None:
            return EngineStatus(0, None, 0, 0, lacking.get("problem", "no MoE layer carries the operator"))
        return EngineStatus(
            moe_layers=min(rank["moe_layers"] for rank in ranks),
            base=base_shape_of(ranks[0]["base"]),
            rows_total=min(rank["rows_total"] for rank in ranks),
            rows_used=max(rank["rows_used"] for rank in ranks),
        )

    async def load(self, version: ServedVersion) -> None:
        await self._client.add_lora(lora_request(version))


def base_shape_of(values: dict[str, Any]) -> BaseShape:
    """A BaseShape that travelled between processes as plain values."""
    plain = {"dtype": getattr(torch, values["dtype"]), "moe_layers": tuple(values["moe_layers"])}
    return BaseShape(**values | plain)
