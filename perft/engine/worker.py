"""Owns what other processes may ask a worker (vLLM's `worker_extension_cls`, reached through `collective_rpc`).

Every call returns at once: what takes time is started, and asked for again with `perft_outcome`. Values that travel
are plain dicts.
"""

from dataclasses import asdict
from typing import Any

from adapters.ref import AdapterRef
from perft.engine.manager import AdapterManager
from perft.engine.moe_layer import PerftMoERunner


class PerftWorkerExtension:
    """Mixed into vLLM's worker; every method begins with `perft_`."""

    model_runner: Any

    def perft_status(self) -> dict[str, Any]:
        """How many MoE layers carry the operator on this rank, the base's shape, and the pool.

        moe_layers is 0 where our manager or our layers did not take effect: such a server must not serve.
        """
        manager = getattr(self.model_runner, "lora_manager", None)
        if not isinstance(manager, AdapterManager):
            return {"moe_layers": 0, "problem": f"the worker's adapter manager is {type(manager).__name__}"}
        self._prepare_zeroing()
        carrying = [r for r in manager.runners.values() if isinstance(r, PerftMoERunner) and r.perft is manager.step]
        base = manager.base
        return {
            "moe_layers": len(carrying),
            "base": {**base.__dict__, "dtype": str(base.dtype).removeprefix("torch.")},
            "rows_total": manager.pool.total,
            "rows_used": manager.pool.used,
            "lora_slots": manager.lora_slots,
        }

    def perft_prepare(self, order: dict[str, Any]) -> dict[str, Any]:
        """Start bringing an adapter from disk to the host."""
        return asdict(self._manager.prepare(AdapterRef.from_wire(order)))

    def perft_place(self, order: dict[str, Any], evict: list[dict[str, Any]]) -> dict[str, Any]:
        """Free the rows of `evict`, then start bringing an adapter from the host to rows that are free."""
        for leaving in evict:
            self._manager.evict(AdapterRef.from_wire(leaving))
        return asdict(self._manager.place(AdapterRef.from_wire(order)))

    def perft_outcome(self, move: str, order: dict[str, Any]) -> dict[str, Any]:
        """How a started move ("prepare" or "place") stands; its end is told once."""
        return asdict(self._manager.outcome(move, AdapterRef.from_wire(order)))

    def perft_evict(self, order: dict[str, Any]) -> None:
        """Free an adapter's device rows."""
        self._manager.evict(AdapterRef.from_wire(order))

    def perft_drop(self, order: dict[str, Any]) -> None:
        """Free the host's copy of an adapter."""
        self._manager.drop(AdapterRef.from_wire(order))

    def perft_forget(self, engine_id: int) -> None:
        """Forget a version for ever."""
        self._manager.forget(engine_id)

    def perft_counters(self) -> dict[str, Any]:
        """Bytes read inside steps, and tokens per expert by version id."""
        manager = self._manager
        return {"step_load_bytes": manager.step_load_bytes, "expert_tokens": manager.expert_counts.read()}

    def _prepare_zeroing(self) -> None:
        """Let an accelerator's runner zero cache blocks when the scheduler says so; vLLM prepares it for some models
        only. (The CPU's needs nothing.)"""
        runner = self.model_runner
        has_zeroer = getattr(runner, "_kv_block_zeroer", None) or getattr(runner, "kv_block_zeroer", None)
        if runner.device.type != "cpu" and not has_zeroer:
            runner._init_kv_zero_meta()

    @property
    def _manager(self) -> AdapterManager:
        manager = self.model_runner.lora_manager
        assert isinstance(manager, AdapterManager)
        return manager
