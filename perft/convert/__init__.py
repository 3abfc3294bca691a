"""PERFT checkpoints of the paper's authors to docs/format.md's folders and back: `perft import`, `perft export`."""
