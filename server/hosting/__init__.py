"""Whoever runs a server's processes, and what it has to do for that."""
