"""The store of one server: a folder, locked."""
