"""Owns the base_fingerprint of the base that a checkpoint is imported for, read off its files.

Invariant: a base whose files are here has all routers that its configuration promises, finite, or it is refused.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from perft.base_model import BaseShape, base_fingerprint
from perft.convert.files import entries_in
from perft.convert.layout import BLOCKS
from perft.convert.weights import FLOATS, Entry, loaded
from perft.errors import InputError

_ROUTER = re.compile(rf"(?:model\.)?layers\.([0-9]{{1,6}})\.(?:{'|'.join(BLOCKS.values())})\.gate\.weight")


def fingerprint_in(name: str, base: BaseShape) -> str | None:
    """docs/format.md's base_fingerprint of OLMoE or Mixtral; None for a name on the hub whose weights are not here.

    Raises InputError.
    """
    folder = _folder(name)
    if folder is None:
        return None
    try:
        entries = entries_in(folder)
    except InputError as error:
        raise InputError(f"the base {name} cannot be used: {error.headline}", error.problems) from None
    matches = ((_ROUTER.fullmatch(tensor), entry) for tensor, entry in entries.items())
    routers = {int(match[1]): entry for match, entry in matches if match is not None}
    problems = _problems(routers, base)
    if not problems:
        tensors = loaded([routers[layer] for layer in base.moe_layers])
        problems = _not_finite(base.moe_layers, tensors)
    if problems:
        raise InputError(f"the base {name} cannot be used: its weights are not those of its config.json", problems)
    return base_fingerprint(tensors)


def _problems(routers: dict[int, Entry], base: BaseShape) -> list[str]:
    expected = (base.num_experts, base.hidden_size)
    found = [f"layer {layer}: found no router" for layer in base.moe_layers if layer not in routers]
    found += [
        f"layer {layer}: found a router, expected {base.num_layers} layers"
        for layer in sorted(routers.keys() - set(base.moe_layers))
    ]
    for layer, entry in sorted(routers.items()):
        if entry.shape != expected:
            found.append(f"layer {layer}: found a router {list(entry.shape)}, expected {list(expected)}")
        if entry.dtype not in FLOATS:
            found.append(f"layer {layer}: found a router of {entry.dtype}, expected float32, float16 or bfloat16")
    return found


def _not_finite(layers: Sequence[int], tensors: Sequence[torch.Tensor]) -> list[str]:
    return [
        f"layer {layer}: found values in the router that are not finite"
        for layer, tensor in zip(layers, tensors, strict=True)
        if not bool(torch.isfinite(tensor).all())
    ]


def _folder(name: str) -> Path | None:
    """Where a base's files are on this machine."""
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return Path(name)
    try:
        snapshot = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None
    return snapshot if any(snapshot.glob("*.safetensors")) else None
