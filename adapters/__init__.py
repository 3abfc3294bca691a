"""Adapters as files: FORMAT.md read, checked and identified; the store that keeps them. No engine, no HTTP."""

from adapters.errors import (
    InvalidAdapterError,
    StorageFullError,
    StoreError,
    StoreLockedError,
    StoreSchemaError,
    StoreUnusableError,
)
from adapters.format.folder import CheckedAdapter, Limits, check_folder, lora_digest, read_folder
from adapters.store.records import AdapterRecord, VersionRecord
from adapters.store.store import UNCHANGED, Store
from adapters.store.verify import verify_folder

__all__ = [
    "UNCHANGED",
    "AdapterRecord",
    "CheckedAdapter",
    "InvalidAdapterError",
    "Limits",
    "StorageFullError",
    "Store",
    "StoreError",
    "StoreLockedError",
    "StoreSchemaError",
    "StoreUnusableError",
    "VersionRecord",
    "check_folder",
    "lora_digest",
    "read_folder",
    "verify_folder",
]
