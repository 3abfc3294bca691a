"""Owns which adapter manager a worker gets, and its place in vLLM.

Invariant: every model runner of a process in which `install_manager` ran builds one of our managers.
"""

import torch
from vllm.config import VllmConfig

from perft.engine.lora_manager import AdapterManagerWithLoRA
from perft.engine.manager import AdapterManager


def make_manager(vllm_config: VllmConfig, device: torch.device, embedding_modules: dict[str, str]) -> AdapterManager:
    """A worker's adapter manager: PERFT alone, or with PEFT LoRA on the modules that the operator opened.

    Raises UnsupportedModeError for a mode of vLLM in which adapters are not served.
    """
    lora_config = vllm_config.lora_config
    if lora_config is not None and lora_config.target_modules:
        return AdapterManagerWithLoRA(vllm_config, device, embedding_modules)
    return AdapterManager(vllm_config, device, embedding_modules)


def install_manager() -> None:
    """Have vLLM's model runners build our manager as their LoRA manager: the only name of vLLM that we replace."""
    from vllm.v1.worker import lora_model_runner_mixin

    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = make_manager
