"""The adapters on disk: names, versions and their files. Imports no torch."""

from adapters.store.records import AdapterRecord, BaseRecord, VersionRecord
from adapters.store.store import UNCHANGED, Keys, Store, Unchanged
from adapters.store.verify import verify_folder

__all__ = ["UNCHANGED", "AdapterRecord", "BaseRecord", "Keys", "Store", "Unchanged", "VersionRecord", "verify_folder"]
