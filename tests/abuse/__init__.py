"""Attacks with an inference key, or without one, on a real server: what one client sends must not hurt another.

Each module of attacks has a table `ATTACKS`: a name, and an `Attack` that carries out one round. `test_abuse.py` runs
each beside an undisturbed stream; `benchmarks/soak.py --only abuse` runs all of them together for ten minutes.
"""
