"""How stored adapters are validated when a server opens its store, before any of them is served."""

from pathlib import Path

import pytest

from adapters.errors import InvalidAdapterError
from adapters.format.files import Limits
from adapters.store import VersionRecord
from server.uploads.validate import UploadValidator
from tests.server.fakes import BASE
from tests.store_contents import lora


class Looked:
    """A check of PEFT LoRA that keeps what it was asked."""

    def __init__(self, *violations: str) -> None:
        self.violations, self.values = list(violations), [True]

    def __call__(self, folder: Path, *, values: bool = True) -> tuple[list[str], str | None]:
        self.values.append(values)
        return self.violations, "0" * 64


def stored(tmp_path: Path) -> VersionRecord:
    """The record of a stored PEFT LoRA adapter."""
    content = lora()
    config = content.config.decode()
    return VersionRecord(version=1, digest=content.digest, kind=content.kind, config=config, size_bytes=77, created=0)


def test_a_stored_lora_adapter_is_held_against_this_server(tmp_path: Path) -> None:
    check = Looked("o_proj: not opened here")
    with pytest.raises(InvalidAdapterError) as caught:
        UploadValidator(BASE, Limits(), 10, check).stored(stored(tmp_path), tmp_path)
    assert list(caught.value.violations) == ["o_proj: not opened here"] and check.values[-1] is False
    accepted = UploadValidator(BASE, Limits(), 10, Looked()).stored(stored(tmp_path), tmp_path)
    assert accepted.kind == "LORA" and accepted.need.lora_slots == 1


def test_a_stored_lora_adapter_where_lora_is_off(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapterError, match="lora-target-modules"):
        UploadValidator(BASE, Limits(), 10).stored(stored(tmp_path), tmp_path)
