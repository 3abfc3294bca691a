"""Owns the check of a PEFT LoRA adapter before it is accepted: all that vLLM would refuse, or get wrong, later.

vLLM reads an adapter inside the engine's step, where an error ends the engine; it silently copies a tensor that is too
small and drops tensors of modules that it did not wrap. The check needs the VllmConfig, not the model.

Invariant: an adapter without violations loads, activates and takes effect with every one of its tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import is_in_target_modules

from adapters.format.files import (
    CONFIG_FILE,
    DEFAULT_LIMITS,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    Limits,
    file_violations,
    is_plain_file,
)
from adapters.format.header import TensorEntry, UnreadableWeightsError, opened
from adapters.format.strict_json import quote
from adapters.format.values import DTYPES, read_values
from adapters.format.weights import metadata_violations
from adapters.identity import digest_of
from perft.engine.peft_lora_config import parse_peft_config
from perft.reading import printable

QKV = ("q_proj", "k_proj", "v_proj")
KNOWN_MODELS = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Models whose decoder layers all have q_proj, k_proj, v_proj (packed in vLLM) and o_proj, of the shapes below."""

MAX_LISTED = 100
"""How many unexpected tensors are named one by one."""


@dataclass(frozen=True)
class LoRATarget:
    """What a LoRA adapter has to fit. features: module -> (in, out), for every module the operator opened."""

    lora_config: LoRAConfig
    dtype: torch.dtype
    features: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, vllm_config: Any) -> "LoRATarget":
        """The target of a VllmConfig of one of KNOWN_MODELS with LoRA on."""
        model, lora = vllm_config.model_config, vllm_config.lora_config
        text = model.hf_text_config
        hidden, head = text.hidden_size, model.get_head_size()
        query, key_value = text.num_attention_heads * head, model.get_total_num_kv_heads() * head
        sizes = {"q_proj": (hidden, query), "k_proj": (hidden, key_value), "v_proj": (hidden, key_value)}
        features: dict[str, tuple[int, int]] = {}
        for layer in range(text.num_hidden_layers):
            prefix = f"model.layers.{layer}.self_attn."
            if is_in_target_modules(prefix + "qkv_proj", lora.target_modules, {"qkv_proj": list(QKV)}):
                features |= {prefix + name: size for name, size in sizes.items()}
            if is_in_target_modules(prefix + "o_proj", lora.target_modules):
                features[prefix + "o_proj"] = (query, hidden)
        return cls(lora, lora.lora_dtype, features)

    @property
    def modules(self) -> tuple[str, ...]:
        """The opened modules' last names."""
        return tuple(sorted({name.rpartition(".")[2] for name in self.features}))


def lora_problem(vllm_config: Any) -> str | None:
    """Why this server accepts no PEFT LoRA adapters at all; None if it does."""
    lora = vllm_config.lora_config
    if lora is None or not lora.target_modules:
        return (
            'peft_type: found "LORA", which is off on this server; expected "PERFT" '
            "(--lora-target-modules qkv_proj turns LoRA on attention on)"
        )
    model_type = vllm_config.model_config.hf_text_config.model_type
    if model_type not in KNOWN_MODELS:
        return (
            f'peft_type: found "LORA", which is not served on the model type {model_type} yet '
            f"(only on {', '.join(KNOWN_MODELS)}): the sizes of its modules are unknown"
        )
    if not LoRATarget.of(vllm_config).features:
        return (
            f'peft_type: found "LORA", but --lora-target-modules {" ".join(lora.target_modules)} opens no attention '
            "module; expected one of qkv_proj, o_proj"
        )
    return None


def check_peft_lora(
    folder: Path, vllm_config: Any, limits: Limits = DEFAULT_LIMITS, *, values: bool = True
) -> tuple[list[str], str | None]:
    """Every reason not to accept the PEFT LoRA adapter in `folder` (none: it can be served), and its digest.

    One pass over the weights checks and hashes them. Without `values` only their header is read; then, and for a file
    that cannot be read, there is no digest.
    """
    if problem := lora_problem(vllm_config):
        return [problem], None
    if not folder.is_dir():
        return [f"found no folder at {folder}, expected one with {CONFIG_FILE} and {WEIGHTS_FILE}"], None
    target = LoRATarget.of(vllm_config)
    found = file_violations(folder, limits)
    helper: PEFTHelper | None = None
    raw, weights_hash = b"", None
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if is_plain_file(config) and config.stat().st_size <= MAX_CONFIG_BYTES:
        raw = config.read_bytes()
        helper, config_violations = parse_peft_config(raw, target.lora_config)
        found += config_violations
    if helper is not None:
        found += _target_violations(helper, target)
    if is_plain_file(weights) and weights.stat().st_size <= limits.max_weights_bytes:
        weights_violations, weights_hash = _read_weights(weights, helper, target, values)
        found += weights_violations
    digest = None if weights_hash is None else digest_of(raw, weights_hash)
    return [printable(text) for text in found], digest


