"""Owns the check of a PEFT LoRA adapter's `adapter_config.json`: which keys are read, and what each may be.

PEFT writes about forty keys and adds some with every release; vLLM reads a dozen and ignores the rest.

Invariant: a key that changes what the adapter computes is either understood by vLLM or a violation, known to us or not.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from vllm.config.lora import LoRAConfig
from vllm.lora.peft_helper import PEFTHelper

from adapters.format.files import CONFIG_FILE
from adapters.format.strict_json import parse_object, quote

MAX_ALPHA = 65536
MAX_RANK = 65536
MAX_PATTERN_KEYS = 200
_PLAIN_KEY = re.compile(r"\^?[A-Za-z0-9_.]{1,256}")


@dataclass(frozen=True)
class Rule:
    """What the value of one key has to be. expected: the same in words."""

    is_kept: Callable[[Any], bool]
    expected: str
    is_required: bool = False


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= MAX_ALPHA


def _is_names(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value)


def _is_pattern(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """PEFT's patterns are regular expressions: only plain names are accepted, since matching others can take hours."""

    def is_kept(pattern: Any) -> bool:
        if not isinstance(pattern, dict):
            return pattern is None
        return len(pattern) <= MAX_PATTERN_KEYS and all(
            _PLAIN_KEY.fullmatch(key) and is_value(value) for key, value in pattern.items()
        )

    return is_kept


_PATTERN = f"at most {MAX_PATTERN_KEYS} plain module names (no regular expressions)"

RULES: dict[str, Rule] = {
    "peft_type": Rule(lambda value: value == "LORA", '"LORA"; other PEFT methods are not served', True),
    "r": Rule(_is_int, "a whole number from 1: the rank", True),
    "lora_alpha": Rule(_is_alpha, f"a number above 0 and at most {MAX_ALPHA}", True),
    "target_modules": Rule(_is_names, "a non-empty list of module names, or PEFT's own string", True),
    "use_rslora": Rule(lambda value: isinstance(value, bool), "true or false"),
    "rank_pattern": Rule(_is_pattern(_is_int), f"{_PATTERN} with whole numbers from 1"),
    "alpha_pattern": Rule(_is_pattern(_is_alpha), f"{_PATTERN} with numbers above 0 and at most {MAX_ALPHA}"),
}
"""The keys that are read here, or that determine rank and scale."""

VLLM_JUDGES = frozenset(field.name for field in fields(PEFTHelper)) - {*RULES, "modules_to_save"}
"""The keys that vLLM reads only to refuse what it does not implement."""

WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
        *("corda_config", "eva_config", "loftq_config", "lora_dropout", "lora_ga_config", "runtime_config"),
        *("exclude_modules", "layers_pattern", "layers_to_transform", "megatron_core", "qalora_group_size"),
    }
)
"""The keys that affect only training, or which tensors there are (the weights file shows that)."""


def parse_peft_config(raw: bytes, lora_config: LoRAConfig) -> tuple[PEFTHelper | None, list[str]]:
    """vLLM's view of the configuration (None if rank or scale are invalid), and every violation found."""
    values, violations = parse_object(raw, CONFIG_FILE)
    if values is None:
        return None, violations
    broken = _rule_violations(values)
    violations += broken
    violations += _meaning_violations(values)
    violations += _vllm_violations({key: value for key, value in values.items() if key in VLLM_JUDGES}, lora_config)
    if broken:
        return None, violations
    helper = PEFTHelper.from_dict({key: values[key] for key in RULES if key in values and key != "peft_type"})
    violations += _rank_violations(helper, lora_config)
    return helper, violations


def _rule_violations(values: dict[str, Any]) -> list[str]:
    found = [f"{key}: missing, expected {rule.expected}" for key, rule in RULES.items() if _is_lacking(key, values)]
    return found + [
        f"{key}: found {quote(values[key])}, expected {rule.expected}"
        for key, rule in RULES.items()
        if key in values and not rule.is_kept(values[key])
    ]


def _is_lacking(key: str, values: dict[str, Any]) -> bool:
    return RULES[key].is_required and key not in values


def _meaning_violations(values: dict[str, Any]) -> list[str]:
    """Keys in use that vLLM would ignore, though they change what the adapter computes, or may."""
    ignored = values.keys() - RULES.keys() - VLLM_JUDGES - WITHOUT_EFFECT
    return [
        f"{key[:80]}: found {quote(values[key])}, which vLLM does not implement; expected it absent, null or false"
        for key in sorted(ignored)
        if values[key]
    ]


def _vllm_violations(judged: dict[str, Any], lora_config: LoRAConfig) -> list[str]:
    """What vLLM itself refuses, key by key so that each has its own line."""
    found: list[str] = []
    for key, value in sorted(judged.items()):
        if refusal := _refusal({"r": 1, "lora_alpha": 1, "target_modules": [], key: value}, lora_config):
            found.append(f"{key}: found {quote(value)}, expected it absent or at PEFT's default: {refusal}")
    return found


def _rank_violations(helper: PEFTHelper, lora_config: LoRAConfig) -> list[str]:
    ranks = {"r": helper.r} | {f"rank_pattern {key}": rank for key, rank in helper.rank_pattern.items()}
    return [
        f"{where}: found rank {rank}, expected at most {lora_config.max_lora_rank} (--max-lora-rank): {refusal}"
        for where, rank in ranks.items()
        if (refusal := _refusal({"r": rank, "lora_alpha": 1, "target_modules": []}, lora_config))
    ]


def _refusal(values: dict[str, Any], lora_config: LoRAConfig) -> str | None:
    """Why vLLM would not load an adapter with this configuration; None if it would."""
    try:
        PEFTHelper.from_dict(values).validate_legal(lora_config)
    except (ValueError, TypeError, AttributeError) as error:
        return str(error)
    return None
