"""Benchmarks of a running server, from a client's side."""
