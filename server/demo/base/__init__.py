"""Owns the demo's base model: a small dense model (dense.py), upcycled to an MoE (upcycle.py), on disk (build.py)."""
