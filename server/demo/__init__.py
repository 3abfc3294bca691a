"""Owns the demo of `make serve`: a base model made on the spot, adapters for it, and questions to ask of it."""
