"""Owns the peer that serves one adapter at a time: Hugging Face `generate` with perft.hf's modules."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.common.workload import PROMPT_TOKENS, prompt
from perft.config import AdapterConfig
from perft.hf import PerftAdapter, attach, moe_blocks


class HuggingFacePeer:
    """A base in transformers, float32, with adapters that are attached one after the other."""

    def __init__(self, base: Path, folders: Sequence[Path]) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self._adapters = [self._load(folder) for folder in folders]

    def _load(self, folder: Path) -> PerftAdapter:
        """The adapter of a folder, detached."""
        config = AdapterConfig.model_validate_json((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        adapter = attach(self._model, config).eval()
        for index, layer in adapter.by_layer():
            for name, parameter in layer.named_parameters():
                parameter.data.copy_(tensors[f"layers.{index}.{name}"])
        adapter.detach_from_model()
        return adapter

    @torch.inference_mode()
    def generate(self, requests: int, tokens: int) -> float:
        """Seconds in which `requests` requests, shared out over the adapters, get `tokens` tokens each; every adapter
        serves its own as one batch, prefill included."""
        vocabulary = int(self._model.config.vocab_size)
        batches = [list(range(number, requests, len(self._adapters))) for number in range(len(self._adapters))]
        began = time.perf_counter()
        for adapter, places in zip(self._adapters, batches, strict=True):
            adapter.attach_to(moe_blocks(self._model))
            ids = torch.tensor([prompt(place, vocabulary, PROMPT_TOKENS) for place in places])
            found = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
            adapter.detach_from_model()
            if found.shape != (len(places), PROMPT_TOKENS + tokens):
                raise RuntimeError(
                    f"found {tuple(found.shape)}, expected {tokens} new tokens of {len(places)} requests"
                )
        return time.perf_counter() - began
