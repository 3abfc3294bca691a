"""Owns finding the MoE routers in a checkpoint's safetensors files, by structure: each family has its own names.

A router is a matrix [N experts, hidden size] of a decoder layer, outside of the experts and of attention; all of a
model's have the same name but for the layer. Invariant: where that does not lead to one answer, there is none.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from perft.base_model import BaseShape, base_fingerprint

_IN_LAYER = re.compile(r"(.*?)\b(?:layers|blocks|h)\.(\d+)\.(.+)\.weight")
_ELSEWHERE = re.compile(r"experts?\b|attn|attention|mamba", re.IGNORECASE)
_ROUTERS = frozenset({"gate", "router"})
_INDEX = "model.safetensors.index.json"
_EXPERT_COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts",
)  # fmt: skip

Found = dict[int, tuple[Path, str]]
"""By decoder layer: the file and the tensor's name."""


def checkpoint_fingerprint(folder: Path, shape: BaseShape | None = None) -> str | None:
    """The fingerprint of a checkpoint; None if its safetensors files have no router that can be told for certain.

    Read from the files, because an engine may cast or repack what it loads. shape: of the loaded model; without it the
    checkpoint's own config.json counts.
    """
    experts, hidden, wanted = _expected(folder, shape)
    named: dict[str, Found] = defaultdict(dict)
    unnamed: dict[str, Found] = defaultdict(dict)
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                match = _IN_LAYER.fullmatch(name)
                if match is None or _ELSEWHERE.search(match[3]):
                    continue
                found = file.get_slice(name).get_shape()
                if len(found) == 2 and _fits(found[0], experts) and _fits(found[1], hidden):
                    group = named if _ROUTERS.intersection(match[3].split(".")) else unnamed
                    group[f"{match[1]}*.{match[3]}"][int(match[2])] = (path, name)
    for group in (named, unnamed if experts is not None and hidden is not None else {}):
        kept = [found for found in (_kept(found, wanted) for found in group.values()) if found]
        most = max(map(len, kept), default=0)
        fingerprints = {_hash(found) for found in kept if len(found) == most}
        if fingerprints:
            return fingerprints.pop() if len(fingerprints) == 1 else None
    return None


def _files(folder: Path) -> Iterable[Path]:
    """The files that belong to the model: those of its index, if it has one."""
    index = folder / _INDEX
    if index.is_file():
        return sorted({folder / name for name in json.loads(index.read_bytes())["weight_map"].values()})
    return sorted(folder.glob("*.safetensors"))


def _expected(folder: Path, shape: BaseShape | None) -> tuple[int | None, int | None, Iterable[int]]:
    """Number of experts, hidden size, and the layers that have a router; what is not known is None, or too many."""
    if shape is not None:
        return shape.num_experts, shape.hidden_size, shape.moe_layers
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None, None, ()
    text = config.get("text_config") or config
    experts = next((count for key in _EXPERT_COUNTS if (count := _number(text, key))), None)
    return experts, _number(text, "hidden_size"), range(_number(text, "num_hidden_layers") or 0)


def _number(values: Mapping[str, Any], key: str) -> int | None:
    value = values.get(key)
    return value if type(value) is int else None


def _fits(found: int, expected: int | None) -> bool:
    return found > 1 if expected is None else found == expected


def _kept(found: Found, wanted: Iterable[int]) -> Found:
    """Those of the decoder's own layers (a checkpoint may have more, to predict further tokens); none if one lacks.

    A `range` has all layers of the model, of which some are dense.
    """
    layers = set(wanted)
    kept = {layer: where for layer, where in found.items() if layer in layers or not layers}
    return kept if isinstance(wanted, range) or layers <= kept.keys() else {}


def _hash(found: Found) -> str:
    def weights() -> Iterable[torch.Tensor]:
        for _, (path, name) in sorted(found.items()):
            with safe_open(path, framework="pt") as file:
                yield file.get_tensor(name)

    return base_fingerprint(weights())
