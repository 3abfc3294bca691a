"""Owns an adapter as a folder: exactly two files and an optional README.md, checked as a whole.

Invariant: a `CheckedAdapter` passed every rule of FORMAT.md against the base it was checked for.
"""

import stat
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path

from safetensors.torch import load_file

from adapters.errors import InvalidAdapterError
from adapters.format.config import MAX_CONFIG_BYTES, parse_config
from adapters.format.strict_json import on_one_line
from adapters.format.weights import weights_violations
from perft.base_model import BaseShape, fit_violations
from perft.config import AdapterConfig
from perft.reference import LayerWeights

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
README_FILE = "README.md"
MAX_README_BYTES = 64 * 1024


@dataclass(frozen=True)
class Limits:
    """What the server's operator allows beyond the format."""

    max_weights_bytes: int = 2 * 1024**3
    allow_other_base: bool = False


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter that satisfies the format: where it lies, what it is, and its identity (64 hex digits)."""

    folder: Path
    config: AdapterConfig
    digest: str

    def layer_weights(self, base: BaseShape) -> dict[int, LayerWeights]:
        """The tensors by decoder layer, cast to the model's dtype, on the CPU."""
        tensors = {k: v.to(base.dtype) for k, v in load_file(self.folder / WEIGHTS_FILE).items()}
        return {
            layer: LayerWeights(
                tensors.get(f"layers.{layer}.router"),
                tensors[f"layers.{layer}.down_proj"],
                tensors[f"layers.{layer}.up_proj"],
            )
            for layer in self.config.layer_indices(base.moe_layers)
        }


DEFAULT_LIMITS = Limits()


def read_folder(folder: Path, base: BaseShape, limits: Limits = DEFAULT_LIMITS) -> CheckedAdapter:
    """The adapter in `folder`, checked against the format and `base`.

    Raises InvalidAdapterError with every violation found.
    """
    config, violations = check_folder(folder, base, limits)
    if config is None or violations:
        raise InvalidAdapterError(str(folder), violations)
    return CheckedAdapter(folder, config, digest_of(config, folder / WEIGHTS_FILE))


def check_folder(
    folder: Path, base: BaseShape | None, limits: Limits = DEFAULT_LIMITS
) -> tuple[AdapterConfig | None, list[str]]:
    """The configuration (None if unsound) and every violation of FORMAT.md found in `folder`.

    With `base` None what depends on the base is not looked at.
    """
    if not folder.is_dir():
        return None, [f"found no folder at {folder}, expected one with {CONFIG_FILE} and {WEIGHTS_FILE}"]
    violations = file_violations(folder, limits)
    config: AdapterConfig | None = None
    if is_plain_file(folder / CONFIG_FILE) and (folder / CONFIG_FILE).stat().st_size <= MAX_CONFIG_BYTES:
        config, config_violations = parse_config((folder / CONFIG_FILE).read_bytes())
        violations += config_violations
    if config is not None and base is not None:
        violations += fit_violations(config, base, limits.allow_other_base)
    weights = folder / WEIGHTS_FILE
    if is_plain_file(weights) and weights.stat().st_size <= limits.max_weights_bytes:
        violations += weights_violations(weights, config, base)
    return config, [on_one_line(text) for text in violations]


def digest_of(config: AdapterConfig, weights: Path) -> str:
    """The identity of FORMAT.md: sha256(sha256(C) + sha256(W)), as 64 hex digits."""
    return _digest(config.canonical_json(), weights)


def lora_digest(folder: Path) -> str:
    """The identity of a PEFT LoRA adapter: the same, of the config file's own bytes."""
    return _digest((folder / CONFIG_FILE).read_bytes(), folder / WEIGHTS_FILE)


def _digest(config: bytes, weights: Path) -> str:
    with weights.open("rb") as file:
        return sha256(sha256(config).digest() + file_digest(file, "sha256").digest()).hexdigest()


def file_violations(folder: Path, limits: Limits) -> list[str]:
    """Missing, extra, linked and oversized files."""
    limit = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: limits.max_weights_bytes, README_FILE: MAX_README_BYTES}
    entries = {entry.name: entry for entry in folder.iterdir()}
    found = [f"{name}: missing" for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in entries]
    for name, entry in sorted(entries.items()):
        if name not in limit:
            found.append(f"{name[:120]}: not part of an adapter (only {', '.join(limit)} are): remove it")
        elif not is_plain_file(entry):
            found.append(f"{name}: found a link, folder or device, expected a plain file")
        elif (size := entry.stat().st_size) > limit[name]:
            found.append(f"{name}: found {size} bytes, expected at most {limit[name]}")
    return found


def is_plain_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
