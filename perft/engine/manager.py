"""Owns a worker's adapters: which ids are known, and which tokens of each step are whose.

Stands in for vLLM's LRUCacheWorkerLoRAManager (see the seam table): PERFT adapters ride on LoRA requests, so the
scheduler, the prefix cache and the model runner treat them as they treat LoRA. No layer is wrapped for them.

Under our server adapters are brought to the device by orders (`order`), beside the steps, before any request of
theirs is admitted. Through vLLM alone, `add_adapter` reads what is missing at once, on the engine's thread.

Invariant: a token whose adapter is not resident raises; it never falls through to the base model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from adapters import read_folder
from adapters.ref import AdapterRef
from perft.engine.compatibility import check_supported
from perft.engine.expert_counts import ExpertCounts
from perft.engine.host_cache import COPY_WAIT_S, READ_WAIT_S, HostCache, Mover, Outcome
from perft.engine.layers import base_shape, wrapped_runners
from perft.engine.moe_layer import StepState
from perft.engine.pool import RowPool, pack
from perft.engine.settings import EngineSettings
from perft.operator import TokenGroup, TorchOperator
from perft.operator.base import BatchPlan

logger = init_logger(__name__)


WARM_UP_PATH = "/not/a/real/path"
"""The path vLLM gives the LoRA requests of its warm-up runs."""


class AdapterIdentityError(ValueError):
    """An adapter id, name and content no longer belong together: serving on could give another adapter's answer."""


