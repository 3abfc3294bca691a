"""Adapters as .zip and .tar.gz, unpacked under bounds."""
