"""The commands `perft adapters`, `perft top` and `perft chat`."""
