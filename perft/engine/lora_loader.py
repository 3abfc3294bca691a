"""Owns loading PEFT LoRA adapters by order, through the parts of vLLM's own LoRA manager.

A folder is read on the background thread into vLLM's own form; between two steps that joins vLLM's tables and a slot.
The server orders no more adapters onto the device than there are slots, so vLLM evicts none by itself. Invariant: an
adapter is read only after its digest and its contents passed the checks that an upload passes.
"""

from typing import Any

from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from adapters.errors import InvalidAdapterError
from adapters.format.files import Limits
from adapters.ref import AdapterRef
from perft.engine.host_cache import OtherContentsError, Outcome
from perft.engine.ordered_loading import Movers
from perft.engine.peft_lora import check_peft_lora

UNKNOWN_DIGEST = "unknown"
"""Stands for the digest in the key of an adapter that vLLM loaded inside a step."""


class LoRALoader:
    """See `Loader`. vLLM knows an adapter by its engine id, so the key of each id is remembered until `forget`."""

    def __init__(self, lora: LRUCacheWorkerLoRAManager, movers: Movers, vllm_config: Any, limits: Limits) -> None:
        self._lora, self._movers, self._vllm_config, self._limits = lora, movers, vllm_config, limits
        self._keys: dict[int, str] = {}
        self._loaded: dict[str, LoRAModel] = {}

    def prepare(self, adapter: AdapterRef) -> Outcome:
        return self._movers["prepare"].start(adapter.key, lambda: self._read(adapter))

    def place(self, adapter: AdapterRef) -> Outcome:
        """Done at once. Raises KeyError if the adapter is not on the host."""
        if adapter.engine_id not in self._lora.list_adapters():
            self._lora._adapter_manager.add_adapter(self._loaded[adapter.key])
            self._lora._adapter_manager.activate_adapter(adapter.engine_id)
        return Outcome("done")

    def evict(self, key: str) -> None:
        engine_id = _engine_id(key)
        if engine_id is not None:
            self._lora.remove_adapter(engine_id)

    def drop(self, key: str) -> None:
        self._movers["prepare"].forget(key)
        self._loaded.pop(key, None)

    def forget(self, engine_id: int) -> None:
        """Free the host's copy and the memory of the id."""
        key = self._keys.pop(engine_id, None)
        if key is not None:
            self.drop(key)

    def has_read(self, engine_id: int) -> bool:
        """Whether an adapter of this id was read by order."""
        return engine_id in self._keys

    def host_keys(self) -> list[str]:
        return list(self._loaded)

    def device_keys(self) -> list[str]:
        return [self._keys.get(number, f"{UNKNOWN_DIGEST}/{number}") for number in self._lora.list_adapters()]

    def _read(self, adapter: AdapterRef) -> None:
        """Read a folder into vLLM's own form, on the background thread.

        Raises OtherContentsError, or InvalidAdapterError for an adapter that was accepted by a server with other
        settings.
        """
        violations, found = check_peft_lora(adapter.folder, self._vllm_config, self._limits)
        if found != adapter.digest and found is not None:
            raise OtherContentsError(f"found digest {found}, expected {adapter.digest}: its files were changed")
        if violations:
            raise InvalidAdapterError(adapter.name, violations)
        model = self._lora._load_adapter(LoRARequest(adapter.name, adapter.engine_id, str(adapter.folder)))
        self._lora._adapter_manager._create_merged_loras_inplace(model)
        self._keys[adapter.engine_id] = adapter.key
        self._loaded[adapter.key] = model


def _engine_id(key: str) -> int | None:
    """The engine id at the end of a PEFT LoRA adapter's key; None for the key of a PERFT adapter."""
    _, slash, number = key.rpartition("/")
    return int(number) if slash else None
