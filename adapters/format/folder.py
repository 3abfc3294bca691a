"""Owns the check of an adapter as a whole: a folder with exactly two files and an optional README.md.

Invariant: a `CheckedAdapter` passed every rule of docs/format.md against the base it was checked for.
"""

from dataclasses import dataclass
from pathlib import Path

from adapters.access import check_readable
from adapters.errors import InvalidAdapterError
from adapters.format.beside import HandedIn, adapter_in
from adapters.format.config import foreign_first, parse_config
from adapters.format.files import (
    CONFIG_FILE,
    DEFAULT_LIMITS,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    Limits,
    file_violations,
    is_plain_file,
)
from adapters.format.load import load_layers
from adapters.format.weights import check_weights
from adapters.identity import digest_of
from perft.base_model import BaseShape, fit_violations
from perft.config import AdapterConfig
from perft.reading import printable
from perft.reference import LayerWeights


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter that satisfies the format. digest: its identity, 64 hex digits."""

    folder: Path
    config: AdapterConfig
    digest: str

    def layer_weights(self, base: BaseShape) -> dict[int, LayerWeights]:
        """The tensors by decoder layer, cast to the model's dtype, on the CPU."""
        return load_layers(self.folder, self.config, base)


def read_folder(folder: Path, base: BaseShape, limits: Limits = DEFAULT_LIMITS) -> CheckedAdapter:
    """The adapter in `folder`, checked against the format and `base`; its weights are read once.

    Raises InvalidAdapterError with every violation found.
    """
    config, violations, weights_hash = _check(folder, base, limits)
    if config is None or violations:
        raise InvalidAdapterError(str(folder), violations)
    return CheckedAdapter(folder, config, digest_of(config.canonical_json(), weights_hash))


def check_folder(
    folder: Path, base: BaseShape | None, limits: Limits = DEFAULT_LIMITS
) -> tuple[AdapterConfig | None, list[str]]:
    """The configuration (None if unsound) and every violation of docs/format.md found in `folder`.

    With `base` None, what depends on the base is left out.
    """
    config, violations, _ = _check(folder, base, limits)
    return config, violations


def check_handed_in(path: Path, base: BaseShape | None, limits: Limits = DEFAULT_LIMITS) -> tuple[HandedIn, list[str]]:
    """The adapter in somebody's folder (see `adapter_in`), and every violation found in its files.

    Raises PermissionError (see adapters/access.py) for what this process may not read.
    """
    check_readable(path)
    found = adapter_in(path) if path.is_dir() else HandedIn(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        check_readable(found.folder / name, f"chmod -R a+rX {path}")
    _, violations, _ = _check(found.folder, base, limits, are_others_allowed=True)
    return found, foreign_first([*found.violations, *violations])


def _check(
    folder: Path, base: BaseShape | None, limits: Limits, are_others_allowed: bool = False
) -> tuple[AdapterConfig | None, list[str], bytes]:
    """What `check_folder` returns, and sha256 of the weights as raw bytes (empty if they could not be read)."""
    if not folder.is_dir():
        return None, [f"found no folder at {folder}, expected one with {CONFIG_FILE} and {WEIGHTS_FILE}"], b""
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    violations = file_violations(folder, limits, are_others_allowed)
    config: AdapterConfig | None = None
    weights_hash = b""
    if is_plain_file(config_file) and config_file.stat().st_size <= MAX_CONFIG_BYTES:
        config, config_violations = parse_config(config_file.read_bytes())
        violations += config_violations
    if config is not None and base is not None:
        violations += fit_violations(config, base, limits.allow_other_base)
    if is_plain_file(weights_file) and weights_file.stat().st_size <= limits.max_weights_bytes:
        weights_violations, weights_hash = check_weights(weights_file, config, base)
        violations += weights_violations
    return config, [printable(text) for text in foreign_first(violations)], weights_hash
