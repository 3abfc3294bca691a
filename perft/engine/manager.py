"""Owns which adapter each token of a step belongs to, on one worker.

`AdapterManager` stands in for vLLM's LRUCacheWorkerLoRAManager (see the seam table): PERFT adapters ride on LoRA
requests, so the scheduler, the prefix cache and the model runner treat them as LoRA. No layer is wrapped for them.

Our server orders adapters onto the device (`ordered_loading`) before it admits their requests; what a step needs and
no order brought, as under plain vLLM, is read inside the step (`step_loader`).

Invariant: a token whose adapter is not on the device raises; it never falls through to the base model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from perft.config import AdapterConfig
from perft.engine.compatibility import check_supported
from perft.engine.expert_counts import ExpertCounts
from perft.engine.host_cache import HostCache
from perft.engine.layers import base_shape, step_sizes, wrapped_runners
from perft.engine.moe_layer import LayerState, StepState
from perft.engine.ordered_loading import Movers, OrderedLoading
from perft.engine.perft_loader import PerftLoader
from perft.engine.pool import RowPool
from perft.engine.settings import EngineSettings
from perft.engine.step_loader import StepLoader
from perft.engine.tensor_parallel import Share
from perft.operator import Batch, Step, TokenGroup, choose_operator
from perft.operator.base import TILE_TOKENS
from perft.operator.tables import adapter_rows

logger = init_logger(__name__)


EXAMPLE = AdapterConfig(
    base_model_name_or_path="", variant="R", expert_type="lora", bottleneck=16, alpha=16.0, num_experts=8, top_k=2,
    renormalize=True,
)  # fmt: skip
"""The adapter whose size the log tells."""

WARM_UP_PATH = "/not/a/real/path"
"""The path vLLM gives the LoRA requests of its warm-up runs."""


class AdapterIdentityError(ValueError):
    """An engine id was reused for another name or path; its requests could get another adapter's answer."""


