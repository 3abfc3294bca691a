"""Owns the strict reading of `adapter_config.json`: every violation at once, nothing skipped.

`strict_json` parses it, pydantic checks each key, `rule_violations` checks the rules across keys.
"""

import re
from typing import Any

from pydantic import ValidationError

from adapters.format.files import MAX_CONFIG_BYTES
from adapters.format.strict_json import parse_object, quote
from perft.config import NULLABLE, ROUTED_ONLY, AdapterConfig, rule_violations

PEFT_TYPE = "PERFT"
_OF_PEFT = "of the PEFT library, which is not served"
FOREIGN_TYPES = {
    "LORA": "LoRA, served where the operator turned it on",
    "IA3": f"IA3, scaled activations {_OF_PEFT}",
    "MIXLORA": "MixLoRA, LoRA experts with a router, which is not served",
    "MOELORA": "a mixture of LoRA experts, which is not served",
    "XLORA": f"X-LoRA, a mixture of LoRA adapters {_OF_PEFT}",
    **dict.fromkeys(
        ("PREFIXTUNING", "PROMPTTUNING", "MULTITASKPROMPTTUNING", "PTUNING", "CPT"),
        f"a trained prompt or prefix {_OF_PEFT}",
    ),
    **dict.fromkeys(
        ("ADALORA", "LOHA", "LOKR", "VERA", "VBLORA", "RANDLORA", "DORA", "ROAD", "GRALORA", "DELORA"),
        f"a relative of LoRA {_OF_PEFT}",
    ),
    **dict.fromkeys(
        ("OFT", "BOFT", "HRA", "POLY", "LNTUNING", "FOURIERFT", "BONE", "MISS", "SHIRA", "C3A", "WAVEFT", "OSF"),
        f"a method {_OF_PEFT}",
    ),
    **dict.fromkeys(("TRAINABLETOKENS", "ADAPTIONPROMPT"), f"a method {_OF_PEFT}"),
}
"""Methods whose `peft_type` people hand in, by its letters and digits."""


def parse_config(raw: bytes) -> tuple[AdapterConfig | None, list[str]]:
    """The configuration as far as it is valid (None if too little is), and every violation found in it."""
    values, violations = _parse_object(raw)
    if values is None:
        return None, violations
    invalid_keys = {key for key, value in values.items() if value is None and key not in NULLABLE}
    violations += [f"{key}: found null; leave the key out or give it a value" for key in sorted(invalid_keys)]
    violations += [f"{key}: missing" for key in ("peft_type", "format_version") if key not in values]
    violations += foreign_type(values.get("peft_type"))
    given = {key: value for key, value in values.items() if key not in invalid_keys}
    try:
        config = AdapterConfig.model_validate(given)
    except ValidationError as error:
        told = invalid_keys | {"peft_type"}
        errors = [e for e in error.errors() if e["loc"] and e["loc"][0] not in told]
        inner = {e["loc"][0] for e in errors if len(e["loc"]) > 1}
        broken = {str(e["loc"][0]) for e in error.errors() if e["loc"]} | invalid_keys
        violations += [_describe(e) for e in errors if len(e["loc"]) > 1 or e["loc"][0] not in inner]
        sound = {key: value for key, value in given.items() if key not in broken and value is not None}
        violations += rule_violations(sound, broken)
        known = {key: value for key, value in sound.items() if key in AdapterConfig.model_fields}
        return _salvage(known), foreign_first(violations)
    return config, foreign_first(violations)


def foreign_type(found: object) -> list[str]:
    """The violation of a `peft_type` that is another method's, with what that is; none without one."""
    if found is None or found == PEFT_TYPE:
        return []
    if not isinstance(found, str):
        return [f"peft_type: found {quote(found)}, expected '{PEFT_TYPE}'"]
    if found.strip().upper() == PEFT_TYPE:
        return [f"peft_type: found {quote(found)}, expected '{PEFT_TYPE}', written exactly so"]
    method = FOREIGN_TYPES.get(re.sub(r"[^A-Z0-9]", "", found.upper()), "not a method that is known here")
    return [
        f"peft_type: found {quote(found)} ({method}), expected '{PEFT_TYPE}': this is an adapter of another method, so "
        "the other violations say only how it differs"
    ]


def foreign_first(violations: list[str]) -> list[str]:
    """The same, with what is wrong with `peft_type` first: the others mostly follow from it."""
    return sorted(violations, key=lambda violation: not violation.startswith("peft_type: "))


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
