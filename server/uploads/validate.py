"""Owns the look at an uploaded folder: what kind of adapter it is, whether it may be served here, what it will take.

Invariant: what comes out of `UploadValidator.check` can be loaded by the engine as it is now.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapters import InvalidAdapterError, Limits, VersionRecord, lora_digest, read_folder
from adapters.format.folder import CONFIG_FILE, WEIGHTS_FILE
from adapters.format.weights import shape_violations
from adapters.ref import Kind
from perft.base_model import BaseShape, fit_violations
from perft.config import AdapterConfig
from server.residency.scheduler import Need


class LoRACheck(Protocol):
    """Every violation of a PEFT LoRA adapter in a folder; without `values` only the headers are looked at."""

    def __call__(self, folder: Path, *, values: bool = True) -> list[str]: ...


@dataclass(frozen=True)
class ValidatedAdapter:
    """An adapter that may be served. config is None for PEFT LoRA."""

    kind: Kind
    digest: str
    config: AdapterConfig | None
    need: Need


@dataclass(frozen=True)
class UploadValidator:
    """What is taken: by the format, the served base, the limits, and the pool. check_lora: None where LoRA is off."""

    base: BaseShape
    limits: Limits
    rows_total: int
    check_lora: LoRACheck | None = None

    def check(self, folder: Path) -> ValidatedAdapter:
        """The adapter in `folder`. Blocks while it reads all of it. Raises InvalidAdapterError with every violation."""
        if peft_type(folder) == "LORA":
            return self._check_lora(folder)
        try:
            checked = read_folder(folder, self.base, self.limits)
        except InvalidAdapterError as error:
            raise InvalidAdapterError("the upload", error.violations) from None
        need = self.need(checked.config)
        if need.rows > self.rows_total:
            raise InvalidAdapterError("the upload", [too_many_rows(need.rows, self.rows_total)])
        return ValidatedAdapter("PERFT", checked.digest, checked.config, need)

    def stored(self, version: VersionRecord, folder: Path) -> ValidatedAdapter:
        """A version of the store, which was checked when it came. Raises InvalidAdapterError if this base or pool does
        not take it; only the header of its weights is read."""
        if version.kind == "LORA":
            if self.check_lora is None:
                raise InvalidAdapterError("the stored adapter", [LORA_IS_OFF])
            if violations := self.check_lora(folder, values=False):
                raise InvalidAdapterError("the stored adapter", violations)
            return ValidatedAdapter("LORA", version.digest, None, Need(0, 1, version.size_bytes))
        config = AdapterConfig.model_validate_json(version.config)
        violations = fit_violations(config, self.base, self.limits.allow_other_base)
        violations += shape_violations(folder / WEIGHTS_FILE, config, self.base)
        need = Need(0, 0, 0) if violations else self.need(config)
        if need.rows > self.rows_total:
            violations.append(too_many_rows(need.rows, self.rows_total))
        if violations:
            raise InvalidAdapterError("the stored adapter", violations)
        return ValidatedAdapter("PERFT", version.digest, config, need)

    def need(self, config: AdapterConfig) -> Need:
        """What a PERFT adapter takes: its rows in every layer it adapts, and as many on the host."""
        rows = config.rows_per_layer() * len(config.layer_indices(self.base.moe_layers))
        return Need(rows, 0, rows * self.base.hidden_size * self.base.dtype.itemsize)

    def _check_lora(self, folder: Path) -> ValidatedAdapter:
        if self.check_lora is None:
            raise InvalidAdapterError("the upload", [LORA_IS_OFF])
        if violations := self.check_lora(folder):
            raise InvalidAdapterError("the upload", violations)
        size = sum(path.stat().st_size for path in folder.iterdir())
        return ValidatedAdapter("LORA", lora_digest(folder), None, Need(0, 1, size))


LORA_IS_OFF = (
    "peft_type: found 'LORA', which this server does not take: its operator has to name the modules "
    "(--lora-target-modules)"
)


def too_many_rows(needed: int, total: int) -> str:
    return f"too_many_rows: the adapter takes {needed} rows, the pool has {total}: enlarge it with --pool-rows"


def peft_type(folder: Path) -> object:
    """The config's `peft_type`, as far as it can be read; what is wrong with the file is said by the checks."""
    try:
        values = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values.get("peft_type") if isinstance(values, dict) else None
