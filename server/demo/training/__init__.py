"""Owns how the demo's adapters are made: what each is taught (recipes.py), and how (trainer.py)."""
