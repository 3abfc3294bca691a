"""Owns the calls that other processes make on a worker (vLLM's `worker_extension_cls`, through `collective_rpc`).

Invariant: every call returns at once and waits for neither disk nor device; a long one is started, and
`perft_outcome` reports its end. Arguments and answers are plain values; `adapter` is `AdapterRef.to_wire()`.
"""

from dataclasses import asdict
from typing import Any

from adapters.ref import AdapterRef
from perft.engine.manager import AdapterManager
from perft.engine.moe_layer import CarryingRunner
from perft.engine.ordered_loading import Move

NULL_BLOCK = 0
"""The cache block that vLLM keeps for padding: it holds nothing of a request."""


class PerftWorkerExtension:
    """Mixed into vLLM's worker. Every method's name begins with `perft_`."""

    model_runner: Any
    _perft_can_zero = False

    def perft_status(self) -> dict[str, Any]:
        """How many MoE layers carry the operator on this rank, the base's shape, the row pool and the LoRA slots.

        moe_layers is 0, with a `problem`, where our manager or our layers did not take effect: such a server must not
        serve.
        """
        manager = getattr(self.model_runner, "lora_manager", None)
        if not isinstance(manager, AdapterManager):
            return {"moe_layers": 0, "problem": f"the worker's adapter manager is {type(manager).__name__}"}
        self._prepare_zeroing()
        states = [runner.perft for runner in manager.runners.values() if isinstance(runner, CarryingRunner)]
        carrying = [state for state in states if state is not None and state.shared is manager.step]
        base = manager.base
        return {
            "moe_layers": len(carrying),
            "base": {**base.__dict__, "dtype": str(base.dtype).removeprefix("torch.")},
            "rows_total": manager.pool.total,
            "rows_used": manager.pool.used,
            "lora_slots": manager.lora_slots,
        }

    def perft_inventory(self) -> dict[str, Any]:
        """What this rank really holds, for the server to compare with its plan.

        host, device, moving: sorted keys (`AdapterRef.key`) of both kinds. A key is in `host` or `device` once all
        of its adapter is there; while a move is under way it is in `moving`. A PEFT LoRA adapter that was loaded
        inside a step has the key "unknown/ENGINE_ID". rows_used: rows of the pool that are taken, those of a copy
        under way included.
        """
        inventory = asdict(self._manager.ordered_loading.inventory())
        return {**inventory, "rows_used": self._manager.pool.used}

    def perft_prepare(self, adapter: dict[str, Any]) -> dict[str, Any]:
        """Start loading an adapter from disk to the host; returns an `Outcome`."""
        return asdict(self._manager.ordered_loading.prepare(AdapterRef.from_wire(adapter)))

    def perft_place(self, adapter: dict[str, Any], evict: list[dict[str, Any]]) -> dict[str, Any]:
        """Evict adapters, then start copying another from the host to the device; returns an `Outcome`."""
        for leaving in evict:
            self.perft_evict(leaving)
        return asdict(self._manager.ordered_loading.place(AdapterRef.from_wire(adapter)))

    def perft_outcome(self, move: Move, adapter: dict[str, Any]) -> dict[str, Any]:
        """The `Outcome` of a move that was started; its end is reported once."""
        return asdict(self._manager.ordered_loading.outcome(move, AdapterRef.from_wire(adapter)))

    def perft_evict(self, adapter: dict[str, Any]) -> None:
        """Free an adapter's memory on the device. No running request may use it."""
        self.perft_evict_key(AdapterRef.from_wire(adapter).key)

    def perft_evict_key(self, key: str) -> None:
        """`perft_evict` by a key of the inventory. Does nothing for a key that is not on the device (yet)."""
        self._manager.ordered_loading.evict(key)

    def perft_drop(self, adapter: dict[str, Any]) -> None:
        """Free the host's copy of an adapter."""
        self.perft_drop_key(AdapterRef.from_wire(adapter).key)

    def perft_drop_key(self, key: str) -> None:
        """`perft_drop` by a key of the inventory. Does nothing for a key that is not on the host (yet)."""
        self._manager.ordered_loading.drop(key)

    def perft_forget(self, engine_id: int) -> None:
        """Remove all state of a version that was deleted for good."""
        self._manager.forget(engine_id)

    def perft_counters(self) -> dict[str, Any]:
        """Bytes read inside steps, and tokens per PEFT expert by engine id."""
        manager = self._manager
        return {"step_load_bytes": manager.step_loader.bytes_read, "expert_tokens": manager.expert_counts.read()}

    def _prepare_zeroing(self) -> None:
        """Let an accelerator's model runner zero cache blocks when the scheduler asks for it, from the first time on.

        vLLM prepares this for some models only, and does not compile the kernel for all of those: the first poisoned
        request would stop everybody's step for that long. The CPU's runner needs no preparation.
        """
        runner = self.model_runner
        if self._perft_can_zero or runner.device.type == "cpu":
            return
        if _zeroer_of(runner) is None:
            runner._init_kv_zero_meta()
        _zeroer_of(runner).zero_block_ids([NULL_BLOCK])
        self._perft_can_zero = True

    @property
    def _manager(self) -> AdapterManager:
        manager = self.model_runner.lora_manager
        assert isinstance(manager, AdapterManager)
        return manager


def _zeroer_of(runner: Any) -> Any:
    """What zeroes cache blocks in vLLM's V1 or V2 model runner; None before it is prepared."""
    return getattr(runner, "_kv_block_zeroer", None) or getattr(runner, "kv_block_zeroer", None)
