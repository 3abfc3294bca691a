"""The store: every version of every adapter, on disk."""
