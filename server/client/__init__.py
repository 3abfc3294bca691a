"""The command `perft adapters`."""
