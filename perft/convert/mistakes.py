"""Owns recognizing what people hand in by mistake for a PERFT checkpoint, and what to say about it.

Invariant: only names, shapes and JSON are looked at; a pickle is never opened.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_PER_EXPERT = re.compile(r"experts\.\d+\.\w+\.lora_[AB]\b|experts\.\d+\.w[123]\.lora_[AB]\b")
_SHARED_OUTER = re.compile(r"experts\.(?:gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3|w13)\.lora_[AB]\b")
_PARAMETERS = re.compile(r"experts\.(?:base_layer\.)?lora_[AB]\b")
_ATTENTION = re.compile(r"(?:self_attn|attn|attention)\.\w+\.lora_[AB]\b")
_MIXLORA = re.compile(r"\bmixlora\.|\bmoe_gate\b", re.IGNORECASE)
_ESFT = re.compile(r"experts\.\d+\.(?:gate_proj|up_proj|down_proj)\.weight$")
_FULL = re.compile(r"embed_tokens\.weight$|lm_head\.weight$|self_attn\.\w+_proj\.weight$")

INSIDE = "PERFT's experts stand beside the base's experts and never change the inside of one"


def mistake(folder: Path, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> str | None:
    """What this is, and why it is no PERFT checkpoint; None if it is nothing that we know.

    shapes: of the tensors of its safetensors files. config: its adapter_config.json, or {}.
    """
    peft_type = str(config.get("peft_type") or "")
    if peft_type == "PERFT":
        return "this is an adapter in our own format already: upload it as it is (perft adapters push NAME FOLDER)"
    if peft_type == "MIXLORA" or any(map(_MIXLORA.search, shapes)):
        return (
            "this is MixLoRA: it turns the FFN of a dense model into experts by LoRA on its matrices, under a router "
            f"of its own; {INSIDE}"
        )
    if (folder / "expert_cfg.json").is_file():
        return f"this is ESFT: full copies of some of the base's own experts, fine-tuned in place; {INSIDE}"
    if config.get("target_parameters") or any(map(_PARAMETERS.search, shapes)):
        return f"this is PEFT LoRA with target_parameters: LoRA on the matrices of the base's experts; {INSIDE}"
    if any(_SHARED_OUTER.search(name) and len(shape) == 3 for name, shape in shapes.items()):
        return (
            "this is shared-outer LoRA, as Tinker trains it: LoRA on the matrices of the base's experts, of which one "
            f"half is shared by all of them; {INSIDE}"
        )
    if any(map(_PER_EXPERT.search, shapes)) or any(map(_SHARED_OUTER.search, shapes)):
        return f"this is LoRA on each expert's own matrices (per-expert LoRA); {INSIDE}"
    if any(map(_ATTENTION.search, shapes)):
        return (
            "this is PEFT LoRA on attention, which needs no import: start the server with "
            "--lora-target-modules and upload it as it is (perft adapters push NAME FOLDER)"
        )
    if peft_type:
        return f"this is a PEFT adapter of another kind ({peft_type})"
    if any(map(_FULL.search, shapes)):
        return "this is a whole model, merged or fully fine-tuned: serve it as a base (perft serve FOLDER)"
    if shapes and all(map(_ESFT.search, shapes)):
        return f"these are full matrices of the base's experts, as ESFT saves them; {INSIDE}"
    return None


def pickles_of(folder: Path) -> list[Path]:
    """Files that may hold pickled weights."""
    return sorted(file for file in folder.iterdir() if file.suffix in PICKLES and file.is_file())
