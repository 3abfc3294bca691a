"""Owns what each change does to the record of a name: pure functions, which every store uses.

Each takes the record as it is and returns the record as it shall be; what does not fit raises KeyError or ValueError.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, NamedTuple

from adapters.store.records import AdapterRecord, BaseRecord, Tombstone, VersionRecord


class Unchanged(Enum):
    """What a change takes for a field that stays the same, since None is a value."""

    UNCHANGED = "unchanged"


UNCHANGED: Final = Unchanged.UNCHANGED
Keys = Sequence[str] | Unchanged | None
"""Labels that may select a name; None for every key."""


class Added(NamedTuple):
    """What `added` makes of a name. is_new: False if a ready version with the same content is reused."""

    record: AdapterRecord
    version: VersionRecord
    is_new: bool


def added(
    name: str, record: AdapterRecord | None, tombstone: Tombstone | None, floor: int, version: VersionRecord, *,
    activate: bool, allowed_keys: Keys,
) -> Added:  # fmt: skip
    """`version` as the next one of `name`; its number is given here, above every number that the name ever had.

    record, tombstone: what there is of the name; at most one of them. floor: a new name starts above it.
    """
    changes: dict[str, Any] = {}
    if not isinstance(allowed_keys, Unchanged):
        changes["allowed_keys"] = _labels(allowed_keys)
    elif tombstone is not None:
        changes["allowed_keys"] = tombstone.allowed_keys
    if record is None:
        number = max(floor, 0 if tombstone is None else tombstone.highest) + 1
        version = version.model_copy(update={"version": number})
        made = AdapterRecord(name=name, active=None, highest=number, versions=(version,))
        return Added(made.changed(**changes, active=number if activate else None), version, True)
    if record.is_going:
        changes["pinned"] = False
    existing = record.with_digest(version.digest)
    if existing is not None:
        changes["active"] = existing.version if activate else record.active
        return Added(record.changed(**changes), existing, False)
    version = version.model_copy(update={"version": record.highest + 1})
    changes |= {"highest": version.version, "versions": (*record.versions, version)}
    if activate:
        changes["active"] = version.version
    return Added(record.changed(**changes), version, True)


def updated(
    record: AdapterRecord, *, active: int | Unchanged | None, allowed_keys: Keys, pinned: bool | Unchanged
) -> AdapterRecord:
    """The given fields changed. Raises ValueError if `active` names a version that is being deleted."""
    changes: dict[str, Any] = {}
    if not isinstance(active, Unchanged):
        if active is not None and record.version(active).state == "draining":
            raise ValueError(f"{record.name}@{active} is being deleted, expected a ready version: activate another")
        changes["active"] = active
    if not isinstance(allowed_keys, Unchanged):
        changes["allowed_keys"] = _labels(allowed_keys)
    if not isinstance(pinned, Unchanged):
        changes["pinned"] = pinned
    return record.changed(**changes)


def with_base(record: AdapterRecord, numbers: Sequence[int], base: BaseRecord) -> AdapterRecord:
    """The base of versions that have none: those of a store of schema 1."""
    versions = tuple(
        v.model_copy(update={"base": base}) if v.version in numbers and v.base is None else v for v in record.versions
    )
    return record.changed(versions=versions)


def draining(record: AdapterRecord, version: int | None, allowed_keys: Keys) -> AdapterRecord:
    """A version marked as being deleted, or all of them (None)."""
    chosen = record.versions if version is None else (record.version(version),)
    numbers = {v.version for v in chosen}
    return record.changed(
        active=None if record.active in numbers else record.active,
        versions=tuple(v.draining() if v.version in numbers else v for v in record.versions),
        allowed_keys=record.allowed_keys if isinstance(allowed_keys, Unchanged) else _labels(allowed_keys),
    )


def without(record: AdapterRecord, version: int) -> AdapterRecord | None:
    """A draining version removed; None if it was the last one, and the name goes with it."""
    removed = record.version(version)
    if removed.state != "draining":
        raise ValueError(f"{record.name}@{version} is {removed.state}, expected draining: call start_delete first")
    rest = tuple(v for v in record.versions if v is not removed)
    return record.changed(versions=rest) if rest else None


def _labels(keys: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if keys is None else tuple(keys)
