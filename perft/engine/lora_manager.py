"""Owns PEFT LoRA on attention beside PERFT, where the operator opened modules to it (vLLM's `--lora-target-modules`).

vLLM's own manager applies LoRA, untouched. Invariant: an id belongs to one of the two managers for as long as it is
known, and each manager sees the other's tokens as the base's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from adapters.identity import config_bytes, peft_type_of
from perft.engine.lora_loader import LoRALoader
from perft.engine.manager import AdapterManager


class AdapterManagerWithLoRA(AdapterManager):
    """AdapterManager that passes PEFT LoRA adapters to vLLM's own manager."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, embedding_modules: dict[str, str]) -> None:
        super().__init__(vllm_config, device, embedding_modules)
        self._lora = LRUCacheWorkerLoRAManager(vllm_config, device, embedding_modules)
        self._lora_loader = LoRALoader(self._lora, self._movers, vllm_config, self._settings.limits)
        self._kinds: dict[int, bool] = {}  # whether an id is PEFT LoRA, decided once
        self._dummies: set[int] = set()  # ids of the warm-up run that vLLM's manager had no adapter of
        self.lora_slots = min(vllm_config.lora_config.max_loras, vllm_config.lora_config.max_cpu_loras)

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> torch.nn.Module:
        """Attach the operator to the MoE layers, then let vLLM wrap the target modules."""
        model = super().create_lora_manager(model, vllm_config)
        self.ordered_loading.add_loader("LORA", self._lora_loader)
        wrapped: torch.nn.Module = self._lora.create_lora_manager(model, vllm_config)
        return wrapped

    def set_active_adapters(self, requests: set[LoRARequest], mapping: Any | None) -> None:
        lora = {request for request in requests if self._is_warm_up(request) or self._is_lora(request)}
        lora_ids = {request.lora_int_id for request in lora}
        self._count_reads(lora)
        self._lora.set_active_adapters(lora, None if mapping is None else _only(mapping, lora_ids))
        super().set_active_adapters(requests - lora, mapping)

    def add_adapter(self, request: LoRARequest) -> bool:
        if self._is_lora(request):
            self._count_reads({request})
            return bool(self._lora.add_adapter(request))
        return super().add_adapter(request)

    def forget(self, engine_id: int) -> None:
        super().forget(engine_id)
        self._lora_loader.forget(engine_id)
        self._kinds.pop(engine_id, None)

    def remove_adapter(self, adapter_id: int) -> bool:
        return super().remove_adapter(adapter_id) or bool(self._lora.remove_adapter(adapter_id))

    def remove_all_adapters(self) -> None:
        """End a warm-up run. vLLM's manager would drop every adapter here, also where it runs beside real requests."""
        super().remove_all_adapters()
        for adapter_id in self._dummies:
            self._lora.remove_adapter(adapter_id)
        self._dummies.clear()

    def list_adapters(self) -> set[int]:
        return super().list_adapters() | set(self._lora.list_adapters())

    def pin_adapter(self, adapter_id: int) -> bool:
        return super().pin_adapter(adapter_id) or bool(self._lora.pin_adapter(adapter_id))

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        with self._lora.dummy_lora_cache():
            yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return int(self._lora.get_dummy_lora_warmup_rank(default_rank))

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        super().add_dummy_lora(request, rank)
        is_new = bool(self._lora.add_dummy_lora(request, rank))
        if is_new:
            self._dummies.add(request.lora_int_id)
        return is_new

    def _count_reads(self, requests: set[LoRARequest]) -> None:
        """Count the folders that vLLM's manager is about to read inside the step."""
        present = self._lora.list_adapters()
        for request in requests:
            if request.lora_int_id not in present and not self._is_warm_up(request):
                self.step_loader.count(Path(request.lora_path))

    def _is_lora(self, request: LoRARequest) -> bool:
        number, path = request.lora_int_id, request.lora_path
        kind = self._kinds.get(number)
        if kind is None:
            is_perft = self.host_cache.digest_of(path) is not None
            kind = self._lora_loader.has_read(number) or (not is_perft and is_peft_lora(request))
            self._kinds[number] = kind
        return kind

    def _is_planned(self, adapter_id: int) -> bool:
        return adapter_id not in self._lora.list_adapters() and super()._is_planned(adapter_id)


def is_peft_lora(request: LoRARequest) -> bool:
    """Whether a request's folder holds a PEFT LoRA adapter. Any other folder is checked as a PERFT adapter."""
    try:
        return peft_type_of(config_bytes(Path(request.lora_path))) == "LORA"
    except OSError:
        return False


def _only(mapping: Any, ids: set[int]) -> Any:
    """The mapping with every id but `ids` as 0, the base."""
    return replace(
        mapping,
        index_mapping=tuple(i if i in ids else 0 for i in mapping.index_mapping),
        prompt_mapping=tuple(i if i in ids else 0 for i in mapping.prompt_mapping),
    )
