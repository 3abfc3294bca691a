"""Owns the validation of an uploaded folder: its kind, whether this server can serve it, and what it needs.

Invariant: what `UploadValidator.check` returns can be loaded by the engine as it is now.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapters.errors import InvalidAdapterError
from adapters.format.files import WEIGHTS_FILE, Limits
from adapters.format.folder import read_folder
from adapters.format.weights import header_violations
from adapters.identity import config_bytes, peft_type_of
from adapters.ref import Kind
from adapters.store import VersionRecord
from perft.base_model import BaseShape, fit_violations
from perft.config import AdapterConfig
from server.residency.state import Need


class LoRACheck(Protocol):
    """Every violation of a PEFT LoRA adapter in a folder, and its digest; without `values` only headers are read."""

    def __call__(self, folder: Path, *, values: bool = True) -> tuple[list[str], str | None]: ...


@dataclass(frozen=True)
class ValidatedAdapter:
    """An adapter that may be served. config is None for PEFT LoRA."""

    kind: Kind
    digest: str
    config: AdapterConfig | None
    need: Need


@dataclass(frozen=True)
class UploadValidator:
    """What the server accepts: by the format, the served base, limits and pool. check_lora: None if LoRA is off."""

    base: BaseShape
    limits: Limits
    rows_total: int
    check_lora: LoRACheck | None = None

    def check(self, folder: Path) -> ValidatedAdapter:
        """The adapter in `folder`, of which every byte is read. Raises InvalidAdapterError with every violation."""
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
        """A version of the store, which was checked when it was uploaded; only the header of its weights is read.

        Raises InvalidAdapterError if this base or pool cannot serve it.
        """
        if version.kind == "LORA":
            if self.check_lora is None:
                raise InvalidAdapterError("the stored adapter", [LORA_IS_OFF])
            if violations := self.check_lora(folder, values=False)[0]:
                raise InvalidAdapterError("the stored adapter", violations)
            return ValidatedAdapter("LORA", version.digest, None, Need(0, 1, version.size_bytes))
        config = AdapterConfig.model_validate_json(version.config)
        violations = fit_violations(config, self.base, self.limits.allow_other_base)
        violations += header_violations(folder / WEIGHTS_FILE, config, self.base)
        need = Need(0, 0, 0) if violations else self.need(config)
        if need.rows > self.rows_total:
            violations.append(too_many_rows(need.rows, self.rows_total))
        if violations:
            raise InvalidAdapterError("the stored adapter", violations)
        return ValidatedAdapter("PERFT", version.digest, config, need)

    def need(self, config: AdapterConfig) -> Need:
        """What a PERFT adapter needs: its rows in every layer it adapts, and as many on the host."""
        rows = config.rows_per_layer() * len(config.layer_indices(self.base.moe_layers))
        return Need(rows, 0, rows * self.base.hidden_size * self.base.dtype.itemsize)

    def _check_lora(self, folder: Path) -> ValidatedAdapter:
        if self.check_lora is None:
            raise InvalidAdapterError("the upload", [LORA_IS_OFF])
        violations, digest = self.check_lora(folder)
        if violations or digest is None:
            raise InvalidAdapterError("the upload", violations)
        size = sum(path.stat().st_size for path in folder.iterdir())
        return ValidatedAdapter("LORA", digest, None, Need(0, 1, size))


LORA_IS_OFF = (
    "peft_type: found 'LORA', expected 'PERFT': LoRA is off on this server; its operator can turn it on "
    "(--lora-target-modules)"
)


def too_many_rows(needed: int, total: int) -> str:
    return f"too_many_rows: the adapter takes {needed} rows, the pool has {total}: enlarge it with --pool-rows"


def peft_type(folder: Path) -> object:
    """The config's `peft_type`; None if the file has none or cannot be read, which the checks report."""
    try:
        return peft_type_of(config_bytes(folder))
    except OSError:
        return None
