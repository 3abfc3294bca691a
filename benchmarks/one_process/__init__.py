"""Benchmarks of the engine in the benchmark's own process: no server, no socket, every step timed."""
