"""Adapters as files: docs/format.md read, checked and identified; the store that keeps them. No engine, no HTTP."""
