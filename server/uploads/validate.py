"""Owns the validation of an uploaded folder: its kind, whether this server can serve it, and what it needs.

Invariant: what `UploadValidator.check` returns can be loaded by the engine as it is now.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from adapters.errors import InvalidAdapterError
from adapters.format.files import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE, Limits, is_plain_file
from adapters.format.folder import read_folder
from adapters.format.recognize import BOM
from adapters.format.weights import header_violations
from adapters.identity import config_bytes, peft_type_of
from adapters.ref import Kind
from adapters.store import BaseRecord, VersionRecord
from perft.base_model import BaseShape, fit_violations
from perft.config import AdapterConfig
from perft.operator.tables import adapter_rows
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

    @cached_property
    def base_record(self) -> BaseRecord:
        """The served base, as the store records it with every version accepted here."""
        base = self.base
        return BaseRecord(
            fingerprint=base.fingerprint,
            hidden_size=base.hidden_size,
            num_layers=base.num_layers,
            moe_layers=base.moe_layers,
            num_experts=base.num_experts,
            top_k=base.top_k,
        )

    def is_of_base(self, adapter: ValidatedAdapter) -> bool:
        """Whether an adapter that fits the served base may be taken for one of it: it names no other, and no others are
        allowed."""
        if self.limits.allow_other_base:
            return False
        named = None if adapter.config is None else adapter.config.base_fingerprint
        return named is None or self.base.fingerprint is None or named.lower() == self.base.fingerprint

    def check(self, folder: Path) -> ValidatedAdapter:
        """The adapter in the staged `folder`, of which every byte is read; its config loses a byte order mark.

        Raises InvalidAdapterError with every violation.
        """
        strip_byte_order_mark(folder)
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

    def stored(self, version: VersionRecord, folder: Path | None) -> ValidatedAdapter:
        """A version of the store, which was checked when it was uploaded; only the header of its weights is read.

        folder: None if its files are not on this machine yet.

        Raises InvalidAdapterError if this base or pool cannot serve it, or if it was accepted on another base.
        """
        violations = self._other_base(version)
        if version.kind == "LORA":
            if self.check_lora is None:
                violations.append(LORA_IS_OFF)
            elif folder is not None:
                violations += self.check_lora(folder, values=False)[0]
            if violations:
                raise InvalidAdapterError("the stored adapter", violations)
            return ValidatedAdapter("LORA", version.digest, None, Need(0, 1, version.size_bytes))
        config = AdapterConfig.model_validate_json(version.config)
        violations += fit_violations(config, self.base, self.limits.allow_other_base)
        if folder is not None:
            violations += header_violations(folder / WEIGHTS_FILE, config, self.base)
        need = Need(0, 0, 0) if violations else self.need(config)
        if need.rows > self.rows_total:
            violations.append(too_many_rows(need.rows, self.rows_total))
        if violations:
            raise InvalidAdapterError("the stored adapter", violations)
        return ValidatedAdapter("PERFT", version.digest, config, need)

    def need(self, config: AdapterConfig) -> Need:
        """What a PERFT adapter needs: its rows in every layer it adapts, and as many on the host."""
        rows = adapter_rows(config, self.base.moe_layers)
        return Need(rows, 0, rows * self.base.hidden_size * self.base.dtype.itemsize)

    def _other_base(self, version: VersionRecord) -> list[str]:
        """Why a version may not be served on this base, whatever its shapes say; none if it may."""
        accepted, served = version.base, self.base_record
        if accepted is None or accepted.is_same(served) or self.limits.allow_other_base:
            return []
        return [
            f"base: found one of {served}; the version was accepted on one of {accepted}: serve that base, or allow "
            "others (--allow-other-base)"
        ]

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


def strip_byte_order_mark(folder: Path) -> None:
    """Take UTF-8's byte order mark from the config, which not every reader skips. Two of them are a violation."""
    path = folder / CONFIG_FILE
    raw = config_bytes(folder) if is_plain_file(path) else b""
    if raw.startswith(BOM) and not raw.startswith(BOM * 2) and len(raw) <= MAX_CONFIG_BYTES:
        path.write_bytes(raw.removeprefix(BOM))


def peft_type(folder: Path) -> object:
    """The config's `peft_type`; None if the file has none or cannot be read, which the checks report."""
    try:
        return peft_type_of(config_bytes(folder))
    except OSError:
        return None
