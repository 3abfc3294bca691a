"""Owns the demo of `make serve`: a base model built locally (base/), adapters for it (adapters/, made by training/),
and the score of a running server (evaluate.py)."""
