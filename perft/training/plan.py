"""Owns what a training's options mean on one base, one device and one set of data: the numbers, and the adapter."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from perft.base_model import BaseShape, fit_violations
from perft.config import AdapterConfig
from perft.errors import InputError
from perft.hf.base import fingerprint_of, renormalizes
from perft.training.options import TrainOptions, problem_of
from perft.training.paper import defaults_of

LOOKS = 10
"""Times that the held-out part is looked at, unless --evaluate-every says otherwise."""
WARM_UP = 100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """The numbers that depend on the base, the device and the data."""

    steps: int
    batch: int
    accumulated: int
    devices: int
    learning_rate: float
    warm_up: int
    aux_loss: float
    evaluate_every: int
    dtype: torch.dtype
    gradient_checkpointing: bool

    @property
    def examples_a_step(self) -> int:
        return self.batch * self.accumulated * self.devices


def plan_of(options: TrainOptions, config: Any, examples: int) -> Plan:
    """config: the base's. examples: how many there are to learn; a batch has no more."""
    devices, on_gpu, defaults = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available(), defaults_of(config)
    batch = min(options.batch_size, examples)
    steps = options.steps or max(
        1, round(options.epochs * examples / (batch * options.gradient_accumulation * devices))
    )
    dtype = DTYPES["bfloat16" if on_gpu else "float32"] if options.dtype == "auto" else DTYPES[options.dtype]
    return Plan(
        steps=steps,
        batch=batch,
        accumulated=options.gradient_accumulation,
        devices=devices,
        learning_rate=options.learning_rate or defaults.learning_rate,
        warm_up=min(WARM_UP, steps // 10) if options.warmup_steps is None else options.warmup_steps,
        aux_loss=defaults.aux_loss if options.aux_loss is None else options.aux_loss,
        evaluate_every=options.evaluate_every or max(1, steps // LOOKS),
        dtype=dtype,
        gradient_checkpointing=on_gpu if options.gradient_checkpointing is None else options.gradient_checkpointing,
    )


def adapter_config_of(options: TrainOptions, config: Any, shape: BaseShape) -> AdapterConfig | None:
    """The adapter's configuration with every default; None for a baseline. Raises InputError if it does not fit."""
    if options.method != "perft":
        return None
    experts = options.num_experts or {"R": 4, "D": 2, "S": 1, "E": shape.num_experts}[options.variant]
    values: dict[str, Any] = {
        "base_model_name_or_path": options.base_name or options.base,
        "base_fingerprint": fingerprint_of(options.base, shape),
        "variant": options.variant, "expert_type": options.expert_type, "bottleneck": options.bottleneck,
        "num_experts": experts, "layers": options.layers, "description": options.description,
    }  # fmt: skip
    if options.expert_type == "lora":
        values["alpha"] = float(options.alpha or 2 * options.bottleneck)
    elif options.activation is not None:
        values["activation"] = options.activation
    if options.variant == "R":
        values["gate_weight"] = options.gate_weight or "adapter"
        values["top_k"] = options.top_k or min(2, experts)
        by_base = options.renormalize is None and values["gate_weight"] == "adapter" and renormalizes(config)
        values["renormalize"] = bool(options.renormalize) or by_base
    try:
        made = AdapterConfig.model_validate(values)
    except ValidationError as error:
        problems = [problem_of(each).replace("Value error, ", "") for each in error.errors()]
        raise InputError("the adapter's configuration is not valid", problems) from None
    if violations := fit_violations(without_fingerprint(made), shape):
        raise InputError(f"the adapter does not fit {options.base}", violations)
    return made


def without_fingerprint(config: AdapterConfig) -> AdapterConfig:
    """The configuration without its fingerprint: the shape it is held to has no weights, or cast ones."""
    return config.model_copy(update={"base_fingerprint": None})
