"""Owns what the demo's adapters are taught: `python -m server.demo.data NAME` writes it as files for `perft train`."""
