"""The adapters on disk: names, versions and their files. Imports no torch."""

from adapters.store.records import AdapterRecord, VersionRecord
from adapters.store.store import UNCHANGED, Store
from adapters.store.verify import verify_folder

__all__ = ["UNCHANGED", "AdapterRecord", "Store", "VersionRecord", "verify_folder"]
