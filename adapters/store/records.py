"""Owns what the store records of a name and its versions, and the file of each name.

Invariant: every record is consistent: ascending versions up to `highest`, the active one among the ready ones.
"""

import re
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.ref import Kind

DIGEST = "^[0-9a-f]{64}$"
Number = Annotated[int, Field(ge=1)]
Model = TypeVar("Model", bound=BaseModel)


class StoreFile(BaseModel):
    """STORE.json. floor: a new name starts above it (all that schema 1 remembered of deleted names)."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    number: int = Field(ge=0, alias="schema")
    floor: int = Field(ge=0)

    def file_bytes(self) -> bytes:
        return (self.model_dump_json(by_alias=True) + "\n").encode()


class BaseRecord(BaseModel):
    """The base model that a version was accepted on. fingerprint: docs/format.md's; None if it is not known."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    fingerprint: Annotated[str, Field(pattern=DIGEST)] | None
    hidden_size: int
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int

    def is_same(self, other: "BaseRecord") -> bool:
        """By the fingerprints where both are known, else by the shape: its path and served name do not matter."""
        if self.fingerprint is not None and other.fingerprint is not None:
            return self.fingerprint == other.fingerprint
        return self.model_copy(update={"fingerprint": None}) == other.model_copy(update={"fingerprint": None})

    def __str__(self) -> str:
        fingerprint = "an unknown fingerprint" if self.fingerprint is None else f"fingerprint {self.fingerprint}"
        return (
            f"{fingerprint}, hidden size {self.hidden_size}, {len(self.moe_layers)} MoE layers of {self.num_layers}, "
            f"{self.num_experts} experts, top-k {self.top_k}"
        )


@lru_cache(64)
def _shared(base: BaseRecord | None) -> BaseRecord | None:
    """One object for all records of one base: a store may have millions of versions."""
    return base


class VersionRecord(BaseModel):
    """One version of a name.

    config: the text uploaded (one content may be described in several ways). created: in unix seconds. base: what it
    was accepted on; None in records of schema 1 until they are first served.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    version: Number
    digest: Annotated[str, Field(pattern=DIGEST)]
    kind: Kind
    config: str
    size_bytes: Annotated[int, Field(ge=0)]
    created: Annotated[int, Field(ge=0)]
    state: Literal["ready", "draining"] = "ready"
    base: Annotated[BaseRecord | None, AfterValidator(_shared)] = None

    @property
    def weights_bytes(self) -> int:
        """The size of the weights file: `size_bytes` without that of the configuration."""
        return self.size_bytes - len(self.config.encode())

    def draining(self) -> "VersionRecord":
        return self.model_copy(update={"state": "draining"})


class AdapterRecord(BaseModel):
    """A name and its versions, at least one. highest: the last number given, even if it was deleted since."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    active: Number | None
    allowed_keys: tuple[str, ...] | None = None
    pinned: bool = False
    highest: Number
    versions: Annotated[tuple[VersionRecord, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "AdapterRecord":
        numbers = [version.version for version in self.versions]
        if any(a >= b for a, b in pairwise(numbers)):
            raise ValueError(f"versions: found {numbers}, expected ascending numbers without repeats")
        if self.highest < numbers[-1]:
            raise ValueError(f"highest: found {self.highest}, expected at least {numbers[-1]}, a version's number")
        ready = [version.version for version in self.versions if version.state == "ready"]
        if self.active is not None and self.active not in ready:
            raise ValueError(f"active: found {self.active}, expected one of the ready versions {ready} or null")
        return self

    def version(self, number: int) -> VersionRecord:
        """Raises KeyError for a version that the name does not have."""
        for version in self.versions:
            if version.version == number:
                return version
        raise KeyError(f"{self.name}@{number}")

    def with_digest(self, digest: str) -> VersionRecord | None:
        """The ready version with that content, if there is one."""
        return next((v for v in self.versions if v.digest == digest and v.state == "ready"), None)

    @property
    def is_going(self) -> bool:
        """Whether every version is being deleted, and the name with the last of them."""
        return all(version.state == "draining" for version in self.versions)

    def changed(self, **changes: Any) -> "AdapterRecord":
        """A copy with `changes`, checked like every record."""
        return AdapterRecord.model_validate({**dict(self), **changes})

    def file_bytes(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()


class Tombstone(NamedTuple):
    """What is remembered of a deleted name. highest: its last number. allowed_keys: as the name had them last."""

    highest: int
    allowed_keys: tuple[str, ...] | None


def is_digest(text: str) -> bool:
    return re.fullmatch(DIGEST, text) is not None


def record_file(name: str) -> str:
    """The name of a record's file: a client's text never becomes part of a path."""
    return sha256(name.encode()).hexdigest() + ".json"


def read_record(path: Path) -> AdapterRecord:
    """The record in `path`. Raises ValueError with what is wrong with it."""
    record = parse(AdapterRecord, path.read_bytes())
    if record_file(record.name) != path.name:
        raise ValueError(f"found the name {record.name!r}, whose file is {record_file(record.name)}")
    return record


def parse(model: type[Model], raw: bytes) -> Model:
    """`raw` as a `model`. Raises ValueError of one line."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
        raise ValueError("; ".join(problems)) from None
