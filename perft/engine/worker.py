"""Owns what other processes may ask a worker (vLLM's `worker_extension_cls`, reached through `collective_rpc`)."""

from typing import Any

from perft.engine.manager import AdapterManager
from perft.engine.moe_runner import PerftMoERunner


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
        carrying = [r for r in manager.runners.values() if isinstance(r, PerftMoERunner) and r.perft is manager.step]
        base = manager.base
        return {
            "moe_layers": len(carrying),
            "base": {**base.__dict__, "dtype": str(base.dtype).removeprefix("torch.")},
            "rows_total": manager.pool.total,
            "rows_used": manager.pool.used,
        }
