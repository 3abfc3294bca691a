"""From a data file to an adapter: `perft train`. Nothing here knows the server.

Python users attach with `perft.hf` and take any loop or Trainer; what is here is one such loop, with its data formats.
"""
