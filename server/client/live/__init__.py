"""Views of a running server that stay on the terminal: `perft top`, `perft adapters list --watch`."""
