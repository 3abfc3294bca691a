"""Adapters as .zip and .tar.gz archives, unpacked under bounds."""
