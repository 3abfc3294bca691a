"""The adapters that a server keeps: names, versions and their files. Imports no torch."""

from adapters.store.address import is_shared, open_store, verify_store
from adapters.store.folder.store import FolderStore
from adapters.store.folder.verify import verify_folder
from adapters.store.log.agreement import Timing
from adapters.store.protocol import Check, Look, Prepared, Room, Store
from adapters.store.records import AdapterRecord, BaseRecord, VersionRecord
from adapters.store.transitions import UNCHANGED, Keys, Unchanged

__all__ = [
    "UNCHANGED",
    "AdapterRecord",
    "BaseRecord",
    "Check",
    "FolderStore",
    "Keys",
    "Look",
    "Prepared",
    "Room",
    "Store",
    "Timing",
    "Unchanged",
    "VersionRecord",
    "is_shared",
    "open_store",
    "verify_folder",
    "verify_store",
]
