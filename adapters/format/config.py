"""Owns the strict reading of `adapter_config.json`: every violation at once, nothing skipped.

`strict_json` parses it, pydantic checks each key, `rule_violations` checks the rules across keys.
"""

from typing import Any

from pydantic import ValidationError

from adapters.format.files import MAX_CONFIG_BYTES
from adapters.format.strict_json import parse_object, quote
from perft.config import NULLABLE, ROUTED_ONLY, AdapterConfig, rule_violations


def parse_config(raw: bytes) -> tuple[AdapterConfig | None, list[str]]:
    """The configuration as far as it is valid (None if too little is), and every violation found in it."""
    values, violations = _parse_object(raw)
    if values is None:
        return None, violations
    invalid_keys = {key for key, value in values.items() if value is None and key not in NULLABLE}
    violations += [f"{key}: found null; leave the key out or give it a value" for key in sorted(invalid_keys)]
    violations += [f"{key}: missing" for key in ("peft_type", "format_version") if key not in values]
    given = {key: value for key, value in values.items() if key not in invalid_keys}
    try:
        config = AdapterConfig.model_validate(given)
    except ValidationError as error:
        errors = [e for e in error.errors() if e["loc"] and e["loc"][0] not in invalid_keys]
        inner = {e["loc"][0] for e in errors if len(e["loc"]) > 1}
        broken = {str(e["loc"][0]) for e in errors} | invalid_keys
        violations += [_describe(e) for e in errors if len(e["loc"]) > 1 or e["loc"][0] not in inner]
        sound = {key: value for key, value in given.items() if key not in broken and value is not None}
        violations += rule_violations(sound, broken)
        return _salvage({key: value for key, value in sound.items() if key in AdapterConfig.model_fields}), violations
    return config, violations


def _salvage(sound: dict[str, Any]) -> AdapterConfig | None:
    """A configuration of the shapes that the valid keys describe; None if they describe none.

    The adapter is refused, but its weights can still be checked. Keys on which no shape depends are filled in where
    they are invalid, and left out where they do not belong.
    """
    values = {"base_model_name_or_path": "", "expert_type": "parallel", **sound}
    foreign = {"alpha"} if values["expert_type"] == "parallel" else {"activation"}
    if values["expert_type"] == "lora":
        values.setdefault("alpha", 1.0)
    if values.get("variant") != "R":
        foreign |= {*ROUTED_ONLY}
    else:
        top_k = values.get("top_k", 1)
        values["top_k"] = top_k if top_k <= values.get("num_experts", 1) else 1
        values["renormalize"] = values.get("renormalize", False) and values.get("gate_weight") != "base_slot"
    if values.get("variant") == "S":
        values["num_experts"] = 1
    try:
        return AdapterConfig.model_validate({key: value for key, value in values.items() if key not in foreign})
    except ValidationError:
        return None


def _parse_object(raw: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    """The top-level object, or None, and what is wrong with the JSON itself."""
    if len(raw) > MAX_CONFIG_BYTES:
        return None, [f"adapter_config.json: found {len(raw)} bytes, expected at most {MAX_CONFIG_BYTES}"]
    return parse_object(raw, "adapter_config.json")


def _describe(error: Any) -> str:
    """One of pydantic's errors as "where: found, expected"."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where[:80]}: unknown key, expected only {', '.join(sorted(AdapterConfig.model_fields))}"
    if error["type"] == "missing":
        return f"{where}: missing"
    return f"{where}: found {quote(error['input'])}; {error['msg'][:1].lower()}{error['msg'][1:]}"