class AdapterManager:
    """Moves PERFT adapters to the row pool and plans every step.

    `runners`, `base`, `pool`, `tiers` and `step` are there once `create_lora_manager` was called. `step_load_bytes`
    counts what was read on the engine's thread.
    """

    lora_slots = 0
    """PEFT LoRA adapters that can be on the device at once."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, embedding_modules: dict[str, str]) -> None:
        check_supported(vllm_config)
        self._device = device
        self._settings = EngineSettings.of(vllm_config)
        self._digests: dict[int, str] = {}
        self._known: dict[int, tuple[str, str, str]] = {}  # name, path and digest of every id ever seen
        self._warm_up_ids: set[int] = set()
        self._moves = {"prepare": Mover(READ_WAIT_S), "place": Mover(COPY_WAIT_S)}  # a long read holds up no copy
        self.step_load_bytes = 0
        self.expert_counts = ExpertCounts(self._settings.expert_sampling)

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> torch.nn.Module:
        """Take every MoE layer of `model` in care; the model itself comes back unchanged.

        Raises UnsupportedModelError if it has none, or one whose class we do not stand behind.
        """
        self.runners = wrapped_runners(model)
        self.base = base_shape(self.runners, vllm_config)
        rows = self._settings.rows(self.base, self._device)
        self.pool = RowPool(rows, self.base.hidden_size, self.base.dtype, self._device)
        self.tiers = HostCache(self.pool, self.base, self._settings.limits)
        self.step = StepState(self.pool.tensor_RD, TorchOperator())
        for runner in self.runners.values():
            runner.perft = self.step
        logger.info("PERFT: %d MoE layers carry the operator, row pool of %d rows", len(self.runners), rows)
        return model

    def set_active_adapters(self, requests: set[LoRARequest], mapping: Any | None) -> None:
        """Plan the step that follows: `mapping.index_mapping` has the adapter id of every token (0: none)."""
        self.step.plan = None
        for request in requests:
            if not self._is_warm_up(request):
                self.add_adapter(request)
        if mapping is not None:
            self.step.plan = self._plan(mapping.index_mapping)

    def add_adapter(self, request: LoRARequest) -> bool:
        """Make an adapter resident. True if it was not.

        Raises InvalidAdapterError (it breaks the format or does not fit the base), PoolFullError, or
        AdapterIdentityError (the id stands for another adapter).
        """
        number, name, path = request.lora_int_id, request.lora_name, request.lora_path
        known = self._known.get(number)
        if request.load_inplace or (known is not None and known[:2] != (name, path)):
            raise AdapterIdentityError(f"id {number} stands for {known}; found {name} at {path}: an id is never reused")
        self._warm_up_ids.discard(number)
        if number in self._digests:
            return False
        digest = self.tiers.digest_of(path) or self._read_at_once(Path(path), None if known is None else known[2])
        self._digests[number] = digest
        self._known[number] = (name, path, digest)
        return True

    def _read_at_once(self, folder: Path, expected: str | None) -> str:
        """Bring a folder to the device on the engine's thread; everybody waits. Returns its digest."""
        checked = read_folder(folder, self.base, self._settings.limits)
        self.step_load_bytes += folder_bytes(folder)
        if expected not in (None, checked.digest):
            raise AdapterIdentityError(f"{folder} has other contents than when it was first served")
        if self.pool.get(checked.digest) is None:
            self.pool.put(checked.digest, pack(checked.config, checked.layer_weights(self.base)))
        return checked.digest

    def prepare(self, order: AdapterRef) -> Outcome:
        """Start disk to host; `outcome` tells the end."""
        return self._moves["prepare"].start(order.key, lambda: self.tiers.read(order.digest, order.folder))

    def place(self, order: AdapterRef) -> Outcome:
        """Start host to device, into rows that must be free."""
        return self._moves["place"].start(order.key, lambda: self.tiers.place(order.digest))

    def outcome(self, move: str, order: AdapterRef) -> Outcome:
        """How a move that was started stands."""
        return self._moves[move].outcome(order.key)

    def evict(self, order: AdapterRef) -> None:
        """Give the device rows back; no running request may use them."""
        self.step.plan = None
        self._moves["place"].forget(order.key)
        self.tiers.evict(order.digest)

    def drop(self, order: AdapterRef) -> None:
        """Give the host's copy up."""
        self._moves["prepare"].forget(order.key)
        self.tiers.drop(order.digest)

    def forget(self, engine_id: int) -> None:
        """The version is gone for ever: nothing of its id stays."""
        self.remove_adapter(engine_id)
        self._known.pop(engine_id, None)
        self.expert_counts.forget(engine_id)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget an id. False if it is unknown.

        Rows that were filled at once are freed with the last id of the same content; those filled by order, by order.
        """
        self.step.plan = None
        digest = self._digests.pop(adapter_id, None)
        if digest is not None and digest not in self._digests.values() and not self.tiers.holds(digest):
            self.tiers.evict(digest)
        return digest is not None

    def remove_all_adapters(self) -> None:
        self.step.plan = None
        self._warm_up_ids.clear()
        for adapter_id in list(self._digests):
            self.remove_adapter(adapter_id)

    def list_adapters(self) -> set[int]:
        return set(self._digests) | self._warm_up_ids

    def pin_adapter(self, adapter_id: int) -> bool:
        """Nothing is evicted here: what is resident stays until it is removed."""
        return adapter_id in self._digests

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """vLLM's warm-up runs happen inside; ours needs nothing made for them."""
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        """An id of a warm-up run: its tokens are planned as the base's."""
        self._warm_up_ids.add(request.lora_int_id)
        return True

    def supports_tower_connector_lora(self) -> bool:
        return False

    def _plan(self, token_ids: Sequence[int]) -> BatchPlan | None:
        """Group the step's tokens by adapter; None where there is none. Raises KeyError for an absent adapter."""
        ids_T = np.asarray(token_ids)
        groups: list[TokenGroup] = []
        for adapter_id in np.unique(ids_T).tolist():
            if not self._is_planned(adapter_id):
                continue
            adapter = self.pool.get(self._digests[adapter_id])
            if adapter is None:
                raise KeyError(f"adapter {adapter_id} has tokens in this step and no rows on the device")
            tokens_n = torch.from_numpy(np.flatnonzero(ids_T == adapter_id)).to(self._device, non_blocking=True)
            groups.append(TokenGroup(adapter, tokens_n, adapter_id))
        return BatchPlan(groups, self.expert_counts.watch()) if groups else None

    def _is_warm_up(self, request: LoRARequest) -> bool:
        """Whether a request is one of vLLM's warm-up runs, whose tokens are planned as the base's."""
        return request.lora_int_id in self._warm_up_ids and request.lora_path == WARM_UP_PATH

    def _is_planned(self, adapter_id: int) -> bool:
        """Whether tokens of this id take part: the base's (0) and those of warm-up runs do not."""
        return adapter_id != 0 and adapter_id not in self._warm_up_ids


def folder_bytes(folder: Path) -> int:
    """The size of an adapter's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def make_manager(vllm_config: VllmConfig, device: torch.device, embedding_modules: dict[str, str]) -> AdapterManager:
    """The worker's adapter manager: PERFT alone, or with LoRA on the modules the operator named."""
    lora_config = vllm_config.lora_config
    if lora_config is not None and lora_config.target_modules:
        from perft.engine.lora_manager import AdapterManagerWithLoRA

        return AdapterManagerWithLoRA(vllm_config, device, embedding_modules)
    return AdapterManager(vllm_config, device, embedding_modules)


def install_manager() -> None:
    """Put `make_manager` where vLLM's model runners build their LoRA manager: the only name we replace."""
    from vllm.v1.worker import lora_model_runner_mixin

    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = make_manager
