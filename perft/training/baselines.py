"""Owns the paper's baselines, made by PEFT itself: LoRA on q and v (qvLoRA), and LoRA on the base's routers."""

import logging
from pathlib import Path
from typing import Any

from perft.errors import InputError
from perft.hf import moe_blocks
from perft.training.options import TrainOptions

QUERY_VALUE = ("q_proj", "v_proj")


def with_baseline(model: Any, options: TrainOptions) -> Any:
    """A PEFT model with a fresh LoRA. Raises InputError if PEFT is missing, or does not find what to adapt."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError(
            f"--method {options.method} needs the package peft: pip install 'perft-server[train]'"
        ) from None
    named: dict[str, Any] = (
        {"target_modules": list(QUERY_VALUE)}
        if options.method == "qvlora"
        else {"target_modules": [], "target_parameters": router_parameters(model)}
    )
    dropout = options.dropout if options.method == "qvlora" else 0.0  # PEFT has none on parameters
    try:
        config = LoraConfig(
            r=options.bottleneck, lora_alpha=int(options.alpha or 2 * options.bottleneck), lora_dropout=dropout,
            bias="none", task_type="CAUSAL_LM", **named,
        )  # fmt: skip
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"PEFT cannot adapt this base: {error}") from None


def save_baseline(trainee: Any, folder: Path, card: str) -> None:
    """PEFT's own files, with our card in place of PEFT's."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)  # about the card that is replaced
    try:
        trainee.save_pretrained(folder)
    finally:
        logger.setLevel(before)
    (folder / "README.md").write_text(card, encoding="utf-8")


def router_parameters(model: Any) -> list[str]:
    """The names of the routers' matrices."""
    routers = {id(block.router) for block in moe_blocks(model).values()}
    return [f"{name}.weight" for name, module in model.named_modules() if id(module) in routers]
