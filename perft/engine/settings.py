"""Owns the engine's settings, which reach every rank in vLLM's `additional_config["perft"]`."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from adapters.format.files import Limits
from perft.back_ends import BackEnd
from perft.base_model import BaseShape
from perft.memory import memory_bytes

SETTINGS_KEY = "perft"
DEFAULT_POOL_FRACTION = 0.05
"""Share of the device's memory that the row pool takes if no size is given."""


@dataclass(frozen=True)
class EngineSettings:
    """pool_rows: rows of the pool (None: DEFAULT_POOL_FRACTION of the device's memory). allow_other_base: take
    adapters whose base_fingerprint differs. max_weights_bytes: largest weights file. expert_sampling: every n-th step
    counts how its tokens used the experts (0: none). operator_backend: what computes the delta."""

    pool_rows: int | None = None
    allow_other_base: bool = False
    max_weights_bytes: int = Limits.max_weights_bytes
    expert_sampling: int = 0
    operator_backend: BackEnd = "auto"

    @classmethod
    def of(cls, vllm_config: Any) -> "EngineSettings":
        """The settings in a VllmConfig. Raises ValueError for an unknown key."""
        given = dict((vllm_config.additional_config or {}).get(SETTINGS_KEY, {}))
        known = {field.name for field in fields(cls)}
        if given.keys() - known:
            unknown = sorted(given.keys() - known)
            raise ValueError(f"additional_config.{SETTINGS_KEY}: found {unknown}, expected keys out of {sorted(known)}")
        return cls(**given)

    @property
    def limits(self) -> Limits:
        return Limits(self.max_weights_bytes, self.allow_other_base)

    def rows(self, base: BaseShape, device: torch.device) -> int:
        """Rows of the pool: as set, else by the device's total memory, so that equal ranks agree."""
        if self.pool_rows is not None:
            return self.pool_rows
        total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory_bytes()
        return int(total * DEFAULT_POOL_FRACTION) // (base.hidden_size * base.dtype.itemsize)