def peft_lora_violations(folder: Path, vllm_config: Any, limits: Limits = DEFAULT_LIMITS) -> list[str]:
    """Every reason not to accept the PEFT LoRA adapter in `folder`; empty: it can be served."""
    return check_peft_lora(folder, vllm_config, limits)[0]


def _target_violations(helper: PEFTHelper, target: LoRATarget) -> list[str]:
    """Compare a list of module names with what is opened; a string (PEFT's own pattern) is judged by the tensors."""
    named = [] if isinstance(helper.target_modules, str) else helper.target_modules
    return [
        f"target_modules: found {name[:80]!r}, expected only {', '.join(target.modules)}: the others are not opened "
        "on this server (--lora-target-modules)"
        for name in named
        if name.rpartition(".")[2] not in target.modules
    ]


def _read_weights(
    path: Path, helper: PEFTHelper | None, target: LoRATarget, values: bool
) -> tuple[list[str], bytes | None]:
    """Every violation in the weights file, and sha256 of its bytes (None if they were not all read)."""
    try:
        with opened(path) as (file, header):
            names = [tensor.name for tensor in header.tensors]
            placed = {name: place for name in names if (place := _place(name, target)) is not None}
            found = metadata_violations(header)
            found += _name_violations(names, placed, target)
            for tensor in header.tensors:
                if tensor.name in placed:
                    expected = _expected_shape(*placed[tensor.name], helper, target)
                    found += _tensor_violations(tensor, expected)
            if not values:
                return found, None
            scales = {name: _scaling(module, factor, helper) for name, (module, factor) in placed.items()}
            not_finite, weights_hash = read_values(file, header, scales, target.dtype)
            return found + not_finite, weights_hash
    except UnreadableWeightsError as error:
        return [str(error)], None


def _place(name: str, target: LoRATarget) -> tuple[str, str] | None:
    """The module and the factor ("A" or "B") of a tensor named as PEFT names them; None for any other."""
    for factor in "AB":
        module = name.removeprefix("base_model.model.").removesuffix(f".lora_{factor}.weight")
        if module in target.features and name == _tensor_name(module, factor):
            return module, factor
    return None


def _tensor_name(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def _name_violations(names: list[str], placed: dict[str, tuple[str, str]], target: LoRATarget) -> list[str]:
    """Unexpected tensors, factors without their other half, and an adapter without tensors."""
    unknown = sorted(set(names) - placed.keys())
    found = [
        f"{name[:160]}: this tensor has no place here; expected base_model.model.model.layers.N.self_attn.MODULE."
        f"lora_A.weight or lora_B.weight, MODULE one of {', '.join(target.modules)}, N a layer of the base: remove it"
        for name in unknown[:MAX_LISTED]
    ]
    if len(unknown) > MAX_LISTED:
        found.append(f"{len(unknown) - MAX_LISTED} more tensors have no place here: remove them")
    modules = sorted({module for module, _ in placed.values()})
    lacking = [_tensor_name(module, factor) for module in modules for factor in "AB"]
    found += [f"{name}: missing, expected beside its other half" for name in lacking if name not in placed]
    if not names:
        found.append(f"{WEIGHTS_FILE}: found no tensor, expected a lora_A and a lora_B for each adapted module")
    return found


def _expected_shape(
    module: str, factor: str, helper: PEFTHelper | None, target: LoRATarget
) -> tuple[int | None, int | None]:
    """A: [rank, in]; B: [out, rank]. The rank is None if the configuration is not valid."""
    rank = helper.get_rank_and_scaling(module)[0] if helper is not None else None
    features_in, features_out = target.features[module]
    return (rank, features_in) if factor == "A" else (features_out, rank)


def _tensor_violations(tensor: TensorEntry, expected: tuple[int | None, int | None]) -> Iterator[str]:
    """Shape and dtype of one tensor."""
    shape = tensor.shape
    is_fitting = len(shape) == 2 and all(want in (None, size) for want, size in zip(expected, shape, strict=True))
    if not is_fitting:
        wanted = ["rank" if size is None else size for size in expected]
        found = quote(list(shape))
        yield f"{tensor.name}: found shape {found}, expected {wanted}: r of the configuration and the base's sizes"
    if tensor.dtype not in DTYPES:
        yield f"{tensor.name}: found dtype {tensor.dtype}, expected one of {', '.join(DTYPES)}"


def _scaling(module: str, factor: str, helper: PEFTHelper | None) -> float:
    """What vLLM multiplies the tensor by when it packs it."""
    return helper.get_rank_and_scaling(module)[1] if helper is not None and factor == "B" else 1.0
