"""Owns PEFT LoRA on attention beside PERFT, where the operator asked for it (vLLM's `--lora-target-modules`).

vLLM's own manager does the LoRA part, untouched; each of the two sees the other's tokens as the base's.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from adapters import InvalidAdapterError, lora_digest
from adapters.format.folder import CONFIG_FILE
from adapters.ref import AdapterRef
from perft.engine.host_cache import OtherContentsError, Outcome
from perft.engine.manager import AdapterManager, folder_bytes
from perft.engine.peft_lora import peft_lora_violations


class AdapterManagerWithLoRA(AdapterManager):
    """AdapterManager that hands PEFT LoRA adapters to vLLM's own manager.

    A LoRA adapter under order is read on the background thread into vLLM's own form, and joins vLLM's tables and a slot
    between two steps. Eviction is by order too: at most `lora_slots` are in those tables, so vLLM never evicts.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, embedding_modules: dict[str, str]) -> None:
        super().__init__(vllm_config, device, embedding_modules)
        self._vllm_config = vllm_config
        self._lora = LRUCacheWorkerLoRAManager(vllm_config, device, embedding_modules)
        self._kinds: dict[int, bool] = {}  # whether an id is PEFT LoRA, decided once
        self._loaded: dict[int, LoRAModel] = {}
        self.lora_slots = min(vllm_config.lora_config.max_loras, vllm_config.lora_config.max_cpu_loras)

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> torch.nn.Module:
        """Take the MoE layers in care, then let vLLM wrap the target modules."""
        wrapped: torch.nn.Module = self._lora.create_lora_manager(
            super().create_lora_manager(model, vllm_config), vllm_config
        )
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

    def remove_adapter(self, adapter_id: int) -> bool:
        return super().remove_adapter(adapter_id) or bool(self._lora.remove_adapter(adapter_id))

    def remove_all_adapters(self) -> None:
        super().remove_all_adapters()
        self._lora.remove_all_adapters()

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
        return bool(self._lora.add_dummy_lora(request, rank))

    def prepare(self, order: AdapterRef) -> Outcome:
        if order.kind != "LORA":
            return super().prepare(order)
        return self._moves["prepare"].start(order.key, lambda: self._read_lora(order))

    def place(self, order: AdapterRef) -> Outcome:
        if order.kind != "LORA":
            return super().place(order)
        if order.engine_id not in self._lora.list_adapters():
            self._lora._adapter_manager.add_adapter(self._loaded[order.engine_id])
            self._lora._adapter_manager.activate_adapter(order.engine_id)
        return Outcome("done")

    def evict(self, order: AdapterRef) -> None:
        if order.kind != "LORA":
            return super().evict(order)
        self._lora.remove_adapter(order.engine_id)

    def drop(self, order: AdapterRef) -> None:
        if order.kind != "LORA":
            return super().drop(order)
        self._moves["prepare"].forget(order.key)
        self._loaded.pop(order.engine_id, None)

    def forget(self, engine_id: int) -> None:
        super().forget(engine_id)
        self._kinds.pop(engine_id, None)
        self._loaded.pop(engine_id, None)

    def _count_reads(self, requests: set[LoRARequest]) -> None:
        """Count what vLLM's manager is about to read on the engine's thread."""
        present = self._lora.list_adapters()
        for request in requests:
            if request.lora_int_id not in present and not self._is_warm_up(request):
                self.step_load_bytes += folder_bytes(Path(request.lora_path))

    def _read_lora(self, order: AdapterRef) -> None:
        """Read a PEFT LoRA folder into vLLM's own form; on the background thread."""
        if (found := lora_digest(order.folder)) != order.digest:
            raise OtherContentsError(f"found digest {found}, expected {order.digest}: the files were changed")
        if violations := peft_lora_violations(order.folder, self._vllm_config, self._settings.limits):
            raise InvalidAdapterError(order.name, violations)  # it was accepted by another server than this one is now
        model = self._lora._load_adapter(LoRARequest(order.name, order.engine_id, str(order.folder)))
        self._lora._adapter_manager._create_merged_loras_inplace(model)
        self._kinds[order.engine_id] = True
        self._loaded[order.engine_id] = model

    def _is_lora(self, request: LoRARequest) -> bool:
        kind = self._kinds.get(request.lora_int_id)
        if kind is None:
            is_perft = self.tiers.digest_of(request.lora_path) is not None
            kind = self._kinds[request.lora_int_id] = not is_perft and is_peft_lora(request)
        return kind

    def _is_planned(self, adapter_id: int) -> bool:
        return adapter_id not in self._lora.list_adapters() and super()._is_planned(adapter_id)


def is_peft_lora(request: LoRARequest) -> bool:
    """Whether a request's folder holds a PEFT LoRA adapter. Anything else is PERFT's to judge."""
    try:
        values = json.loads((Path(request.lora_path) / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("peft_type") == "LORA"


def _only(mapping: Any, ids: set[int]) -> Any:
    """The mapping with every id but `ids` as 0, the base."""
    return replace(
        mapping,
        index_mapping=tuple(i if i in ids else 0 for i in mapping.index_mapping),
        prompt_mapping=tuple(i if i in ids else 0 for i in mapping.prompt_mapping),
    )
