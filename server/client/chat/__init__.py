"""The command `perft chat`: one prompt to several models of a running server."""
