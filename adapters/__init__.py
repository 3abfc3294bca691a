"""Adapters as files: FORMAT.md read, checked and identified. Knows neither the engine nor HTTP."""

from adapters.errors import InvalidAdapterError
from adapters.folder import CheckedAdapter, Limits, check_folder, read_folder

__all__ = ["CheckedAdapter", "InvalidAdapterError", "Limits", "check_folder", "read_folder"]
