"""The commands that need no running server: training, importing, inspecting; and `perft eval`, which asks one."""
