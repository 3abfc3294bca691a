"""docs/format.md: an adapter's folder, read and checked. Only what touches tensors imports torch."""