class AdapterManager:
    """Plans every step, and knows the adapters that requests named.

    `runners`, `base`, `pool`, `host_cache`, `step`, `step_loader` and `ordered_loading` exist once
    `create_lora_manager` ran.
    """

    lora_slots = 0
    """PEFT LoRA adapters that can be on the device at once."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, embedding_modules: dict[str, str]) -> None:
        check_supported(vllm_config)
        self._device = device
        self._settings = EngineSettings.of(vllm_config)
        self._movers = Movers()
        self._digests: dict[int, str] = {}
        self._known: dict[int, tuple[str, str, str]] = {}  # name, path and digest of every id until it is forgotten
        self._warm_up_ids: set[int] = set()
        self.expert_counts = ExpertCounts(self._settings.expert_sampling)

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> torch.nn.Module:
        """Attach the operator to every MoE layer of `model`; returns the model unchanged.

        Raises UnsupportedModelError if it has no MoE layer, or one of a class that we do not support.
        """
        self.runners = wrapped_runners(model)
        self.base = base_shape(self.runners, vllm_config)
        rows = self._settings.rows(self.base, self._device)
        shape = self.base
        self.pool = RowPool(rows, shape.hidden_size, shape.dtype, self._device, shape.num_layers)
        sizes, asked = step_sizes(shape, vllm_config), self._settings.operator_backend
        self._operator = choose_operator(self.pool.tensor_RD, self.pool.tables, sizes, asked)
        self.base = replace(
            shape,
            max_columns=self._operator.max_columns,
            max_routed_experts=self._operator.max_routed_experts,
        )
        self.host_cache = HostCache(self.pool, self.base, self._settings.limits)
        self._share = Share.of(list(self.runners.values()))
        if not self._share.counts:
            self.expert_counts = ExpertCounts(0)
        self.step = StepState()
        self.step_loader = StepLoader(self.pool, self.base, self._settings.limits)
        loader = PerftLoader(self.host_cache, self.pool, self._movers)
        self.ordered_loading = OrderedLoading(self.step, self._movers, loader)
        for layer, runner in self.runners.items():
            runner.attach(LayerState(self.step, layer, shape.num_experts))
        logger.info("PERFT: %s", self._summary())
        return model

    def set_active_adapters(self, requests: set[LoRARequest], mapping: Any | None) -> None:
        """Plan the step that follows. `mapping.index_mapping` has the adapter id of every token (0: the base).

        Raises KeyError if an adapter is not on the device, or what `add_adapter` raises.
        """
        self.step.step = None
        for request in requests:
            if not self._is_warm_up(request):
                self.add_adapter(request)
        if mapping is not None:
            self.step.step = self._plan(mapping.index_mapping)

    def add_adapter(self, request: LoRARequest) -> bool:
        """Register a request's adapter, and load it here and now if no order did. True if it was not registered.

        Raises AdapterIdentityError (the id belongs to another adapter), InvalidAdapterError (the files break the
        format or do not fit the base), OtherContentsError (they changed) or PoolFullError.
        """
        number, name, path = request.lora_int_id, request.lora_name, request.lora_path
        known = self._known.get(number)
        if request.load_inplace or (known is not None and known[:2] != (name, path)):
            raise AdapterIdentityError(
                f"adapter id {number}: found {name} at {path}, expected {known}: an id is never reused"
            )
        self._warm_up_ids.discard(number)
        if self._is_registered(number):
            return False
        digest = self.host_cache.digest_of(path)
        if digest is None:
            digest = self.step_loader.load(Path(path), None if known is None else known[2])
        elif self.pool.get(digest) is None:
            self.host_cache.place(digest)
        self._digests[number] = digest
        self._known[number] = (name, path, digest)
        return True

    def forget(self, engine_id: int) -> None:
        """Remove all state of a version that was deleted for good."""
        self.remove_adapter(engine_id)
        self._known.pop(engine_id, None)
        self.expert_counts.forget(engine_id)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Unregister an id. False if it is unknown.

        Rows that a step loaded are freed with the last id of the same content; those that an order brought are freed
        by order.
        """
        self.step.step = None
        digest = self._digests.pop(adapter_id, None)
        if digest is not None and digest not in self._digests.values() and not self.host_cache.holds(digest):
            self.host_cache.evict(digest)
        return digest is not None

    def remove_all_adapters(self) -> None:
        """What vLLM calls after a warm-up run, also on a rank that idles beside others: real adapters stay."""
        self.step.step = None
        self._warm_up_ids.clear()

    def list_adapters(self) -> set[int]:
        return set(self._digests) | self._warm_up_ids

    def pin_adapter(self, adapter_id: int) -> bool:
        """Nothing to do: an adapter stays on the device until it is evicted by order or removed."""
        return adapter_id in self._digests

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """vLLM's warm-up runs happen inside this context; PERFT needs no dummy weights for them."""
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        """Register the id of a warm-up run: its tokens are planned as the base's."""
        self._warm_up_ids.add(request.lora_int_id)
        return True

    def supports_tower_connector_lora(self) -> bool:
        return False

    def _summary(self) -> str:
        """What the operator runs on, and what an adapter costs, for the log."""
        row_bytes = self.pool.tensor_RD.shape[1] * self.pool.tensor_RD.element_size()
        example = adapter_rows(EXAMPLE, self.base.moe_layers)
        return (
            f"{len(self.runners)} MoE layers carry the operator ({type(self._operator).__name__}); a pool of "
            f"{self.pool.total} rows takes {self.pool.total * row_bytes / 1e6:.0f} MB and holds "
            f"{self.pool.total // example} adapters of variant R with {EXAMPLE.num_experts} experts of bottleneck "
            f"{EXAMPLE.bottleneck} in every layer, {example} rows or {example * row_bytes / 1e6:.1f} MB each"
        )

    def _plan(self, token_ids: Sequence[int]) -> Step | None:
        """Group the step's tokens by adapter; None if all are the base's. Raises KeyError for an absent adapter."""
        ids_T = np.fromiter(token_ids, dtype=np.int64, count=len(token_ids))
        if not ids_T.any():
            return None
        order_T = np.argsort(ids_T, kind="stable")
        edges = [0, *(np.flatnonzero(np.diff(ids_T[order_T])) + 1).tolist(), len(order_T)]
        groups: list[TokenGroup] = []
        tokens: list[np.ndarray] = []
        planned = tiles = 0
        for start, stop in pairwise(edges):
            adapter_id = int(ids_T[order_T[start]])
            if not self._is_planned(adapter_id):
                continue
            adapter = self.pool.get(self._digests.get(adapter_id, ""))
            if adapter is None:
                raise KeyError(f"adapter {adapter_id} has tokens in this step and no rows on the device")
            own = self._share.of_tokens(order_T[start:stop], tiles)
            tiles += -(-(stop - start) // TILE_TOKENS)
            groups.append(TokenGroup(adapter, planned, planned + len(own), adapter_id))
            tokens.append(own)
            planned += len(own)
        tokens_n = torch.from_numpy(np.concatenate([*tokens, order_T[:0]]))
        return self._operator.plan(Batch(tokens_n, groups, len(ids_T), self.expert_counts.watch()))

    def _is_registered(self, adapter_id: int) -> bool:
        """Whether an id is known and its content is on the device: an eviction by order leaves the id behind."""
        digest = self._digests.get(adapter_id)
        return digest is not None and self.pool.get(digest) is not None

    def _is_warm_up(self, request: LoRARequest) -> bool:
        """Whether a request belongs to one of vLLM's warm-up runs, whose tokens are planned as the base's."""
        return request.lora_int_id in self._warm_up_ids and request.lora_path == WARM_UP_PATH

    def _is_planned(self, adapter_id: int) -> bool:
        """Whether tokens of this id get a delta: those of the base (0) and of warm-up runs do not."""
        return adapter_id != 0 and adapter_id not in self._warm_up_ids
