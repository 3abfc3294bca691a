"""How well models of a running server answer test questions: `perft eval`."""
