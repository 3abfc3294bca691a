"""Owns what the store remembers of deleted names: the last number given, and which keys the name was restricted to.

Small JSON files by the first three digits of the name's hash, with some 40 bytes a name, read only when a name is made
or removed: a million deleted names are 4,096 files of about 9 KB, and no memory. Invariant: an entry is durable before
the record of its name is removed, and never gets a lower number.
"""

import json

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from adapters.errors import StoreUnusableError
from adapters.store.folder.durable import Disk
from adapters.store.folder.layout import Layout
from adapters.store.records import Tombstone


class _Entry(BaseModel):
    """A name in a file. keys: left out where every key was allowed."""

    model_config = ConfigDict(strict=True, extra="forbid")

    highest: int
    keys: list[str] | None = None


_FILE = TypeAdapter(dict[str, _Entry])


class DeletedNames:
    """The tombstones of an open store. The caller holds the store's lock."""

    def __init__(self, layout: Layout, disk: Disk) -> None:
        self._layout, self._disk = layout, disk

    def get(self, name: str) -> Tombstone | None:
        """Raises StoreUnusableError for a damaged file."""
        entry = self._read(name).get(name)
        return None if entry is None else Tombstone(entry.highest, None if entry.keys is None else tuple(entry.keys))

    def put(self, name: str, tombstone: Tombstone) -> None:
        """Remember a name that is about to be removed."""
        entries = self._read(name)
        keys = None if tombstone.allowed_keys is None else list(tombstone.allowed_keys)
        entry = _Entry(highest=tombstone.highest, keys=keys)
        if entries.get(name) == entry:
            return
        entries[name] = entry
        values = {key: value.model_dump(exclude_defaults=True) for key, value in entries.items()}
        self._disk.write(self._layout.deleted_file(name), json.dumps(values, separators=(",", ":")).encode() + b"\n")

    def _read(self, name: str) -> dict[str, _Entry]:
        path = self._layout.deleted_file(name)
        try:
            return read_deleted(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise StoreUnusableError(
                f"{path} is damaged: {error}; restore it from a copy, or remove it: numbers of the deleted names in it "
                'may then be given again, unless "floor" in STORE.json is raised above them'
            ) from None


def read_deleted(raw: bytes) -> dict[str, _Entry]:
    """The entries of a file. Raises ValueError."""
    try:
        return _FILE.validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from None
